# SPDX-License-Identifier: Apache-2.0
"""What training alone adds: label smoothing, z-loss, NEFTune and the moving average, each against its formula."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jpeft
from jpeft._scope import scope
from jpeft.seams import InputEmbedding
from jpeft.train import config
from jpeft.train._head import IGNORED, Terms, head_nll, nll
from jpeft.train.losses import SUMS
from jpeft.train.objective import objective
from jpeft.train.step import begin, make_step

TERMS = Terms(0.1, 1e-2)


def positions(seed=0):
    """Hidden states, kernel and targets, of which half count."""
    rng = np.random.default_rng(seed)
    hidden, kernel = rng.standard_normal((2, 7, 5)), rng.standard_normal((5, 11))
    targets = np.where(rng.random((2, 7)) < 0.5, rng.integers(0, 11, (2, 7)), IGNORED)
    return hidden.astype(np.float32), kernel.astype(np.float32), targets


def formula(hidden, kernel, targets, smoothing, z):
    """In float64, by torch's cross-entropy, with its gradients."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, kernel)]
    logits, labels = (leaves[0] @ leaves[1]).reshape(-1, kernel.shape[1]), torch.tensor(targets).reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    loss = loss + z * (torch.logsumexp(logits, -1) ** 2)[labels != IGNORED].sum()
    loss.backward()
    return loss.item(), [leaf.grad.numpy() for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("terms", [TERMS, Terms(0.3), Terms(z=0.1)])
@pytest.mark.parametrize("chunk_logits", [22, 10**6])
def test_smoothing_and_z_loss_are_the_formula(terms, chunk_logits):
    hidden, kernel, targets = positions()

    def chunked(hidden, kernel):
        return head_nll(lambda h: h @ kernel, hidden, jnp.asarray(targets), terms=terms, chunk_logits=chunk_logits)

    def plain(hidden, kernel):
        return nll(hidden @ kernel, jnp.asarray(targets), terms)

    expected, slopes = formula(hidden, kernel, targets, *terms)
    for loss in (chunked, plain):
        value, got = jax.value_and_grad(loss, (0, 1))(jnp.asarray(hidden), jnp.asarray(kernel))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for one, other in zip(got, slopes, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_smoothing_is_transformers_label_smoother():
    from transformers.trainer_pt_utils import LabelSmoother

    hidden, kernel, targets = positions(1)
    logits = hidden @ kernel
    theirs = LabelSmoother(epsilon=0.1)({"logits": torch.tensor(logits)}, torch.tensor(targets))
    ours = nll(jnp.asarray(logits), jnp.asarray(targets), Terms(0.1)) / (targets != IGNORED).sum()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)


def test_with_smoothing_no_logits_are_made_where_no_label_is():
    hidden, kernel, _ = positions()
    calls = []

    def head(h):
        jax.debug.callback(lambda: calls.append(1))
        return h @ kernel

    targets = np.full((2, 7), IGNORED)
    targets[1, 3] = 4
    head_nll(head, jnp.asarray(hidden), jnp.asarray(targets), terms=TERMS, chunk_logits=22).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 1  # of 7 chunks


# -------------------------------------------------------------------------------------------------------------- NEFTune


def test_noise_is_uniform_by_the_real_length():
    seam = InputEmbedding(64, "decoder", causal=True)
    lengths = np.array([30, 7])
    mask = jnp.asarray(np.arange(30) < lengths[:, None])
    with scope(noise=5.0, key=jax.random.key(0)):
        noise, *_ = seam(jnp.zeros((2, 30, 64)), None, mask, None)
        again, *_ = seam(jnp.zeros((2, 30, 64)), None, mask, None)
    np.testing.assert_array_equal(noise, again)
    for row, length in zip(np.asarray(noise), lengths, strict=True):
        size = 5.0 / np.sqrt(length * 64)
        assert np.abs(row).max() <= size
        np.testing.assert_allclose(row.std(), size / np.sqrt(3), rtol=0.05)
        np.testing.assert_allclose(row.mean(), 0, atol=size / 20)


def test_packed_examples_have_the_noise_of_their_own_lengths():
    seam = InputEmbedding(8, "decoder", causal=True)
    segments = jnp.asarray([[1] * 5 + [2] * 20 + [0] * 3, [4] * 28])
    with scope(noise=5.0, key=jax.random.key(0)):
        noise, *_ = seam(jnp.zeros((2, 28, 8)), None, None, segments)
        whole, *_ = seam(jnp.zeros((2, 28, 8)), None, None, None)
    np.testing.assert_allclose(noise[0, :5], whole[0, :5] * np.sqrt(28 / 5), rtol=1e-5)
    np.testing.assert_allclose(noise[0, 5:25], whole[0, 5:25] * np.sqrt(28 / 20), rtol=1e-5)
    np.testing.assert_array_equal(noise[1], whole[1])


def loaded(folder, task):
    return jpeft.models.load(folder, task, num_labels=2 if task == "SEQ_CLS" else None)


def parsed(tree, **train):
    return config.parse({**tree, "train": {**tree["train"], **train}})


@pytest.mark.parametrize("task", ["classify", pytest.param("generate", marks=pytest.mark.slow)])
def test_noise_is_in_training_only(task, request):
    tree = request.getfixturevalue(task)
    options = parsed(tree, neftune=15.0)
    model = loaded(options.model.path, options.model.task)
    ids = jnp.asarray(np.random.default_rng(0).integers(4, 18, (3, 9)))
    labels = jnp.asarray([0, 1, 1]) if options.model.task == "SEQ_CLS" else ids
    batch, key = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": labels}, jax.random.key(0)
    noisy, plain = objective(options)[0], SUMS[options.model.task]
    np.testing.assert_array_equal(noisy(model, batch)[0], plain(model, batch)[0])
    assert noisy(model, batch, key)[0] != plain(model, batch, key)[0]
    assert noisy(model, batch, key)[0] == noisy(model, batch, key)[0]


# ------------------------------------------------------------------------------------------------ moving average, steps


def parts(folder, task):
    model = loaded(folder, task)
    return jpeft.partition(jpeft.adapt(model, jpeft.LoRA(rank=2), key=jax.random.key(1)))


def rows(task, count=4):
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(4, 18, (count, 12)), np.arange(12) < rng.integers(3, 13, (count, 1))
    labels = rng.integers(0, 2, count) if task == "SEQ_CLS" else np.where(mask, ids, IGNORED)
    arrays: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": labels}
    return {name: jnp.asarray(value) for name, value in arrays.items()}


def test_the_average_is_the_formula(bert):
    graphdef, trainable, frozen = parts(bert, "SEQ_CLS")
    tx, batch = optax.adam(1e-2), {name: value[None] for name, value in rows("SEQ_CLS").items()}
    update, state = make_step(graphdef, SUMS["SEQ_CLS"], tx, ema=0.3), begin(tx, trainable, average=True)
    expected = {path: np.asarray(leaf, np.float64) for path, leaf in trainable.items()}
    for n in range(1, 6):
        state, _ = update(state, frozen, batch, None)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = {p: decay * mean + (1 - decay) * np.asarray(state.trainable[p]) for p, mean in expected.items()}
    for path, mean in expected.items():
        np.testing.assert_allclose(state.served[path], mean, atol=1e-6, err_msg=path)
    assert any((np.asarray(state.served[p]) != np.asarray(state.trainable[p])).any() for p in trainable)


def test_a_step_and_a_state_that_differ_on_the_average_are_an_error(bert):
    graphdef, trainable, frozen = parts(bert, "SEQ_CLS")
    tx, batch = optax.sgd(1e-2), {name: value[None] for name, value in rows("SEQ_CLS").items()}
    with pytest.raises(ValueError, match=r"the step's ema is 0\.9, and the state has no average"):
        make_step(graphdef, SUMS["SEQ_CLS"], tx, ema=0.9)(begin(tx, trainable), frozen, batch, None)


@pytest.mark.parametrize("task", ["classify", pytest.param("generate", marks=pytest.mark.slow)])
def test_with_all_additions_two_batches_are_one_of_twice_the_rows(task, request):
    options = parsed(request.getfixturevalue(task), label_smoothing=0.1, z_loss=1e-2)
    name = options.model.task
    graphdef, trainable, frozen = parts(options.model.path, name)
    tx, batch, after = optax.sgd(1.0), rows(name), []
    for count in (1, 2):
        update, state = make_step(graphdef, objective(options)[0], tx), begin(tx, trainable)
        split = {key: value.reshape(count, -1, *value.shape[1:]) for key, value in batch.items()}
        after.append(update(state, frozen, split, None)[0].trainable)
    for path in trainable:
        np.testing.assert_allclose(after[0][path], after[1][path], atol=1e-6, err_msg=path)


def test_a_run_saves_and_evaluates_the_average(classify):
    from safetensors.numpy import load_file

    from jpeft.train import loop

    result = loop.train(parsed(classify, ema=0.9))
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert result.state.average is not None
    path = "layers/attention/self/query/adapters/lora/A"
    ours = saved["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"]
    np.testing.assert_array_equal(ours, np.asarray(result.state.average[path][0]).T)
    assert (ours != np.asarray(result.state.trainable[path][0]).T).any()


@pytest.mark.parametrize(
    "train, said",
    [
        ({"ema": 1.0}, r"train.ema must be in \[0, 1\)"),
        ({"label_smoothing": 1.5}, "train.label_smoothing must be in"),
        ({"z_loss": -1.0}, "train.z_loss must not be negative, got -1.0"),
        ({"neftune": 5.0, "dropout": False}, "train.neftune needs train.dropout=true"),
    ],
)
def test_what_cannot_be_is_refused(classify, train, said):
    with pytest.raises(config.ConfigError, match=said):
        parsed(classify, **train)


def test_no_average_beside_adalora(classify):
    tree = {**classify, "method": {"kind": "adalora", "total_steps": 10}}
    with pytest.raises(config.ConfigError, match=r"train.ema is not for method.kind=adalora"):
        parsed(tree, ema=0.9)


def test_every_addition_is_off_by_default():
    assert dataclasses.asdict(config.Train(epochs=1)).items() >= {
        "ema": None, "label_smoothing": 0.0, "z_loss": 0.0, "neftune": 0.0,
    }.items()  # fmt: skip
