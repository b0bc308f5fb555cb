# SPDX-License-Identifier: Apache-2.0
"""The losses against a float64 formula and against transformers' own, value and gradient."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.train._head import IGNORED, head_nll, nll
from jpeft.train.losses import cls_loss, lm_loss, lm_sums, next_tokens, qa_loss, token_cls_loss

#: A mean of float32 logsumexps over a few hundred classes.
LOSS = 2e-6
#: Its gradient, relative to the largest entry.
GRADIENT = 5e-6
BATCH, SEQ, D_MODEL, VOCAB = 4, 9, 16, 37

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": D_MODEL,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    "hidden_act": "silu", "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def formula(logits, targets):
    """Sum of -log softmax(logits)[target] in float64, over the targets that count, and its slope."""
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    shifted = logits - logits.max(-1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    counts = targets != IGNORED
    onehot = np.arange(logits.shape[-1]) == np.where(counts, targets, 0)[..., None]
    return -np.log(p[onehot & counts[..., None]]).sum(), (p - onehot) * counts[..., None]


def positions(seed=0, share=0.5):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((BATCH, SEQ, D_MODEL)).astype(np.float32)
    kernel = rng.standard_normal((D_MODEL, VOCAB)).astype(np.float32)
    targets = np.where(rng.random((BATCH, SEQ)) < share, rng.integers(0, VOCAB, (BATCH, SEQ)), IGNORED)
    return jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(targets, jnp.int32)


class Foreign(nnx.Module):
    """A language model that knows neither `hidden` nor `logits`."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D_MODEL, rngs=rngs)
        self.out = nnx.Linear(D_MODEL, VOCAB, rngs=rngs)

    def __call__(self, ids, mask):
        return self.out(jnp.tanh(self.embed(ids) * mask[..., None]))


def llama(task="CAUSAL_LM", **changes):
    model = jpeft.models.build({**LLAMA, **changes}, task, key=jax.random.key(0))
    model = jpeft.adapt(model, jpeft.LoRA(rank=3, alpha=5, targets=["q_proj", "embed_tokens"]), key=jax.random.key(1))
    graphdef, trainable, frozen = jpeft.partition(model)
    rng = np.random.default_rng(1)
    filled = {p: v + jnp.asarray(0.3 * rng.standard_normal(v.shape), v.dtype) for p, v in trainable.items()}
    return graphdef, filled, frozen


def batch(seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCAB, (BATCH, SEQ))
    mask = np.arange(SEQ) < np.array([9, 6, 3, 1])[:, None]
    labels = np.where(mask & (rng.random((BATCH, SEQ)) < 0.7), ids, IGNORED)
    return {
        k: jnp.asarray(v, jnp.int32) for k, v in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()
    }


# ------------------------------------------------------------------------------------------- the head, chunk by chunk


def chunked(hidden, kernel, targets):
    """Loss by chunks of four positions."""
    return head_nll(lambda x: x @ kernel, hidden, targets, chunk_logits=4 * VOCAB)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_head_nll_is_the_formula(chunk, groups):
    hidden, kernel, targets = positions()
    got, slopes = jax.value_and_grad(
        lambda h, k: head_nll(lambda x: x @ k, h, targets, groups=groups, chunk_logits=chunk * VOCAB * groups), (0, 1)
    )(hidden, kernel)
    loss, slope = formula(np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64), targets)
    np.testing.assert_allclose(got, loss, rtol=LOSS)
    for mine, expected in zip(
        slopes,
        (slope @ np.asarray(kernel).T, np.einsum("btd,btv->dv", np.asarray(hidden, np.float64), slope)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, expected, atol=GRADIENT * np.abs(expected).max())


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_head_nll_with_few_and_with_all_labels(share):
    hidden, kernel, targets = positions(share=share)
    loss, slope = formula(np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64), targets)
    got, mine = jax.jit(jax.value_and_grad(chunked))(hidden, kernel, targets)
    expected = slope @ np.asarray(kernel).T
    np.testing.assert_allclose(got, loss, rtol=LOSS)
    np.testing.assert_allclose(mine, expected, atol=GRADIENT * max(np.abs(expected).max(), 1e-9))


def test_a_frozen_kernel_gets_no_gradient():
    """No array of the kernel's shape is carried from chunk to chunk, unless its gradient is asked for."""
    hidden, kernel, targets = positions()
    carried = f"f32[{D_MODEL},{VOCAB}] = add"
    assert carried not in str(jax.make_jaxpr(jax.grad(chunked))(hidden, kernel, targets))
    assert carried in str(jax.make_jaxpr(jax.grad(chunked, (0, 1)))(hidden, kernel, targets))


def test_no_array_of_all_logits_is_made():
    program = str(jax.make_jaxpr(jax.value_and_grad(chunked))(*positions()))
    shapes = [[int(n) for n in dims.split(",")] for dims in re.findall(r"\[(\d+(?:,\d+)+)\]", program)]
    logits = [math.prod(shape) for shape in shapes if shape[-1] == VOCAB and shape != [D_MODEL, VOCAB]]
    assert max(logits) == 4 * VOCAB


def test_head_nll_under_vmap_over_heads():
    hidden, kernel, targets = positions()
    kernels = jnp.stack([kernel, 2 * kernel, -kernel])
    slopes = jax.vmap(jax.grad(chunked, 1), (None, 0, None))(hidden, kernels, targets)
    for kernel, mine in zip(kernels, slopes, strict=True):
        _, slope = formula(np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64), targets)
        expected = np.einsum("btd,btv->dv", np.asarray(hidden, np.float64), slope)
        np.testing.assert_allclose(mine, expected, atol=GRADIENT * np.abs(expected).max())


def test_head_nll_inside_checkpoint_and_scan():
    hidden, kernel, targets = positions()

    def total(k):
        body = jax.checkpoint(lambda h: chunked(h, k, targets))
        return jax.lax.scan(lambda c, h: (c + body(h), None), 0.0, jnp.stack([hidden, hidden]))[0]

    _, slope = formula(np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64), targets)
    expected = 2 * np.einsum("btd,btv->dv", np.asarray(hidden, np.float64), slope)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(kernel), expected, atol=GRADIENT * np.abs(expected).max())


def test_a_gradient_of_a_gradient():
    """Reverse over reverse: the Hessian's product with a direction, against a float64 difference of gradients."""
    hidden, kernel, targets = positions()
    direction = jnp.asarray(np.random.default_rng(3).standard_normal(hidden.shape), jnp.float32)
    got = jax.grad(lambda h: (jax.grad(chunked)(h, kernel, targets) * direction).sum())(hidden)

    def slope(h):
        return formula(h @ np.asarray(kernel, np.float64), targets)[1] @ np.asarray(kernel, np.float64).T

    h, d, step = np.asarray(hidden, np.float64), np.asarray(direction, np.float64), 1e-5
    expected = (slope(h + step * d) - slope(h - step * d)) / (2 * step)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_bfloat16_states_keep_a_float32_loss():
    hidden, kernel, targets = positions(share=1.0)
    got, slope = jax.value_and_grad(lambda h: head_nll(lambda x: x @ kernel.astype(h.dtype), h, targets))(
        hidden.astype(jnp.bfloat16)
    )
    assert got.dtype == jnp.float32
    assert slope.dtype == jnp.bfloat16
    rounded = [np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32), np.float64) for x in (hidden, kernel)]
    expected, _ = formula(rounded[0] @ rounded[1], targets)
    np.testing.assert_allclose(got, expected, rtol=4e-3)  # logits rounded to 8 bits


# ----------------------------------------------------------------------------------------------------- language models


@pytest.mark.parametrize("tied", [True, False])
def test_lm_loss_is_transformers_own(tied):
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    graphdef, trainable, frozen = llama(tie_word_embeddings=tied)
    data = batch()
    logits = jpeft.combine(graphdef, trainable, frozen)(data["input_ids"], data["attention_mask"])
    expected = ForCausalLMLoss(torch.tensor(np.asarray(logits)), torch.tensor(np.asarray(data["labels"])).long(), VOCAB)
    got = lm_loss(jpeft.combine(graphdef, trainable, frozen), data)
    np.testing.assert_allclose(got, float(expected), rtol=LOSS)


def test_lm_loss_has_the_gradient_of_the_plain_formula():
    """Adapters below the head and on the tied embedding, which is the head as well."""
    graphdef, trainable, frozen = llama()
    data = batch()

    def plain(trainable):
        logits = jpeft.combine(graphdef, trainable, frozen)(data["input_ids"], data["attention_mask"])[:, :-1]
        labels = data["labels"][:, 1:]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)[..., 0]
        return -jnp.where(labels == IGNORED, 0, chosen).sum() / (labels != IGNORED).sum()

    expected = jax.grad(plain)(trainable)
    got = jax.grad(lambda t: lm_loss(jpeft.combine(graphdef, t, frozen), data))(trainable)
    for path, value in expected.items():
        assert np.abs(value).max() > 0, path
        np.testing.assert_allclose(got[path], value, atol=GRADIENT * np.abs(value).max(), err_msg=path)


def test_a_foreign_models_loss_is_the_formula():
    model, data = Foreign(nnx.Rngs(0)), batch()
    loss, _ = formula(model(data["input_ids"], data["attention_mask"])[:, :-1], data["labels"][:, 1:])
    count = (np.asarray(data["labels"])[:, 1:] != IGNORED).sum()
    np.testing.assert_allclose(lm_loss(model, data), loss / count, rtol=LOSS)


def test_no_label_crosses_from_one_packed_example_to_the_next():
    data = {"labels": jnp.arange(8)[None], "segment_ids": jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 3]])}
    assert next_tokens(data).tolist() == [[1, 2, IGNORED, 4, IGNORED, 6, 7, IGNORED]]


def test_a_padded_row_and_column_change_nothing():
    graphdef, trainable, frozen = llama()
    model, data = jpeft.combine(graphdef, trainable, frozen), batch()
    wide = {k: jnp.pad(v, ((0, 1), (0, 3)), constant_values=IGNORED if k == "labels" else 0) for k, v in data.items()}
    wide["attention_mask"] = wide["attention_mask"].at[-1, 0].set(1)
    np.testing.assert_allclose(lm_loss(model, wide), lm_loss(model, data), rtol=LOSS)


def test_sums_are_the_mean_times_the_labels():
    graphdef, trainable, frozen = llama()
    model, data = jpeft.combine(graphdef, trainable, frozen), batch()
    total, count = lm_sums(model, data)
    assert int(count) == (np.asarray(data["labels"])[:, 1:] != IGNORED).sum()
    np.testing.assert_allclose(total / count, lm_loss(model, data), rtol=LOSS)


def test_dropout_follows_the_key():
    graphdef, trainable, frozen = llama(attention_dropout=0.5)
    model, data = jpeft.combine(graphdef, trainable, frozen), batch()
    one, same, other, none = (
        lm_loss(model, data, k) for k in (jax.random.key(0), jax.random.key(0), jax.random.key(1), None)
    )
    assert one == same
    assert len({float(one), float(other), float(none)}) == 3


# ------------------------------------------------------------------------------------------------------ other tasks


class Fixed(nnx.Module):
    """Gives the logits that it was made with, which are trained."""

    def __init__(self, logits):
        self.value = nnx.Param(jnp.asarray(logits, jnp.float32))

    def __call__(self, ids, mask):
        return self.value[...]


@pytest.mark.parametrize("case", ["cls", "token_cls", "qa"])
def test_the_other_losses_are_torchs(case):
    import torch

    rng = np.random.default_rng(0)
    shapes = {"cls": ((5, 3), (5,)), "token_cls": ((5, 7, 3), (5, 7)), "qa": ((5, 7, 2), (5, 2))}
    shape, label_shape = shapes[case]
    logits = rng.standard_normal(shape)
    classes = 7 if case == "qa" else 3
    labels = np.where(rng.random(label_shape) < 0.3, IGNORED, rng.integers(0, classes, label_shape))
    data = {"input_ids": None, "attention_mask": None, "labels": jnp.asarray(labels, jnp.int32)}
    got = {"cls": cls_loss, "token_cls": token_cls_loss, "qa": qa_loss}[case](Fixed(logits), data)
    scores = torch.tensor(logits).transpose(1, 2) if case == "qa" else torch.tensor(logits)
    expected = torch.nn.functional.cross_entropy(scores.reshape(-1, classes), torch.tensor(labels).reshape(-1).long())
    np.testing.assert_allclose(got, float(expected), rtol=LOSS)


def test_a_real_classifiers_loss():
    graphdef, trainable, frozen = llama("SEQ_CLS", pad_token_id=0)
    model, data = jpeft.combine(graphdef, trainable, frozen), batch()
    data["labels"] = jnp.asarray([1, IGNORED, 0, 1])
    loss, _ = formula(model(data["input_ids"], data["attention_mask"]), data["labels"])
    np.testing.assert_allclose(cls_loss(model, data), loss / 3, rtol=LOSS)


@pytest.mark.parametrize("loss", [lm_loss, cls_loss, token_cls_loss])
def test_a_batch_without_one_label_that_counts_is_refused(loss):
    data = batch()
    data["labels"] = jnp.full_like(data["labels"], IGNORED)
    with pytest.raises(ValueError, match=r"none of the 36 labels counts.*trains nothing"):
        loss(Foreign(nnx.Rngs(0)), data)


def test_the_first_token_alone_is_no_label_for_a_language_model():
    data = batch()
    data["labels"] = jnp.full_like(data["labels"], IGNORED).at[:, 0].set(1)
    with pytest.raises(ValueError, match="trains nothing"):
        lm_loss(Foreign(nnx.Rngs(0)), data)


def test_one_class_is_no_classification():
    data = {"input_ids": None, "attention_mask": None, "labels": jnp.zeros(4, jnp.int32)}
    with pytest.raises(ValueError, match=r"at least 2 labels; the model's head gives 1"):
        cls_loss(Fixed(np.zeros((4, 1))), data)


def test_nll_of_huge_logits_is_finite():
    logits = jnp.asarray([[1e4, -1e4, 0.0]])
    np.testing.assert_allclose(nll(logits, jnp.asarray([1])), 2e4)
