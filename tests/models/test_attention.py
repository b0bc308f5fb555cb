# SPDX-License-Identifier: Apache-2.0
"""Attention against torch in float64 (softmax and its gradients by autograd), with every kind of mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import test_util

from jpeft import _scope
from jpeft.models import _attention
from jpeft.models._attention import attention
from jpeft.models._visibility import Rules

#: float32 against float64: sums of up to 300 terms of unit size.
ATOL = 5e-6
#: bfloat16 keeps 8 bits; probabilities and the output are rounded to it.
BF16_ATOL = 0.02

PADDED = np.ones((2, 150), int)
PADDED[0, 100:] = 0
PADDED[1, :70] = 0
SEGMENTS = np.repeat(np.array([[1, 2, 3], [1, 1, 2]]), 50, axis=1)

#: name -> (seq, keys, heads, kv_heads, what attention is told)
CASES = {
    "whole": (150, 150, 3, 3, {"causal": False}),
    "causal": (150, 150, 3, 3, {"causal": True}),
    "one block": (64, 64, 2, 2, {"causal": True}),
    "one row": (1, 1, 2, 2, {"causal": True}),
    "groups": (150, 150, 6, 2, {"causal": True}),
    "one key head": (70, 70, 4, 1, {"causal": False}),
    "window": (150, 150, 4, 2, {"causal": True, "window": 20}),
    "window of one": (70, 70, 2, 2, {"causal": True, "window": 1}),
    "wide window": (150, 150, 2, 2, {"causal": True, "window": 100}),
    "window beyond": (70, 70, 2, 2, {"causal": True, "window": 700}),
    "padding": (150, 150, 4, 2, {"causal": False, "mask": PADDED}),
    "causal padding": (150, 150, 4, 2, {"causal": True, "mask": PADDED}),
    "segments": (150, 150, 4, 2, {"causal": True, "segment_ids": SEGMENTS}),
    "segments both ways": (150, 150, 4, 4, {"causal": False, "segment_ids": SEGMENTS}),
    "everything": (150, 150, 4, 2, {"causal": True, "segment_ids": SEGMENTS, "mask": PADDED, "window": 33}),
    "prefix": (70, 75, 4, 2, {"causal": True}),
    "prefix, window": (70, 75, 4, 2, {"causal": True, "window": 9}),
    "prefix, segments": (150, 157, 4, 2, {"causal": True, "segment_ids": SEGMENTS}),
    "few keys": (150, 20, 4, 2, {"causal": False}),
}


def inputs(seq, keys, heads, kv_heads, batch=2, d_head=10, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(seq, heads), (keys, kv_heads), (keys, kv_heads), (seq, heads)]
    return [rng.standard_normal((batch, *shape, d_head)).astype(dtype) for shape in shapes]


def on_device(*sizes, **told):
    """`inputs` as a model has them: arrays of JAX, where no transformation makes them so."""
    return [jnp.asarray(x) for x in inputs(*sizes, **told)]


def visible(seq, keys, causal, window=None, mask=None, segment_ids=None):
    """[batch, seq, keys] by its definition, one condition after the other."""
    query, key = np.arange(seq)[:, None] + keys - seq, np.arange(keys)
    seen = np.ones((2, seq, keys), bool)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= (key > query - int(window)) | (key < keys - seq)
    if mask is not None:
        seen &= mask[:, None] != 0
    if segment_ids is not None:
        extra = keys - seq
        own = np.concatenate([np.full((2, extra), -1), segment_ids], 1)[:, None]
        seen &= (segment_ids[:, :, None] == own) | (key < extra)
    return seen


def oracle(q, k, v, g, scale, seen, bias=None, cap=None):
    """Output and gradients in float64; a row that sees nothing is 0."""
    q, k, v, g = (torch.tensor(x, dtype=torch.float64) for x in (q, k, v, g))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    bias = torch.tensor(0.0 if bias is None else bias, dtype=torch.float64).requires_grad_()
    wide = [x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v)]
    seen = torch.tensor(seen)[:, None]
    s = torch.einsum("bqhd,bkhd->bhqk", q, wide[0]) * scale
    s = s if cap is None else cap * torch.tanh(s / cap)
    covered = bias.shape[-1] if bias.ndim else k.shape[1]
    s = s + torch.nn.functional.pad(bias.expand(*s.shape[:3], covered), (k.shape[1] - covered, 0))
    s = s.masked_fill(~seen, -1e30)
    p = torch.softmax(s, -1) * seen
    y = torch.einsum("bhqk,bkhd->bqhd", p, wide[1])
    y.backward(g)
    found = (y, q.grad, k.grad, v.grad, bias.grad)
    return [x.detach().numpy() for x in found[: 5 if bias.ndim else 4]]


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(attend, q, k, v, g, *bias):
    y, pull = jax.vjp(attend, q, k, v, *bias)
    return [y, *pull(g)]


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_the_formula(name):
    *sizes, told = CASES[name]
    q, k, v, g = inputs(*sizes)
    expected = oracle(q, k, v, g, 0.3, visible(*sizes[:2], **told))
    found = output_and_gradients(functools.partial(attention, scale=0.3, **told), q, k, v, g)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("name", CASES)
def test_the_path_for_accelerators_is_the_formula(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    *sizes, told = CASES[name]
    q, k, v, g = inputs(*sizes)
    expected = oracle(q, k, v, g, 0.3, visible(*sizes[:2], **told))
    found = output_and_gradients(functools.partial(attention, scale=0.3, **told), q, k, v, g)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=ATOL, rtol=ATOL)


#: name -> (seq, keys, heads, kv_heads, examples that have a bias of their own, keys that it covers, what is told)
BIASED = {
    "both ways": (150, 150, 3, 3, 1, 150, {"causal": False, "mask": PADDED}),
    "causal": (150, 150, 2, 2, 1, 150, {"causal": True, "segment_ids": SEGMENTS}),
    "of each example": (70, 70, 2, 2, 2, 70, {"causal": False}),
    "groups, after a prefix": (70, 75, 4, 2, 1, 70, {"causal": True}),
    "few keys, covered in part": (70, 20, 2, 1, 2, 17, {"causal": False}),
}


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_and_its_gradient_are_the_formula(name, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    *sizes, rows, covered, told = BIASED[name]
    q, k, v, g = inputs(*sizes)
    bias = np.random.default_rng(1).standard_normal((rows, sizes[2], sizes[0], covered)).astype(np.float32)
    expected = oracle(q, k, v, g, 0.3, visible(*sizes[:2], **told), bias)

    def attend(q, k, v, bias):
        return attention(q, k, v, scale=0.3, bias=bias, **told)

    found = output_and_gradients(attend, q, k, v, g, bias)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_float32_bias_in_bfloat16(backend, monkeypatch):
    """It is added to the scores before they are rounded."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in inputs(70, 70, 2, 2))
    bias = np.random.default_rng(1).standard_normal((1, 2, 70, 70)).astype(np.float32)
    wide = (np.asarray(x, np.float32) for x in (q, k, v, g))
    expected = oracle(*wide, scale=0.3, seen=np.ones((2, 70, 70), bool), bias=bias)
    found = output_and_gradients(
        lambda q, k, v, b: attention(q, k, v, causal=False, scale=0.3, bias=b), q, k, v, g, bias
    )
    assert [x.dtype.name for x in found] == ["bfloat16"] * 4 + ["float32"]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=BF16_ATOL, rtol=BF16_ATOL)


def test_gradients_of_a_bias_under_dropout():
    q, k, v, g = on_device(12, 12, 2, 2)
    bias = np.random.default_rng(1).standard_normal((1, 2, 12, 12)).astype(np.float32)

    @jax.jit
    def attend(bias):
        with _scope.scope(key=jax.random.key(3)):
            return jnp.sum(attention(q, k, v, causal=True, scale=0.3, bias=bias, dropout=0.5) * g)

    test_util.check_grads(attend, (bias,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


CAPPED = {"causal": {"causal": True, "window": 33, "mask": PADDED}, "whole": {"causal": False, "mask": PADDED}}


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("name", CAPPED)
def test_a_cap_bounds_the_scores_before_the_bias(name, backend, monkeypatch):
    """Scores of 1.2 on average, bounded by 1.3; gradients with respect to the bias do not pass the bound."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    q, k, v, g = inputs(150, 150, 4, 2)
    bias = np.random.default_rng(1).standard_normal((1, 4, 150, 150)).astype(np.float32)
    expected = oracle(q, k, v, g, 0.5, visible(150, 150, **CAPPED[name]), bias, cap=1.3)

    def attend(q, k, v, bias):
        return attention(q, k, v, scale=0.5, cap=1.3, bias=bias, **CAPPED[name])

    for ours, theirs in zip(output_and_gradients(attend, q, k, v, g, bias), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=ATOL, rtol=ATOL)


def test_a_window_may_be_traced():
    q, k, v, g = inputs(150, 150, 4, 2)

    def run(window):
        return output_and_gradients(functools.partial(attention, causal=True, scale=0.3, window=window), q, k, v, g)

    for window in (1, 40, 2**31 - 1):
        expected = oracle(q, k, v, g, 0.3, visible(150, 150, True, window))
        for ours, theirs in zip(jax.jit(run)(jnp.int32(window)), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_rows_that_see_nothing_give_zero_and_pass_no_gradient(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    mask = np.array([[0] * 70, [0] * 30 + [1] * 40])
    q, k, v, g = inputs(70, 70, 4, 2)
    y, dq, dk, dv = output_and_gradients(functools.partial(attention, causal=True, scale=0.3, mask=mask), q, k, v, g)
    assert all(np.isfinite(x).all() for x in (y, dq, dk, dv))
    for x in (y, dq, dk, dv):
        assert not np.any(x[0])
        assert not np.any(x[1, :30])
        assert np.any(x[1, 30:])


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16(causal):
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in inputs(150, 150, 4, 2))
    seen = visible(150, 150, causal)
    expected = oracle(*(np.asarray(x, np.float32) for x in (q, k, v, g)), scale=0.3, seen=seen)
    found = output_and_gradients(functools.partial(attention, causal=causal, scale=0.3), q, k, v, g)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=BF16_ATOL, rtol=BF16_ATOL)


def test_it_works_under_vmap_scan_and_checkpoint():
    q, k, v, g = inputs(70, 70, 4, 2)
    qs = jnp.stack([q, 2 * q])

    def attend(q, k, v):
        return attention(q, k, v, causal=True, scale=0.3, mask=PADDED[:, 30:100])

    expected = [output_and_gradients(attend, q, k, v, g) for q in qs]
    body = jax.checkpoint(attend)
    mapped = jax.vmap(lambda q: output_and_gradients(body, q, k, v, g))(qs)
    _, scanned = jax.lax.scan(lambda _, q: (None, output_and_gradients(body, q, k, v, g)), None, qs)
    for i in range(2):
        for found in (mapped, scanned):
            for ours, theirs in zip(found, expected[i], strict=True):
                np.testing.assert_allclose(ours[i], theirs, atol=ATOL, rtol=ATOL)


def test_masked_keys_do_not_reach_the_output():
    """Not even as 0 times something: whatever stands in padding, the result is the same to the bit."""
    q, k, v, _ = on_device(150, 150, 4, 2)
    y = attention(q, k, v, causal=True, scale=0.3, mask=PADDED)
    dirty = jnp.where(PADDED[..., None, None] == 0, 1e4, v).astype(np.float32)
    np.testing.assert_array_equal(y, attention(q, k, dirty, causal=True, scale=0.3, mask=PADDED))


def test_nothing_of_size_seq_by_keys_is_kept_for_the_backward_pass():
    q, k, v, _ = inputs(400, 400, 4, 2)
    attend = functools.partial(attention, causal=True, scale=0.3, mask=np.ones((2, 400)))
    residuals = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], q, k, v))
    assert max(leaf.size for leaf in residuals) <= q.size


def test_a_long_causal_row_costs_little_more_than_half():
    """Blocks skip what causality and a window mask: counted in FLOPs of the compiled program."""
    q, k, v, _ = inputs(1024, 1024, 2, 2, batch=1)

    def flops(**told):
        attend = jax.jit(functools.partial(attention, scale=0.3, **told))
        return attend.lower(q, k, v).compile().cost_analysis()["flops"]  # type: ignore[index]

    full = flops(causal=False)
    assert flops(causal=True) < 0.6 * full
    assert flops(causal=True, window=64) < 0.15 * full


# Dropout --------------------------------------------------------------------------------------------------------------


def test_dropout_needs_a_key_and_repeats_with_it():
    q, k, v, _ = on_device(40, 40, 4, 2)
    attend = functools.partial(attention, q, k, v, causal=True, scale=0.3, dropout=0.4)
    plain = attention(q, k, v, causal=True, scale=0.3)
    np.testing.assert_array_equal(attend(), plain)
    with _scope.scope(key=jax.random.key(1)):
        first, second, other = attend(), attend(), attend(path="elsewhere")
        without = attention(q, k, v, causal=True, scale=0.3)
    np.testing.assert_array_equal(first, second)
    assert np.any(np.abs(first - plain) > 0.1)
    assert np.any(np.abs(first - other) > 0.1)
    np.testing.assert_array_equal(without, plain)


def test_dropout_keeps_the_mean_and_drops_whole_weights():
    q, k, _, _ = on_device(16, 16, 2, 1, d_head=16)
    mask = np.ones((2, 16))
    mask[:, 5] = 0
    rows = jnp.broadcast_to(jnp.eye(16, dtype=np.float32)[None, :, None], (2, 16, 1, 16))  # the output is the weights

    def weights(key, rate):
        with _scope.scope(key=key):
            return attention(q, k, rows, causal=True, scale=0.3, mask=mask, dropout=rate)

    kept = np.asarray(weights(None, 0.0))[None]
    many = np.asarray(jax.vmap(lambda key: weights(key, 0.25))(jax.random.split(jax.random.key(0), 2000)))
    ratio = many / np.where(kept == 0, 1, kept)
    assert np.all((ratio == 0) | (np.abs(ratio - 4 / 3) < 1e-5))
    # a mean of 2000 draws of 0 or 4/3 has a standard error of 0.013
    np.testing.assert_allclose(many.mean(0), kept[0], atol=0.06)


def test_gradients_under_dropout_are_those_of_the_dropped_weights():
    q, k, v, g = inputs(12, 12, 2, 2)

    @jax.jit
    def attend(q, k, v):
        with _scope.scope(key=jax.random.key(3)):
            return jnp.sum(attention(q, k, v, causal=True, scale=0.3, dropout=0.5) * g)

    test_util.check_grads(attend, (q, k, v), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_dropout_does_not_depend_on_the_blocks(monkeypatch):
    q, k, v, _ = inputs(40, 40, 4, 2)

    def run():
        def loss(q, k, v):
            return (attention(q, k, v, causal=True, scale=0.3, dropout=0.4) ** 2).sum()

        with _scope.scope(key=jax.random.key(7)):
            return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    whole = run()
    monkeypatch.setattr(_attention, "BLOCK_ROWS", 16)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, run())


def test_long_rows_have_no_more_blocks_than_the_program_has_room_for(monkeypatch):
    """Compile time would grow with the length; a block then has more rows, and computes the same."""
    for platform, least in {"cpu": _attention.BLOCK_ROWS, "tpu": _attention.WIDE_BLOCK_ROWS}.items():
        for seq in (1, 64, 4096, 4097, 10**8):
            assert -(-seq // _attention.block_rows(seq, platform)) <= _attention.MOST_BLOCKS
        assert _attention.block_rows(4096, platform) == least
    q, k, v, _ = inputs(100, 100, 4, 2)

    def run():
        return jax.jit(lambda *x: attention(*x, causal=True, scale=0.3, window=30))(q, k, v)

    expected = run()
    monkeypatch.setattr(_attention, "BLOCK_ROWS", 8)
    monkeypatch.setattr(_attention, "MOST_BLOCKS", 3)
    np.testing.assert_allclose(run(), expected, atol=1e-5)


def test_a_block_waits_for_the_one_before_it():
    """So that an accelerator's compiler has the scores of one block in memory, forward and backward."""
    q = jax.ShapeDtypeStruct((1, 4 * _attention.WIDE_BLOCK_ROWS, 2, 8), jnp.float32)

    def loss(q):
        return attention(q, q, q, causal=True, scale=0.3).sum()

    with _scope.scope(platform="tpu"):
        forward, both = (jax.jit(f).trace(q).lower(lowering_platforms=("tpu",)) for f in (loss, jax.grad(loss)))
    assert [program.as_text().count("optimization_barrier") for program in (forward, both)] == [3, 6]


# Errors ---------------------------------------------------------------------------------------------------------------


def test_wrong_shapes_and_settings_are_refused():
    q, k, v, _ = on_device(8, 8, 3, 2)
    with pytest.raises(ValueError, match=r"heads a multiple of kv_heads; got \(2, 8, 3, 10\)"):
        attention(q, k, v, causal=True, scale=1.0)
    q, k, v, _ = on_device(8, 5, 2, 2)
    with pytest.raises(ValueError, match="a causal query has a key of its own; got 8 queries and 5 keys"):
        attention(q, k, v, causal=True, scale=1.0)
    with pytest.raises(ValueError, match=r"a bias is \[batch or 1, heads, seq, keys\]; got \(1, 2, 8, 6\)"):
        attention(q, k, v, causal=False, scale=1.0, bias=jnp.zeros((1, 2, 8, 6), np.float32))
    with pytest.raises(ValueError, match="a window looks back from a causal query; got window=3 with causal=False"):
        attention(q, k, v, causal=False, window=3, scale=1.0)
    with pytest.raises(ValueError, match="segment_ids need a key for every query"):
        attention(q, k, v, causal=False, segment_ids=np.ones((2, 8), int), scale=1.0)


def test_blocks_cover_every_pair_that_is_visible():
    for seq, keys, causal, window in [
        (150, 150, True, None),
        (150, 160, True, 20),
        (64, 64, True, 1),
        (9, 4, False, None),
    ]:
        seen = visible(seq, keys, causal, window)[0]
        covered = np.zeros((seq, keys), bool)
        for queries, span in Rules(seq, keys, 1, 64, causal, window, 1.0, 0.0, None, False).blocks():
            covered[queries.start : queries.stop, span.start : span.stop] = True
        assert covered[seen].all()
