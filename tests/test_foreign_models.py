# SPDX-License-Identifier: Apache-2.0
"""LoRA on NNX modules that nobody wrote for jpeft, against NumPy formulas in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from flax import nnx

import jpeft

KEY = jax.random.key(0)
RANK, ALPHA = 2, 3.0  # unlike each other, so that a wrong scale shows
SCALE = ALPHA / RANK
RNG = np.random.default_rng(0)
NOISY = nnx.initializers.normal()  # biases that are not zero


class Dense(nnx.Module):
    """A projection of somebody's own; its kernel is stored transposed."""

    def __init__(self, d_in, d_out, rngs):
        self.w = nnx.Param(jax.random.normal(rngs(), (d_out, d_in)))

    def __call__(self, x):
        return x @ self.w[...].T


jpeft.register(Dense, jpeft.seams.Matmul(kernel="w", bias=None, equation="...i,oi->...o"))


class Tied(nnx.Module):
    """An embedding that is the output head too."""

    def __init__(self, vocab, d, rngs):
        self.embed = nnx.Embed(vocab, d, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.embed(ids)))


class SharedModule(nnx.Module):
    """One Linear at two places."""

    def __init__(self, d, rngs):
        self.first = nnx.Linear(d, d, rngs=rngs, bias_init=NOISY)
        self.second = self.first

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class WithState(nnx.Module):
    """Batch statistics and a PRNG stream beside the projections."""

    def __init__(self, d, rngs):
        self.up = nnx.Linear(d, d, rngs=rngs, bias_init=NOISY)
        self.norm = nnx.BatchNorm(d, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.norm.mean[...] += 0.3
        self.norm.var[...] += 0.7

    def __call__(self, x):
        return self.drop(self.norm(self.up(x)))


class ByKeyword(nnx.Module):
    """Calls its projection by the argument's name."""

    def __init__(self, d, rngs):
        self.up = nnx.Linear(d, d, rngs=rngs, bias_init=NOISY)

    def __call__(self, x):
        return self.up(inputs=x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its input, and the same model with LoRA in NumPy."""

    build: Callable[[nnx.Rngs], Any]
    x: np.ndarray
    oracle: Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]
    targets: Any = ".*"
    rank: int = RANK


def lora(flat, path=""):
    """(kernel, scale times A, B, bias or 0) of one module."""
    at = f"{path}/" if path else ""
    kernel = next(flat[at + name] for name in ("kernel", "embedding", "w") if at + name in flat)
    a, b = flat[f"{at}adapters/lora/A"], flat[f"{at}adapters/lora/B"]
    return kernel, SCALE * a, b, flat.get(at + "bias", 0.0)


def linear64(flat, x, path=""):
    w, a, b, bias = lora(flat, path)
    return x @ w + (x @ a) @ b + bias


def einsum64(equation, w_axes, order):
    """The kernel plus `A B`, reshaped by hand: `w_axes` are its axes with the inputs first, `order` its real ones."""

    def forward(flat, x):
        w, a, b, bias = lora(flat)
        sizes = dict(zip(order, w.shape, strict=True))
        delta = np.einsum(f"{w_axes}->{order}", (a @ b).reshape([sizes[c] for c in w_axes]))
        return np.einsum(equation, x, w + delta) + bias

    return forward


def conv64(pads, stride=1, dilation=1):
    """A convolution as the sum over its window, one shifted product per element."""

    def forward(flat, x):
        w, a, b, bias = lora(flat)
        w = w + (a @ b).reshape(w.shape)
        window, spatial = w.shape[:-2], x.shape[1:-1]
        x = np.pad(x, [(0, 0), *pads, (0, 0)])
        out = [
            (n + sum(p) - dilation * (k - 1) - 1) // stride + 1 for n, p, k in zip(spatial, pads, window, strict=True)
        ]
        y = 0.0
        for offset in np.ndindex(*window):
            start = [dilation * o for o in offset]
            part = tuple(slice(s, s + stride * (n - 1) + 1, stride) for s, n in zip(start, out, strict=True))
            y = y + x[(slice(None), *part)] @ w[offset]
        return y + bias

    return forward


def attention64(flat, x):
    heads, d = 2, 3
    q, k, v = (linear_general64(flat, x, name, (heads, d)) for name in ("query", "key", "value"))
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(d))
    mixed = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
    w, a, b, bias = lora(flat, "out")
    mixed = mixed.reshape(*mixed.shape[:2], heads * d)
    return mixed @ w.reshape(heads * d, -1) + (mixed @ a) @ b + bias


def linear_general64(flat, x, path, out_shape):
    w, a, b, bias = lora(flat, path)
    y = x @ w.reshape(x.shape[-1], -1) + (x @ a) @ b
    return y.reshape(*x.shape[:-1], *out_shape) + bias


def tied64(flat, ids):
    table, a, b, _ = lora(flat, "embed")
    hidden = np.tanh(table[ids] + a[ids] @ b)
    return hidden @ (table + a @ b).T


def shared64(flat, x):
    return linear64(flat, np.tanh(linear64(flat, x, "first")), "first")


def batch_norm64(flat, x):
    y = linear64(flat, x, "up")
    return (y - flat["norm/mean"]) / np.sqrt(flat["norm/var"] + 1e-5) * flat["norm/scale"] + flat["norm/bias"]


def two_axes64(flat, x):
    w, a, b, bias = lora(flat)
    x = x.reshape(*x.shape[:-2], -1)
    return (x @ w.reshape(-1, 4) + (x @ a) @ b).reshape(*x.shape[:-1], 4) + bias


def blocks64(stacked):
    return lambda flat, x: subjects.mlp64(flat, x, num_layers=3, scale=SCALE, stacked=stacked)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


IDS = np.array([[1, 0, 4], [3, 3, 2]], np.int32)


def linear(d_in, d_out):
    return lambda rngs: nnx.Linear(d_in, d_out, bias_init=NOISY, rngs=rngs)


def einsum(equation, *sizes, bias=None):
    return lambda rngs: nnx.Einsum(equation, sizes, bias, bias_init=NOISY, rngs=rngs)


def conv(d_in, d_out, window, **options):
    return lambda rngs: nnx.Conv(d_in, d_out, window, bias_init=NOISY, rngs=rngs, **options)


def layers(make):
    return lambda rngs: make(4, 3, rngs)


CASES = {
    "Linear": Case(linear(4, 5), normal(3, 4), linear64),
    "Linear without bias": Case(lambda r: nnx.Linear(4, 5, use_bias=False, rngs=r), normal(2, 3, 4), linear64),
    "Linear of one vector": Case(linear(4, 5), normal(4), linear64),
    "Linear of one number": Case(linear(1, 1), normal(3, 1), linear64),
    "Linear of integers": Case(linear(4, 5), np.arange(12).reshape(3, 4), linear64),
    "rank above both sizes": Case(linear(3, 2), normal(2, 3), linear64, rank=9),
    "LinearGeneral": Case(
        lambda r: nnx.LinearGeneral(4, (2, 3), bias_init=NOISY, rngs=r),
        normal(2, 3, 4),
        lambda flat, x: linear_general64(flat, x, "", (2, 3)),
    ),
    "LinearGeneral of two axes": Case(
        lambda r: nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), bias_init=NOISY, rngs=r), normal(5, 2, 3), two_axes64
    ),
    "Einsum to heads": Case(
        einsum("bti,ihd->bthd", 4, 2, 3, bias=(2, 3)), normal(2, 3, 4), einsum64("bti,ihd->bthd", "ihd", "ihd")
    ),
    "Einsum from heads": Case(
        einsum("bthd,hdo->bto", 2, 3, 4), normal(2, 3, 2, 3), einsum64("bthd,hdo->bto", "hdo", "hdo")
    ),
    "Einsum transposed": Case(
        einsum("bti,oi->bto", 5, 4, bias=(5,)), normal(2, 3, 4), einsum64("bti,oi->bto", "io", "oi")
    ),
    "Einsum with heads moved": Case(
        einsum("bti,hid->bhtd", 2, 4, 3), normal(2, 3, 4), einsum64("bti,hid->bhtd", "ihd", "hid")
    ),
    "Einsum with an ellipsis": Case(
        einsum("...i, io -> ...o", 4, 5), normal(2, 3, 4), einsum64("...i,io->...o", "io", "io")
    ),
    "Einsum that sums an input axis": Case(
        einsum("bti,io->bo", 4, 5), normal(2, 3, 4), einsum64("bti,io->bo", "io", "io")
    ),
    "Embed": Case(lambda r: nnx.Embed(6, 3, rngs=r), IDS, lambda f, i: lora(f)[0][i] + lora(f)[1][i] @ lora(f)[2]),
    "Embed as a head": Case(lambda r: Tied(6, 3, r), IDS, tied64),
    "Conv 1D": Case(conv(3, 4, 3), normal(2, 6, 3), conv64([(1, 1)])),
    "Conv 1D causal and dilated": Case(
        conv(3, 4, (3,), padding="CAUSAL", kernel_dilation=2), normal(2, 7, 3), conv64([(4, 0)], dilation=2)
    ),
    "Conv 2D": Case(conv(2, 3, (3, 2), padding="VALID"), normal(2, 5, 4, 2), conv64([(0, 0), (0, 0)])),
    "Conv 2D strided, padded and dilated": Case(
        conv(2, 3, (3, 3), strides=2, padding=((1, 2), (0, 1)), kernel_dilation=2),
        normal(2, 8, 9, 2),
        conv64([(1, 2), (0, 1)], stride=2, dilation=2),
    ),
    "MultiHeadAttention": Case(
        lambda r: nnx.MultiHeadAttention(2, 4, 6, decode=False, bias_init=NOISY, rngs=r), normal(2, 3, 4), attention64
    ),
    "a registered module": Case(
        lambda r: Dense(4, 5, r), normal(3, 4), lambda f, x: x @ lora(f)[0].T + (x @ lora(f)[1]) @ lora(f)[2]
    ),
    "a call by keyword": Case(lambda r: ByKeyword(4, r), normal(3, 4), lambda f, x: linear64(f, x, "up")),
    "a module at two places": Case(lambda r: SharedModule(4, r), normal(3, 4), shared64, targets="first|second"),
    "BatchNorm and Dropout state": Case(lambda r: WithState(4, r), normal(3, 4), batch_norm64, targets=["up"]),
    "nnx.List": Case(layers(subjects.ListOfLayers), normal(2, 4), blocks64(False)),
    "a plain list": Case(layers(subjects.PlainList), normal(2, 4), blocks64(False)),
    "a dict with integer keys": Case(layers(subjects.NumberedDict), normal(2, 4), blocks64(False)),
    "a module that is no pytree": Case(layers(subjects.NoPytree), normal(2, 4), blocks64(False)),
    "jax.checkpoint inside": Case(layers(subjects.Checkpointed), normal(2, 4), blocks64(False)),
    "nnx.remat inside": Case(layers(subjects.NnxRemat), normal(2, 4), blocks64(False)),
    "jax.jit inside": Case(layers(subjects.InnerJit), normal(2, 4), blocks64(False)),
    "nnx.vmap and jax.lax.scan": Case(layers(subjects.Vmapped), normal(2, 4), blocks64(True)),
    "nnx.vmap and nnx.scan": Case(layers(subjects.NnxScan), normal(2, 4), blocks64(True)),
    "jpeft's stack": Case(layers(subjects.Stacked), normal(2, 4), blocks64(True)),
    "as many layers as features": Case(lambda r: subjects.Stacked(3, 3, r), normal(3, 3), blocks64(True)),
}


@pytest.fixture(scope="module", params=CASES, name="case")
def _case(request):
    case = CASES[request.param]
    return case, case.build(nnx.Rngs(3))


@pytest.fixture(scope="module", name="adapted")
def _adapted(case):
    table, base = case
    method = jpeft.LoRA(rank=table.rank, alpha=SCALE * table.rank, targets=table.targets)
    return table, base, subjects.fill(jpeft.adapt(base, method, key=KEY))


def test_outputs_are_the_formulas(adapted):
    case, _, model = adapted
    graphdef, trainable, frozen = jpeft.partition(model)
    expected = case.oracle(subjects.as64(trainable | frozen), case.x)
    got = jax.jit(lambda t, f, x: jpeft.combine(graphdef, t, f)(x))(trainable, frozen, case.x)
    assert subjects.error(got, expected) < subjects.FLOAT32


def test_gradients_are_the_formulas(adapted):
    case, _, model = adapted
    graphdef, trainable, frozen = jpeft.partition(model)
    trainable64, frozen64 = subjects.as64(trainable), subjects.as64(frozen)
    weights = np.random.default_rng(1).standard_normal(case.oracle(trainable64 | frozen64, case.x).shape)
    expected = subjects.complex_step(lambda t: (weights * case.oracle(t | frozen64, case.x)).sum(), trainable64)
    weights = weights.astype(np.float32)
    got = jax.jit(jax.grad(lambda t: (weights * jpeft.combine(graphdef, t, frozen)(case.x)).sum()))(trainable)
    assert got.keys() == expected.keys()
    together = np.linalg.norm([np.linalg.norm(g) for g in expected.values()])
    for path, gradient in got.items():
        assert np.linalg.norm(gradient - expected[path]) < 2 * subjects.FLOAT32 * together, path


def test_merged_equals_adapted(adapted):
    case, _, model = adapted
    if len([site for site in jpeft.sites(model) if site.adapters]) == 1:  # roundings add up over several
        assert subjects.error(jpeft.merge(model)(case.x), model(case.x)) < subjects.MERGED
    with jax.enable_x64(True):
        model = subjects.in_float64(model)
        x = case.x.astype(np.float64 if case.x.dtype == np.float32 else case.x.dtype)
        assert subjects.error(jpeft.merge(model)(x), model(x)) < subjects.FLOAT64


def test_the_merged_model_is_plain(adapted):
    _, base, model = adapted
    merged = jpeft.merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(base)
    assert {p: v.dtype for p, v in subjects.leaves(merged).items()} == {
        p: v.dtype for p, v in subjects.leaves(base).items()
    }


def test_stripped_is_the_base_bit_for_bit(adapted):
    case, base, model = adapted
    stripped = jpeft.strip(model)
    assert nnx.graphdef(stripped) == nnx.graphdef(base)
    expected, got = subjects.leaves(base), subjects.leaves(stripped)
    assert list(got) == list(expected)
    for path in expected:
        np.testing.assert_array_equal(got[path], expected[path], err_msg=path)
    np.testing.assert_array_equal(stripped(case.x), base(case.x))


def test_frozen_is_the_base_leaf_for_leaf(adapted):
    _, base, model = adapted
    _, _, frozen = jpeft.partition(model)
    _, nothing, expected = jpeft.partition(base)
    assert nothing == {}
    assert list(frozen) == list(expected)
    for path, value in expected.items():
        assert frozen[path] is value or (frozen[path] == value).all(), path


def test_the_base_is_untouched(case):
    case, base = case
    before, graphdef = subjects.leaves(base), nnx.graphdef(base)
    subjects.fill(jpeft.adapt(base, jpeft.LoRA(rank=case.rank, targets=case.targets), key=KEY))
    assert nnx.graphdef(base) == graphdef
    assert all((before[path] == value).all() for path, value in subjects.leaves(base).items())
    assert not any(hasattr(module, "adapters") for _, module in nnx.iter_modules(base))


def test_it_starts_as_the_base_at_every_projection(case):
    case, base = case
    model = jpeft.adapt(base, jpeft.LoRA(rank=case.rank, targets=case.targets), key=KEY)
    np.testing.assert_array_equal(model(case.x), base(case.x))
    projections = [site for site in jpeft.sites(model) if site.kind == "projection"]
    assert projections
    assert all(site.adapters == ("lora",) for site in projections)
