# SPDX-License-Identifier: Apache-2.0
"""AdapterFusion: its second stage, its regulariser, its refusals. (Its values: test_against_adapters.py.)"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import subjects
from contracts.models import BERT
from flax import nnx

import jpeft
from jpeft import AdapterFusion, Compacter, Houlsby, LoRA, ParallelAdapter, Pfeiffer
from jpeft.models import bert
from jpeft.train import optim
from jpeft.train.losses import cls_loss, cls_sums
from jpeft.train.sections import Optimizer
from jpeft.train.step import begin, make_step

KEY = jax.random.key(0)
IDS = np.random.default_rng(0).integers(1, 11, (4, 6))
BATCH = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "labels": np.array([0, 1, 1, 0])}


def stage_two(*methods, fill=True, **options):
    """A classifier with adapters `a`, `b`, ... that have been trained, and a fusion of them."""
    model = jpeft.models.build(BERT, "SEQ_CLS", key=jax.random.key(1), num_labels=2)
    for name, method in zip("abc", methods, strict=False):
        model = jpeft.adapt(model, method, key=KEY, name=name)
    model = subjects.fill(model) if fill else model
    return jpeft.adapt(model, AdapterFusion(adapters=tuple("abc"[: len(methods)]), **options), key=KEY)


PAIR = (Pfeiffer(reduction_factor=2), Pfeiffer(reduction_factor=4))


def test_it_starts_with_the_identity_and_near_zero():
    trainable = jpeft.partition(stage_two(*PAIR))[1]
    at = "layers/output/residual/adapters/adapter_fusion/"
    expected = np.where(np.eye(8) == 1, 1, 1e-6).astype(np.float32)
    for layer in trainable[at + "value"]:
        np.testing.assert_array_equal(layer, expected)
    for name in ("query", "key"):
        assert 0.01 < np.std(trainable[at + name]) < 0.03
        assert not trainable[f"{at}{name}_bias"].any()


def test_what_is_fused_is_constant_and_bit_identical_after_training():
    model = stage_two(*PAIR)
    graphdef, trainable, frozen = jpeft.partition(model)
    own = {path for path in trainable if "/adapter_fusion/" in path}
    assert {path.split("/")[0] for path in set(trainable) - own} == {"classifier"}
    parts = [path for path in frozen if "/adapters/adapter_fusion/parts/" in path]
    assert len(parts) == 8
    before = {path: np.array(value) for path, value in {**frozen, **trainable}.items()}
    tx = optax.adamw(1e-2, weight_decay=0.1)
    update, state = make_step(graphdef, cls_sums, tx), begin(tx, trainable)
    for _ in range(3):
        state, metrics = update(state, frozen, jax.tree.map(lambda x: x[None], BATCH), None)
    assert np.isfinite(metrics.loss)
    for path, value in frozen.items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    assert all((np.asarray(value) != before[path]).any() for path, value in state.trainable.items())


def test_the_penalty_is_that_of_the_paper_and_in_the_step_once():
    """0.01 * sum of ||I - V||², over all layers; its gradient, over two micro-batches, is added once."""
    model = subjects.fill(stage_two(*PAIR))
    graphdef, trainable, frozen = jpeft.partition(model)
    (path,) = [path for path in trainable if path.endswith("/value")]
    value = np.asarray(trainable[path], np.float64)
    expected = 0.01 * ((np.eye(8) - value) ** 2).sum()
    assert subjects.error(jpeft.penalty(model), expected) < subjects.FLOAT32

    plain = lambda t: cls_loss(jpeft.combine(graphdef, t, frozen), BATCH)  # noqa: E731
    loss, gradients = jax.value_and_grad(plain)(trainable)
    gradients[path] += jnp.asarray(0.02 * (value - np.eye(8)), jnp.float32)
    tx = optax.sgd(1.0)
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), BATCH)
    state, metrics = make_step(graphdef, cls_sums, tx)(begin(tx, trainable), frozen, halves, None)
    assert subjects.error(metrics.loss, loss + expected) < subjects.FLOAT32
    for name, gradient in gradients.items():
        difference = np.linalg.norm(state.trainable[name] - (trainable[name] - gradient))
        assert difference < 1e-5 * np.linalg.norm(trainable[name]), name


@pytest.mark.parametrize("options", [{"dynamic": False}, {"regularization": 0}], ids=str)
def test_without_a_regulariser_there_is_no_penalty(options):
    assert jpeft.penalty(stage_two(*PAIR, **options)) is None


def test_the_penalty_leaves_out_layers_that_are_not_fused():
    methods = [Pfeiffer(reduction_factor=factor, layers=[1]) for factor in (2, 4)]
    model = subjects.fill(stage_two(*methods, layers=[1]))
    (value,) = [leaf for path, leaf in jpeft.partition(model)[1].items() if path.endswith("/value")]
    expected = 0.01 * ((np.eye(8) - np.asarray(value, np.float64)[1]) ** 2).sum()
    assert subjects.error(jpeft.penalty(model), expected) < subjects.FLOAT32


def test_weight_decay_does_not_pull_the_value_matrix_to_zero():
    trainable = jpeft.partition(stage_two(*PAIR))[1]
    tx = optim.make_optimizer(Optimizer(lr=0.1, weight_decay=0.5, warmup=0.0, clip=None), 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, trainable), tx.init(trainable), trainable)
    at = "layers/output/residual/adapters/adapter_fusion/"
    moved = {path.removeprefix(at) for path, update in updates.items() if update.any()}
    assert moved == {"query", "key", "classifier/adapters/a/saved/kernel"}


def test_adapters_that_share_leaves_are_fused_and_frozen_with_them():
    methods = [Compacter(reduction_factor=2, n=2, rule_std=0.3), Compacter(reduction_factor=4, n=2, rule_std=0.3)]
    model = stage_two(*methods)
    _, trainable, frozen = jpeft.partition(model)
    assert {"adapters/a/rule", "adapters/b/rule"} <= set(frozen)
    assert not [path for path in trainable if path.endswith("rule")]
    assert jpeft.summary(model).trainable == sum(leaf.size for leaf in trainable.values())
    assert np.isfinite(model(IDS)).all()
    np.testing.assert_array_equal(
        jpeft.strip(model)(IDS), jpeft.models.build(BERT, "SEQ_CLS", key=jax.random.key(1))(IDS)
    )


COUNTS = [(True, 21_252_096), (False, 14_174_208)]


@pytest.mark.parametrize("dynamic, trainable", COUNTS)
def test_counts(dynamic, trainable):
    config = bert.PRESETS["bert-base-uncased"]
    methods = Pfeiffer() | Pfeiffer(reduction_factor=64) | AdapterFusion(("pfeiffer", "pfeiffer_2"), dynamic=dynamic)
    model = nnx.eval_shape(
        lambda: jpeft.adapt(jpeft.models.build(config, "FEATURE_EXTRACTION", key=KEY), methods, key=KEY)
    )
    assert jpeft.summary(model).trainable == trainable
    assert sum(leaf.size for leaf in jpeft.partition(model)[1].values()) == trainable


WRONG = [
    ({"adapters": ("a",)}, r"adapters must be two or more names of adapters, got \('a',\)"),
    ({"adapters": "ab"}, "got 'ab'"),
    ({"adapters": ("a", "a")}, "two or more names"),
    ({"adapters": ("a", 1)}, "two or more names"),
    ({"adapters": ("a", "b"), "dynamic": 1.5}, "dynamic must be one of True, False; got 1.5"),
    ({"adapters": ("a", "b"), "regularization": -1}, "regularization must be a number of at least 0, got -1"),
    ({"adapters": ("a", "b"), "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=str)
@pytest.mark.untyped
def test_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        AdapterFusion(**fields)


REFUSED = [
    ((Pfeiffer(reduction_factor=2), Houlsby(reduction_factor=2)), {}, "layers/attention/output/residual carries b of"),
    ((Pfeiffer(reduction_factor=2), ParallelAdapter()), {}, "must read and add alike"),
    ((Pfeiffer(reduction_factor=2), Pfeiffer(reduction_factor=2, gate=True)), {}, "'b' cannot keep its gate"),
    ((Pfeiffer(reduction_factor=2), Pfeiffer(reduction_factor=2, ln_after=True)), {}, "'b' cannot keep its ln_after"),
    ((Pfeiffer(reduction_factor=2), Pfeiffer(reduction_factor=2, invertible="nice")), {}, "input_embedding carries b"),
    (
        (Pfeiffer(reduction_factor=2), Pfeiffer(layers=[0])),
        {},
        r"'b' acts in the layers \[0\] and the fusion in \[0, 1\]",
    ),
    (PAIR, {"layers": [0]}, r"'a' acts in the layers \[0, 1\] and the fusion in \[0\]"),
    (
        (Pfeiffer(), LoRA(targets=["query"])),
        {},
        "no residual of the model carries the adapters a, b together; it has a, b",
    ),
]


@pytest.mark.parametrize("methods, options, message", REFUSED, ids=lambda value: str(value)[:60])
def test_adapters_that_cannot_be_fused_are_refused(methods, options, message):
    with pytest.raises(ValueError, match=message):
        stage_two(*methods, fill=False, **options)


def test_adapters_that_are_not_there_are_refused():
    model = jpeft.models.build(BERT, "SEQ_CLS", key=KEY)
    with pytest.raises(ValueError, match="no residual of the model carries the adapters a, b together; it has none"):
        jpeft.adapt(model, AdapterFusion(("a", "b")), key=KEY)
