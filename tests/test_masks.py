# SPDX-License-Identifier: Apache-2.0
"""Selecting leaves, and optimizers that leave the others alone or treat them differently."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import subjects
from flax import nnx

import jpeft

KEY = jax.random.key(0)


@pytest.fixture(scope="module", name="model")
def _model():
    method = jpeft.LoRA(rank=2, targets=["up"], bias="lora_only", modules_to_save=["down"])
    model = jpeft.adapt(subjects.ListOfLayers(4, 2, nnx.Rngs(0)), method, key=KEY)
    return subjects.fill(jpeft.adapt(model, jpeft.LoRA(rank=1, targets=["up"]), key=KEY, name="second"))


@pytest.fixture(scope="module", name="trainable")
def _trainable(model):
    return jpeft.partition(model)[1]


def selected(tree, *selectors):
    return {path for path, hit in jpeft.mask(tree, *selectors).items() if hit}


def test_patterns(trainable):
    everything = set(trainable)
    assert selected(trainable, "**") == everything
    assert selected(trainable, "**/B") == {path for path in everything if path.endswith("/B")}
    assert selected(trainable, "blocks/0/**") == {path for path in everything if path.startswith("blocks/0/")}
    assert selected(trainable, "blocks/*/up/adapters/lora/A") == {f"blocks/{i}/up/adapters/lora/A" for i in (0, 1)}
    assert selected(trainable, "**/saved/bias") == {path for path in everything if path.endswith("saved/bias")}
    assert selected(trainable, "**/up/**", "**/kernel") == {
        p for p in everything if "/up/" in p or p.endswith("kernel")
    }
    assert list(jpeft.mask(trainable, "**")) == list(trainable)


def test_a_star_stays_within_one_part():
    tree = {"a/b/c": jnp.ones(1), "a/c": jnp.ones(1), "abc": jnp.ones(1), "a.c": jnp.ones(1)}
    assert selected(tree, "a/*") == {"a/c"}
    assert selected(tree, "*/c") == {"a/c"}
    assert selected(tree, "a/**") == {"a/b/c", "a/c"}
    assert selected(tree, "**/c") == {"a/b/c", "a/c"}
    assert selected(tree, "a/**/c") == {"a/b/c", "a/c"}
    assert selected(tree, "*") == {"abc", "a.c"}
    assert selected(tree, "a?c") == {"abc", "a.c"}  # but not a/c
    assert selected(tree, "a.c") == {"a.c"}  # a dot is a dot
    assert selected(tree, "**") == set(tree)


def test_a_method_selects_the_adapters_of_its_name(model, trainable):
    first = {path for path in trainable if "/adapters/lora/" in path}
    assert selected(trainable, jpeft.LoRA) == first
    assert selected(trainable, jpeft.LoRA(targets=["anything"])) == first
    assert selected(model, jpeft.LoRA) == first


def test_a_variable_type_selects_by_type(model, trainable):
    assert selected(model, jpeft.AdapterParam) == set(trainable)
    frozen = jpeft.partition(model)[2]
    assert selected(model, nnx.Param) == set(trainable) | set(frozen)
    assert selected(trainable, jpeft.AdapterParam) == set(trainable)
    assert selected(trainable, nnx.Param) == set(trainable)
    with pytest.raises(TypeError, match=r"the type of blocks/0/down/bias is not known .*pass the model to select by"):
        jpeft.mask(frozen, nnx.Param)


@pytest.mark.untyped
def test_wrong_selectors(trainable):
    with pytest.raises(ValueError, match="mask needs at least one selector"):
        jpeft.mask(trainable)
    with pytest.raises(ValueError, match=r"selector '\*\*/C' selects no leaf; nearest: "):
        jpeft.mask(trainable, "**/C")
    with pytest.raises(ValueError, match=r"selector '\*\*/C' selects no leaf"):
        jpeft.mask(trainable, "**/B", "**/C")
    with pytest.raises(ValueError, match=r"selector 'B' selects no leaf; nearest: .*/B"):
        jpeft.mask(trainable, "B")
    with pytest.raises(TypeError, match=r"a path pattern, a method or a Variable type; got <class 'int'>"):
        jpeft.mask(trainable, int)
    with pytest.raises(TypeError, match=r"a path pattern, a method or a Variable type; got 3"):
        jpeft.mask(trainable, 3)
    with pytest.raises(TypeError, match=r"a flat \{path: array\} dict .*got list"):
        jpeft.mask([1.0], "**")
    with pytest.raises(TypeError, match=r"a flat \{path: array\} dict"):
        jpeft.mask({1: 1.0}, "**")


def test_labels_are_those_of_the_first_rule(trainable):
    labels = jpeft.labels(trainable, {"**/saved/**": "copy", jpeft.LoRA: "first", "**": "rest"})
    assert list(labels) == list(trainable)
    for path, label in labels.items():
        assert label == ("copy" if "/saved/" in path else "first" if "/lora/" in path else "rest")


def test_wrong_labels(trainable):
    with pytest.raises(ValueError, match=r"\d+ leaves have no label, such as .*; end the rules with '\*\*'"):
        jpeft.labels(trainable, {"**/B": "b"})
    with pytest.raises(ValueError, match=r"leaves have no label"):
        jpeft.labels(trainable, {})
    with pytest.raises(ValueError, match=r"selector '\*\*/C' selects no leaf"):
        jpeft.labels(trainable, {"**/C": "c", "**": "rest"})
    with pytest.raises(ValueError, match=r"the rule '\*\*/B' comes too late"):
        jpeft.labels(trainable, {"**": "rest", "**/B": "b"})


def updates_of(tx, trainable, gradient=1.0):
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), trainable)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(trainable), trainable)
    return {path: np.asarray(update) for path, update in updates.items()}


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adamw(0.1, weight_decay=0.5)], ids=["sgd", "adamw"])
def test_what_is_not_selected_gets_no_update(trainable, tx):
    """optax.masked would pass its raw gradient through, and a step would add it."""
    updates = updates_of(jpeft.optimizer(tx, "**/B"), trainable)
    for path, update in updates.items():
        assert (update != 0).all() if path.endswith("/B") else (update == 0).all()


def test_without_selectors_all_leaves_are_updated(trainable):
    updates = updates_of(jpeft.optimizer(optax.sgd(0.1)), trainable)
    assert all(np.allclose(update, -0.1) for update in updates.values())


def test_no_state_is_kept_for_what_is_not_selected(trainable):
    state = jpeft.optimizer(optax.adam(0.1), "**/B").init(trainable)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state)) - 1  # the step count
    assert moments == 2 * sum(value.size for path, value in trainable.items() if path.endswith("/B"))


def test_a_rate_for_b_of_its_own(trainable):
    """LoRA+."""
    rates = {"a": optax.sgd(0.1), "b": optax.sgd(1.6)}
    for tx in (
        jpeft.optimizer(rates, rules={"**/B": "b", "**": "a"}),
        optax.partition(rates, jpeft.labels(trainable, {"**/B": "b", "**": "a"})),
    ):
        for path, update in updates_of(tx, trainable).items():
            np.testing.assert_allclose(update, -1.6 if path.endswith("/B") else -0.1)


def test_no_decay_on_some_leaves(trainable):
    """`mask` as optax wants it."""
    decayed = jpeft.mask(trainable, "**/A", "**/B")
    tx = optax.adamw(0.1, weight_decay=0.5, mask=decayed)
    for path, update in updates_of(tx, trainable, gradient=0.0).items():
        expected = -0.05 * np.asarray(trainable[path]) if decayed[path] else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_an_optimizer_of_nothing_is_an_error():
    for tx in (
        jpeft.optimizer(optax.sgd(0.1)),
        jpeft.optimizer(optax.sgd(0.1), "**/B"),
        jpeft.optimizer({"a": optax.sgd(0.1)}, rules={"**": "a"}),
    ):
        with pytest.raises(ValueError, match="there is nothing to train: the trainable tree is empty"):
            tx.init({})


def test_wrong_optimizers(trainable):
    rates = {"a": optax.sgd(0.1), "b": optax.sgd(1.6)}
    with pytest.raises(TypeError, match="several transformations need rules="):
        jpeft.optimizer(rates)
    with pytest.raises(TypeError, match=r"several transformations need rules=, .* and no further selectors"):
        jpeft.optimizer(rates, "**/B", rules={"**": "a"})
    with pytest.raises(TypeError, match="rules= gives labels to several transformations"):
        jpeft.optimizer(optax.sgd(0.1), rules={"**": "a"})
    with pytest.raises(ValueError, match=r"without a transformation: \['c'\]; transformations without a rule: \['b'\]"):
        jpeft.optimizer(rates, rules={"**/B": "c", "**": "a"})
    with pytest.raises(ValueError, match=r"selector '\*\*/C' selects no leaf"):
        jpeft.optimizer(optax.sgd(0.1), "**/C").init(trainable)


def test_it_is_a_part_of_a_chain(trainable):
    """Also where a later or inner transformation wants more than gradients."""
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), jpeft.optimizer(optax.chain(optax.sgd(0.1), plateau)))
    gradients = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = tx.update(gradients, tx.init(trainable), trainable, value=1.0)
    norm = optax.tree.norm(updates)
    np.testing.assert_allclose(norm, 0.1, rtol=1e-5)
