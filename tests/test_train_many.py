# SPDX-License-Identifier: Apache-2.0
"""Adapters trained at once against each of them trained alone by `make_step`, after a dozen updates."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import subjects
from contracts.lines import METHODS
from contracts.models import BERT, KNOWN, LLAMA, VOCAB
from contracts.table import kind_of
from flax import nnx

import jpeft
from jpeft.train.losses import cls_sums, lm_sums
from jpeft.train.many import begin_many, fix, make_step_many, put_back
from jpeft.train.step import begin, make_step

#: Relative error after a dozen updates in float32.
TRAINED = 1e-6
KEY = jax.random.key(0)
UPDATES, ADAPTERS = 12, 3
OPTIONS = {"lr": [1e-3, 3e-3, 1e-2], "decay": [0.0, 0.1, 0.3], "clip": [0.2, 1.0, 1e3]}


def tx(lr, decay, clip):
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(lr, weight_decay=decay))


@functools.cache
def base():
    return jpeft.models.build(BERT | {"num_labels": 3}, "SEQ_CLS", key=jax.random.key(1))


def adapted(seed, **options):
    method = jpeft.LoRA(**{"targets": ["query", "value"], "dropout": 0.2, **options})
    return subjects.fill(jpeft.adapt(base(), method, key=jax.random.key(seed)), seed, 0.05)


@functools.cache
def three():
    """Other seeds, ranks, alphas, roots and patterns."""
    return (
        adapted(1, rank=4, alpha=8),
        adapted(2, rank=7, alpha=9, rslora=True),
        adapted(3, rank=2, alpha=3, rank_pattern={r".*\.1\..*": 3}),
    )


@functools.cache
def data(adapters=1, updates=UPDATES):
    """Batches of two micro-batches of four rows, some of them padded, or several such."""
    rng = np.random.default_rng(0)
    shape = (adapters, updates, 2, 4)
    ids = rng.integers(0, VOCAB, (*shape, 6))
    mask = np.arange(6) < rng.integers(2, 7, shape)[..., None]
    labels = np.where(rng.random(shape) < 0.2, -100, rng.integers(0, 3, shape))
    labels[..., 0] = 1
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: jnp.asarray(value, jnp.int32) for name, value in arrays.items()}


def batches(adapter=0, adapters=1):
    return [{name: value[adapter, i] for name, value in data(adapters).items()} for i in range(UPDATES)]


def alone(slot, batches, key):
    """(trainable leaves, losses, norms) of one adapter trained by itself."""
    graphdef, trainable, frozen = jpeft.partition(three()[slot - 1])
    own = tx(**{name: values[slot - 1] for name, values in OPTIONS.items()})
    state, update = begin(own, trainable), make_step(graphdef, cls_sums, own)
    metrics = []
    for batch in batches:
        state, measured = update(state, frozen, batch, key)
        metrics.append(measured)
    return state.trainable, [m.loss for m in metrics], [m.grad_norm for m in metrics]


def check(trained, slot, expected):
    leaves, losses, norms = expected
    _, got, _ = jpeft.partition(trained.bank.model(slot))
    _, start, _ = jpeft.partition(three()[slot - 1])
    assert got.keys() == leaves.keys()
    for path, leaf in leaves.items():
        assert subjects.error(got[path], leaf) < TRAINED, path
        assert subjects.error(start[path], leaf) > 1e-3, path
    assert subjects.error(trained.losses[:, slot - 1], losses) < TRAINED
    assert subjects.error(trained.grad_norms[:, slot - 1], norms) < TRAINED


@pytest.mark.parametrize("dropout", ["none", "one key", "a key for each"])
def test_each_is_trained_as_it_would_be_alone(dropout):
    """Other seeds, ranks, alphas, learning rates, decays and clips; with AdamW and accumulation."""
    keys = {"none": None, "one key": jax.random.key(7), "a key for each": jax.random.split(jax.random.key(7), 3)}
    key, bank = keys[dropout], jpeft.bank(three())
    trained = jpeft.train_many(bank, cls_sums, tx, batches(), options=OPTIONS, key=key)
    for slot in (1, 2, 3):
        own = key[slot - 1] if dropout == "a key for each" else key
        check(trained, slot, alone(slot, batches(), own))
    assert not trained.failed.any()
    for path, leaf in trained.bank.trainable.items():
        np.testing.assert_array_equal(leaf[0], bank.trainable[path][0])


def momentum(lr, decay, clip):
    return optax.chain(optax.clip_by_global_norm(clip), optax.add_decayed_weights(decay), optax.sgd(lr, momentum=0.9))


#: Of every method the first line for a BERT, but LoRA's, above; AdaLoRA's many trainings are in test_adalora.py.
EVERY = {
    kind: line
    for name, line in reversed(METHODS.items())
    for kind in [kind_of(line)]
    if "bert" in line.on and kind not in ("lora", "adalora")
}


def test_every_other_method_is_there():
    assert {*EVERY} | {"lora", "adalora"} == {*jpeft.METHODS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_each_of_every_method_is_trained_as_it_would_be_alone(kind):
    """Two starts, with rates, decays and clips of their own.

    By momentum: Adam makes steps of a rate out of roundings where a gradient is zero but for these, as that of the bias
    of keys is, which a softmax does not see.
    """
    method = EVERY[kind].make(KNOWN["bert"].targets)
    models = [subjects.fill(jpeft.adapt(base(), method, key=jax.random.key(i)), i, 0.05) for i in (1, 2)]
    options: Any = {"lr": [0.03, 0.1], "decay": [0.0, 0.1], "clip": [0.2, 1.0]}
    key, fed = jax.random.key(7), batches()[:6]
    trained = jpeft.train_many(jpeft.bank(models), cls_sums, momentum, fed, options=options, key=key)
    assert not trained.failed.any()
    for slot, model in enumerate(models, 1):
        graphdef, trainable, frozen = jpeft.partition(model)
        own = momentum(**{name: values[slot - 1] for name, values in options.items()})
        state, update, losses = begin(own, trainable), make_step(graphdef, cls_sums, own), []
        for batch in fed:
            state, measured = update(state, frozen, batch, key)
            losses.append(measured.loss)
        assert subjects.error(trained.losses[:, slot - 1], losses) < TRAINED
        got = jpeft.partition(trained.bank.model(slot))[1]
        errors = {path: subjects.error(got[path], leaf) for path, leaf in state.trainable.items()}
        assert max(errors.values()) < TRAINED, max(errors, key=lambda path: errors[path])
        assert max(subjects.error(trainable[path], leaf) for path, leaf in state.trainable.items()) > 1e-3


def test_padding_stays_zero_and_the_base_as_it_is():
    bank = jpeft.bank(three())
    trained = jpeft.train_many(bank, cls_sums, optax.adamw(1e-2, weight_decay=0.1), batches()).bank
    outside = 0
    for path, leaf in trained.trainable.items():
        for slot, own in enumerate(bank.own, 1):
            inside = np.zeros(leaf.shape[1:], bool)
            inside[tuple(map(slice, own.shapes[path]))] = True
            outside += (~inside).sum()
            assert not np.asarray(leaf[slot])[~inside].any(), path
    assert outside > 0
    assert all(trained.frozen[path] is leaf for path, leaf in bank.frozen.items())
    jax.tree.map(np.testing.assert_array_equal, trained.constants, bank.constants)


def test_padding_gets_no_update_from_an_optimizer_that_moves_zeros():
    bank = jpeft.bank(three())
    noisy = optax.chain(optax.sgd(0.1), optax.add_noise(0.1, 0.0, jax.random.key(0)))
    trained = jpeft.train_many(bank, cls_sums, noisy, batches()[:2]).bank
    path = next(path for path in trained.trainable if path.endswith("query/adapters/lora/A"))
    assert trained.trainable[path][1, ..., :4].all()
    assert not trained.trainable[path][1, ..., 4:].any()


def test_data_of_their_own():
    together = [{name: value[:, i] for name, value in data(3).items()} for i in range(UPDATES)]
    trained = jpeft.train_many(jpeft.bank(three()), cls_sums, tx, together, options=OPTIONS, own_batches=True)
    for slot in (1, 2, 3):
        check(trained, slot, alone(slot, batches(slot - 1, 3), None))


def test_one_that_fails_stops_and_the_others_go_on(caplog):
    rates = OPTIONS | {"lr": [1e-3, 1e30, 1e-2], "clip": [0.2, 1e30, 1e3]}
    trained = jpeft.train_many(jpeft.bank(three()), cls_sums, tx, batches(), options=rates)
    assert trained.failed.tolist() == [False, True, False]
    assert "slots [2] was not finite" in caplog.text
    for slot in (1, 3):
        check(trained, slot, alone(slot, batches(), None))
    assert all(np.isfinite(leaf).all() for leaf in trained.bank.trainable.values())


def test_a_step_is_compiled_once_and_goes_on_from_its_state():
    """The parts of `train_many`, for a loop of one's own; a language model of somebody's own as the base."""
    plain = nnx.Sequential(nnx.Embed(VOCAB, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, VOCAB, rngs=nnx.Rngs(1)))
    foreign = Called(plain)
    models = [jpeft.adapt(foreign, jpeft.LoRA(rank=r, targets=["net.layers.1"]), key=jax.random.key(r)) for r in (1, 3)]
    bank = jpeft.bank(models)
    fixed = fix(bank, {"lr": [0.1, 0.3]})

    def rate(lr):
        return optax.adam(optax.linear_schedule(lr, 0.0, 8))

    state, update = begin_many(rate, bank, fixed), make_step_many(bank, lm_sums, rate)
    for batch in batches()[:4]:
        state, metrics = update(state, fixed, batch | {"labels": batch["input_ids"]}, None)
    assert update.num_compiled == 1
    assert state.updates.tolist() == [4, 4]
    assert metrics.loss.shape == (2,)
    after = put_back(bank, state)
    assert (after.trainable["net/layers/1/adapters/lora/B"] != bank.trainable["net/layers/1/adapters/lora/B"])[1:].any()


class Called(nnx.Module):
    """A model called with a mask that it does not need."""

    def __init__(self, net):
        self.net = net

    def __call__(self, ids, mask):
        return self.net(ids)


def test_wrong_numbers_of_things():
    bank = jpeft.bank(three())
    with pytest.raises(ValueError, match=r"option 'lr' has the shape \(2,\); the bank has 3 adapters"):
        jpeft.train_many(bank, cls_sums, tx, batches(), options={"lr": [1e-3, 1e-2]})
    with pytest.raises(ValueError, match="tx takes no options, so lr would change nothing"):
        jpeft.train_many(bank, cls_sums, optax.sgd(0.1), batches(), options={"lr": [1.0, 2.0, 3.0]})
    with pytest.raises(TypeError, match=r"takes a bank, which jpeft\.bank makes of adapted models; got State"):
        jpeft.train_many(nnx.State({}), cls_sums, tx, batches())
    with pytest.raises(ValueError, match="there are no batches"):
        jpeft.train_many(bank, cls_sums, optax.sgd(0.1), [])
    with pytest.raises(ValueError, match="got 2 keys; the bank has 3"):
        jpeft.train_many(bank, cls_sums, optax.sgd(0.1), batches(), key=jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match="is of 2 adapters; the bank has 3"):
        jpeft.train_many(bank, cls_sums, optax.sgd(0.1), batches(), own_batches=True)


DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": VOCAB,
    "dim": 8,
    "hidden_dim": 12,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 16,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.3,
}
DEBERTA = {
    "model_type": "deberta-v2",
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "relative_attention": True,
    "position_buckets": 4,
    "pos_att_type": ["p2c", "c2p"],
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
ROBERTA = BERT | {"model_type": "roberta", "pad_token_id": 0}


@pytest.mark.parametrize("kind", ["prompt_tuning", pytest.param("p_tuning", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "config, task",
    [
        (BERT, "SEQ_CLS"),
        (BERT, "TOKEN_CLS"),
        (ROBERTA, "SEQ_CLS"),
        (DISTILBERT, "SEQ_CLS"),
        (DEBERTA, "SEQ_CLS"),
        (LLAMA, "CAUSAL_LM"),
    ],
    ids=lambda given: given if isinstance(given, str) else given["model_type"],
)
def test_prompts_of_other_lengths_train_as_alone(config, task, kind):
    """A head that reads the first token reads each prompt's own first one, and in the slot of the base the text's."""
    num_labels = None if task == "CAUSAL_LM" else 2
    base = jpeft.models.build(config, task, key=KEY, num_labels=num_labels)
    method: Any = jpeft.METHODS[kind]
    models = [jpeft.adapt(base, method(num_tokens=n), key=KEY) for n in (2, 5)]
    rng = np.random.default_rng(0)
    mask = (np.arange(7) < rng.integers(3, 8, (UPDATES, 1, 6, 1))).astype(np.int32)
    ids = (rng.integers(1, VOCAB, mask.shape) * mask).astype(np.int32)
    labels = ids[..., 0] % 2 if task == "SEQ_CLS" else np.where(mask == 1, ids % (num_labels or VOCAB), -100)
    fed = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]
    sums, rule = (lm_sums if task == "CAUSAL_LM" else cls_sums), optax.adamw(1e-2, weight_decay=0.1)
    together = jpeft.train_many(jpeft.bank(models), sums, rule, fed)
    for slot, model in enumerate(models):
        graphdef, trainable, frozen = jpeft.partition(model)
        update, state, losses = make_step(graphdef, sums, rule), begin(rule, trainable), []
        for batch in fed:
            state, measured = update(state, frozen, batch, None)
            losses.append(float(measured.loss))
        np.testing.assert_allclose(np.asarray(together.losses)[:, slot], losses, rtol=1e-5, atol=0)
    bank = jpeft.bank(models)
    none = jpeft.apply_bank(bank, np.zeros(6, int), lambda model, x, m: model(x, m), ids[0, 0], mask[0, 0])
    np.testing.assert_allclose(none, base(ids[0, 0], mask[0, 0]), rtol=0, atol=1e-5)
