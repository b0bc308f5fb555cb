# SPDX-License-Identifier: Apache-2.0
"""One update: accumulation, clipping, the guard against NaN; the optimizer against torch's, the schedule against
transformers'."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.train import config
from jpeft.train.losses import IGNORED, SUMS, cls_loss, lm_loss
from jpeft.train.optim import make_optimizer, schedule
from jpeft.train.step import begin, make_step

#: Float32 sums in another order.
SLOW = pytest.mark.slow
REORDERED = 1e-6
VOCAB, ROWS, SEQ = 19, 12, 10


def parts(folder, task, **changes):
    """A tiny adapted model in its parts, with numbers in every adapter."""
    num_labels = 2 if task in ("SEQ_CLS", "TOKEN_CLS") else None
    model = jpeft.models.load(folder, task, num_labels=num_labels, key=jax.random.key(3))
    targets = ["query", "value"] if "bert" in str(folder) else ["q_proj", "v_proj"]
    model = jpeft.adapt(
        model, jpeft.LoRA(**{"rank": 3, "alpha": 6, "targets": targets, **changes}), key=jax.random.key(1)
    )
    graphdef, trainable, frozen = jpeft.partition(model)
    rng = np.random.default_rng(0)
    return (
        graphdef,
        {p: v + 0.1 * rng.standard_normal(v.shape).astype(np.float32) for p, v in trainable.items()},
        frozen,
    )


def rows(task):
    """Twelve rows with very unequal numbers of labels."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, VOCAB, (ROWS, SEQ))
    lengths = rng.integers(2, SEQ + 1, ROWS)
    mask = np.arange(SEQ) < lengths[:, None]
    labels = np.where(mask & (np.arange(SEQ) > lengths[:, None] - rng.integers(2, SEQ, ROWS)[:, None]), ids, IGNORED)
    if task == "SEQ_CLS":
        labels = np.where(np.arange(ROWS) < 5, IGNORED, rng.integers(0, 2, ROWS))
    if task == "TOKEN_CLS":
        labels = np.where(labels == IGNORED, IGNORED, ids % 2)
    if task == "QUESTION_ANS":  # of one row there is nothing to learn
        ends = np.stack([np.zeros(ROWS, int), rng.integers(0, lengths)], axis=1)
        labels = np.where((np.arange(ROWS) == 3)[:, None], IGNORED, ends)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: jnp.asarray(value, jnp.int32) for name, value in arrays.items()}


def split(batch, accumulation):
    return {name: value.reshape(accumulation, -1, *value.shape[1:]) for name, value in batch.items()}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM"])
@pytest.mark.parametrize("accumulation", [pytest.param(2, marks=SLOW), pytest.param(4, marks=SLOW), 12])
def test_k_batches_of_b_are_one_of_kb(bert, llama, task, accumulation):
    graphdef, trainable, frozen = parts(llama if task == "CAUSAL_LM" else bert, task)
    outcomes = []
    for k in (1, accumulation):
        tx = optax.sgd(1.0)  # a step of Adam would hide the gradient's size
        update = make_step(graphdef, SUMS[task], tx)
        outcomes.append(update(begin(tx, trainable), frozen, split(rows(task), k), None))
    (one, one_metrics), (many, many_metrics) = outcomes
    np.testing.assert_allclose(one_metrics[:3], many_metrics[:3], rtol=REORDERED)
    for path, value in one.trainable.items():
        assert np.abs(value - trainable[path]).max() > 0, path
        np.testing.assert_allclose(many.trainable[path], value, atol=REORDERED, err_msg=path)


@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM"])
def test_an_update_is_the_public_losss_gradient(bert, llama, task):
    """`lm_loss` and `cls_loss` under the user's own `jax.grad`, and a plain SGD step by hand."""
    graphdef, trainable, frozen = parts(bert if task == "SEQ_CLS" else llama, task)
    loss_of = cls_loss if task == "SEQ_CLS" else lm_loss
    loss, slope = jax.value_and_grad(lambda t: loss_of(jpeft.combine(graphdef, t, frozen), rows(task)))(trainable)
    tx = optax.sgd(0.5)
    state, metrics = make_step(graphdef, SUMS[task], tx)(begin(tx, trainable), frozen, split(rows(task), 1), None)
    np.testing.assert_allclose(metrics.loss, loss, rtol=REORDERED)
    norm = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in slope.values()))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    for path, value in trainable.items():
        np.testing.assert_allclose(state.trainable[path], value - 0.5 * slope[path], atol=REORDERED, err_msg=path)


def test_the_base_is_neither_changed_nor_given_away(bert):
    graphdef, trainable, frozen = parts(bert, "SEQ_CLS")
    before = {path: np.asarray(value) for path, value in {**frozen, **trainable}.items()}
    tx = optax.adam(1e-2)
    update, state = make_step(graphdef, SUMS["SEQ_CLS"], tx), begin(tx, trainable)
    for _ in range(2):
        state, _ = update(state, frozen, split(rows("SEQ_CLS"), 1), jax.random.key(0))
    for path, value in before.items():  # readable, so not donated
        np.testing.assert_array_equal({**frozen, **trainable}[path], value)


def test_each_shape_is_compiled_once(bert):
    graphdef, trainable, frozen = parts(bert, "SEQ_CLS")
    tx = optax.adam(1e-2)
    update, state = make_step(graphdef, SUMS["SEQ_CLS"], tx), begin(tx, trainable)
    batch = split(rows("SEQ_CLS"), 1)
    narrow = {name: value[..., :8] if value.ndim == 3 else value for name, value in batch.items()}
    for one in (batch, narrow, batch, narrow):
        state, _ = update(state, frozen, one, None)
    assert update.num_compiled == 2
    assert update.compile_seconds > 0


def test_dropout_is_another_in_each_update_and_micro_batch(bert):
    graphdef, trainable, frozen = parts(bert, "SEQ_CLS", dropout=0.5)
    tx = optax.sgd(0.0)
    update, state = make_step(graphdef, SUMS["SEQ_CLS"], tx), begin(tx, trainable)
    same = {name: jnp.stack([value, value]) for name, value in rows("SEQ_CLS").items()}
    one = {name: value[:1] for name, value in same.items()}
    losses = []
    for batch in (one, one, same):
        state, metrics = update(state, frozen, batch, jax.random.key(0))
        losses.append(float(metrics.loss))
    _, metrics = update(begin(tx, trainable), frozen, one, jax.random.key(0))
    assert float(metrics.loss) == losses[0]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_nothing_is_updated_from_a_value_that_is_not_finite_on(bert, broken):
    graphdef, trainable, frozen = parts(bert, "SEQ_CLS")
    tx = optax.adam(1e-2)

    def sums(model, batch, key, groups):
        total, count = SUMS["SEQ_CLS"](model, batch, key, groups)
        bad = batch["input_ids"][0, 0] == 1
        if broken == "loss":
            return jnp.where(bad, jnp.nan, total), count
        return total + jnp.where(bad, jnp.inf, 0.0) * (total - jax.lax.stop_gradient(total)), count

    update, state = make_step(graphdef, sums, tx), begin(tx, trainable)
    good = split(rows("SEQ_CLS"), 1)
    bad = {**good, "input_ids": good["input_ids"].at[0, 0, 0].set(1)}
    state, _ = update(state, frozen, good, None)
    kept = jax.tree.map(np.asarray, state)
    for batch in (bad, good):  # a good batch afterwards changes nothing either
        state, metrics = update(state, frozen, batch, None)
        assert bool(state.failed)
        assert int(state.updates) == 1
        jax.tree.map(np.testing.assert_array_equal, state._replace(failed=False), kept._replace(failed=False))
    assert np.isfinite(metrics.loss)


def test_clipping_is_by_the_norm_of_all_that_is_trained(bert):
    graphdef, trainable, frozen = parts(bert, "SEQ_CLS")
    batch = rows("SEQ_CLS")
    slope = jax.grad(lambda t: cls_loss(jpeft.combine(graphdef, t, frozen), batch))(trainable)
    norm = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in slope.values()))
    tx = optax.chain(optax.clip_by_global_norm(norm / 4), optax.sgd(1.0))
    state, metrics = make_step(graphdef, SUMS["SEQ_CLS"], tx)(begin(tx, trainable), frozen, split(batch, 1), None)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)  # measured before it is cut
    for path, value in trainable.items():
        np.testing.assert_allclose(state.trainable[path], value - slope[path] / 4, atol=REORDERED, err_msg=path)


# --------------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.13])
def test_the_learning_rate_is_transformers_own(name, warmup):
    import math

    import torch
    from transformers import get_scheduler

    names = {"constant": "constant_with_warmup"}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    theirs = get_scheduler(names.get(name, name), optimizer, math.ceil(warmup * 40), 40)
    ours = schedule(config.Optimizer(lr=3e-3, schedule=name, warmup=warmup), 40)
    for update in range(40):
        np.testing.assert_allclose(ours(update), theirs.get_last_lr()[0], rtol=1e-6, atol=1e-10)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_optimizer_is_torchs_adamw(ratio, clip):
    """Five updates; B at a rate of its own under LoRA+; biases without decay; clipping over all of it."""
    import torch

    options = config.Optimizer(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), clip=clip, lora_plus_ratio=ratio)
    rng = np.random.default_rng(0)
    shapes = {"q/adapters/lora/A": (4, 2), "q/adapters/lora/B": (2, 4), "head/adapters/lora/saved/bias": (3,)}
    values = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in values.items()}

    def group(path):
        return {
            "params": [theirs[path]],
            "lr": 1e-2 * (ratio if path.endswith("/B") else 1.0),
            "weight_decay": 0.0 if path.endswith("bias") else 0.1,
        }

    optimizer = torch.optim.AdamW([group(path) for path in shapes], betas=(0.8, 0.95))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / 5)

    tx = make_optimizer(options, 5)
    ours: Any = {path: jnp.asarray(value) for path, value in values.items()}
    state = tx.init(ours)
    for _ in range(5):
        slopes = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
        changes, state = tx.update({path: jnp.asarray(g) for path, g in slopes.items()}, state, ours)
        ours = optax.apply_updates(ours, changes)
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(slopes[path])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        optimizer.step()
        decay.step()
    for path, parameter in theirs.items():
        np.testing.assert_allclose(ours[path], parameter.detach().numpy(), atol=2e-6, err_msg=path)


def test_an_empty_adapter_is_not_optimized():
    with pytest.raises(ValueError, match="nothing to train"):
        jpeft.optimizer(make_optimizer(config.Optimizer(), 5)).init({})
