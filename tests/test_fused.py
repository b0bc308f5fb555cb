# SPDX-License-Identifier: Apache-2.0
"""Products whose codes a Pallas kernel unpacks: interpreted, against the formula in float64; when they are taken."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.models import LLAMA
from flax import nnx

import jpeft
from jpeft import _fused_kernels, _fused_rule, _nf4
from jpeft._fused import product
from jpeft._schemes import SCHEMES as ALL
from jpeft.train.planning.trace import product_flops

#: Those that the kernels read.
SCHEMES = [name for name, scheme in ALL.items() if scheme.reading is not None]
KEY = jax.random.key(0)
#: Rounding of the result to bfloat16, whose step is 2^-8, and of nothing else.
BFLOAT16 = 2**-8
#: Rounding that passes through several layers, of which each adds to it.
DEEP = 1e-5
TOLERANCES = {"float32": subjects.FLOAT32, "bfloat16": BFLOAT16}
#: rows, d_in, d_out: less than a block, no multiple of a tile, and more than a block by something in every axis.
SHAPES = [(1, 64, 1), (5, 192, 130), (1027, 576, 520)]
WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 192}


def linear(d_in: int, d_out: int, scheme: str, dtype: str = "float32", layers: int = 0) -> Any:
    """A quantized Linear, or a stack of them, with a bias."""
    lead = (layers,) if layers else ()
    kernel = np.random.default_rng(0).standard_normal((*lead, d_in, d_out)) * 0.3
    module = nnx.Linear(d_in, d_out, rngs=nnx.Rngs(0), dtype=dtype)
    module.kernel = nnx.Param(jnp.asarray(kernel, dtype))
    module.bias = nnx.Param(jnp.asarray(np.linspace(-1, 1, d_out) + np.zeros((*lead, 1)), dtype))
    return jpeft.quantize(module, scheme, targets=".*")


def weight(module: Any, scheme: str, dtype: str = "float32") -> np.ndarray:
    """What the codes stand for, `[d_in, d_out]`, by the formula in float64."""
    leaves = {name: np.asarray(leaf) for name, leaf in module.kernel.leaves.items()}
    codes, scales = leaves["codes"], leaves["scales"].astype(np.float64)
    if scheme == "nf4_double":
        flat = _nf4.CODE_BOOK.astype(np.float64)[leaves["scales"].T.ravel()]
        flat = flat * np.repeat(leaves["scale_largest"], 256)[: flat.size] + leaves["scale_mean"]
        scales = flat.reshape(scales.T.shape).T
    if scheme != "int8":
        codes = _nf4.NF4.astype(np.float64)[np.stack([codes >> 4, codes & 15], 1).reshape(-1, codes.shape[1])]
    found = codes * np.repeat(scales, len(codes) // len(scales), 0)
    return np.asarray(jnp.asarray(found, dtype), np.float64)


def inputs(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def check(got: jax.Array, expected: np.ndarray, dtype: str = "float32") -> None:
    assert got.dtype == dtype
    assert subjects.error(got.astype(jnp.float32), expected) < TOLERANCES[dtype]


# What the kernels compute.


@pytest.mark.parametrize("gpu", [False, True], ids=["tpu", "gpu"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_and_its_gradient_are_the_formula(shape, scheme, dtype, gpu):
    rows, d_in, d_out = shape
    module = linear(d_in, d_out, scheme, dtype)
    matrix, w = module.kernel.fused, weight(module, scheme, dtype)
    codes, scales = matrix.reading.columns(module.kernel.leaves, d_out)
    weights = _fused_kernels.Weights(codes, scales, matrix.reading.values, matrix.dtype)
    x, dy = inputs(rows, d_in, dtype=dtype), inputs(rows, d_out, dtype=dtype)
    check(_fused_kernels.forward(x, weights, gpu=gpu, interpret=True), np.float64(x) @ w, dtype)
    check(_fused_kernels.backward(dy, weights, gpu=gpu, interpret=True), np.float64(dy) @ w.T, dtype)


def test_what_hangs_over_an_edge_counts_as_nothing():
    """The interpreter fills it with NaN, as a TPU may."""
    module = linear(576, 520, "nf4")
    leaves = module.kernel.leaves
    weights = _fused_kernels.Weights(leaves["codes"], leaves["scales"], _nf4.pairs, "float32")
    block = _fused_kernels._tpu_blocks(3, weights)
    assert weights.codes.shape[0] % block.codes > 0
    assert 520 % block.columns > 0
    assert np.isfinite(_fused_kernels.forward(jnp.ones((3, 576)), weights, gpu=False, interpret=True)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_layer_is_what_it_was_with_its_bias_and_any_axes_in_front(scheme):
    module, x = linear(192, 10, scheme), inputs(2, 3, 192)
    bias = np.linspace(-1, 1, 10)
    with jpeft.quantized_products("pallas"):
        assert "pallas_call" in str(jax.make_jaxpr(module)(x))
        check(jax.jit(module)(x), np.float64(x) @ weight(module, scheme) + bias)
        check(module(x[0, 0]), np.float64(x[0, 0]) @ weight(module, scheme) + bias)
        got = jax.jit(jax.grad(lambda x: (module(x) ** 3).sum()))(x)
    slope = 3 * (np.float64(x) @ weight(module, scheme) + bias) ** 2
    check(got, slope @ weight(module, scheme).T)


def test_float32_inputs_meet_the_weights_of_a_bfloat16_kernel():
    module = linear(64, 8, "nf4", "bfloat16")
    module.dtype, x = None, inputs(3, 64)
    expected = np.float64(x) @ weight(module, "nf4", "bfloat16") + np.float64(module.bias[...])
    with jpeft.quantized_products("pallas"):
        check(module(x), expected)


# Under transformations.


def test_layers_of_a_stack_under_scan_and_under_vmap():
    module, x = linear(128, 128, "nf4_double", layers=3), inputs(4, 128)
    layers = [weight(layer(module, i), "nf4_double") for i in range(3)]
    bias = np.linspace(-1, 1, 128)

    def stack(x):
        return jax.lax.scan(lambda x, one: (jnp.tanh(one(x)), None), x, module)[0].sum()

    def formula(x):
        for w in layers:
            x = np.tanh(x @ w + bias)
        return x

    with jpeft.quantized_products("pallas"):
        value, slope = jax.jit(jax.value_and_grad(stack))(x)
        side = jax.jit(jax.vmap(lambda one, x: one(x), in_axes=(0, None)))(module, x)
    assert subjects.error(value, formula(np.float64(x)).sum()) < DEEP
    assert subjects.error(slope, slopes(np.float64(x), layers, bias)) < DEEP
    check(side, np.stack([np.float64(x) @ w + bias for w in layers]))


def layer(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def slopes(x: np.ndarray, layers: list[np.ndarray], bias: np.ndarray) -> np.ndarray:
    """The gradient of the sum of a stack of tanh layers."""
    seen = []
    for w in layers:
        x = np.tanh(x @ w + bias)
        seen.append(x)
    slope = np.ones_like(x)
    for w, y in zip(layers[::-1], seen[::-1], strict=True):
        slope = (slope * (1 - y**2)) @ w.T
    return slope


def test_rows_of_many_examples_are_rows_of_one_product():
    module, x = linear(64, 12, "nf4"), inputs(5, 3, 64)

    def losses(x):
        return jax.vmap(jax.vmap(lambda row: module(row)))(x)

    with jpeft.quantized_products("pallas"):
        text = str(jax.make_jaxpr(losses)(x))
        assert "f32[15,12]" in text
        check(jax.jit(losses)(x), np.float64(x) @ weight(module, "nf4") + np.linspace(-1, 1, 12))


def test_a_model_trains_as_by_xla():
    """Gradients of a LoRA beside quantized kernels, through scan, checkpoints and attention."""
    base = jpeft.quantize(jpeft.models.build(WIDE, "CAUSAL_LM", key=KEY), "nf4_double")
    model = jpeft.adapt(base, jpeft.LoRA(rank=2, alpha=3, targets=["v_proj", "down_proj"]), key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)
    trainable = {p: v + 0.05 * jax.random.normal(KEY, v.shape) for p, v in trainable.items()}
    ids = np.arange(8).reshape(2, 4)

    def loss(trainable):
        return (jpeft.combine(graphdef, trainable, frozen)(ids) ** 2).mean()

    by_xla = jax.jit(jax.value_and_grad(loss))(trainable)
    with jpeft.quantized_products("pallas"):
        assert "pallas_call" in str(jax.make_jaxpr(jax.grad(loss))(trainable))
        by_pallas = jax.jit(jax.value_and_grad(loss))(trainable)
    assert subjects.error(by_pallas[0], by_xla[0]) < DEEP
    for path, slope in by_xla[1].items():
        assert subjects.error(by_pallas[1][path], slope) < DEEP, path


def test_the_products_inside_a_kernel_are_counted():
    module, x = linear(64, 256, "nf4"), inputs(32, 64)
    with jpeft.quantized_products("pallas"):
        assert product_flops(module, x) == 2 * 32 * 64 * 256


# When they are taken.


def jaxpr(module: Any, x: jax.Array) -> str:
    return str(jax.make_jaxpr(lambda x: module(x))(x))


def test_where_nothing_was_measured_xla_takes_the_product():
    assert {line.platform for line in _fused_rule.MEASURED} <= set(_fused_rule.PLATFORMS)
    assert all(line.gain < _fused_rule.WORTH for line in _fused_rule.MEASURED if line.platform == "cpu")
    assert "pallas_call" not in jaxpr(linear(64, 8, "nf4"), inputs(3, 64))


def measured(monkeypatch, *lines: _fused_rule.Line) -> None:
    """Where one device is there, and this was measured."""
    monkeypatch.setattr(_fused_rule, "MEASURED", lines)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_a_measured_gain_decides_for_its_platform_and_sizes(monkeypatch):
    lines = [
        _fused_rule.Line("tpu", "nf4", "bfloat16", 1024, 4096, 4096, 1.4),
        _fused_rule.Line("tpu", "nf4", "bfloat16", 1024, 4096, 2048, 0.8),
        _fused_rule.Line("cuda", "nf4", "bfloat16", 16, 4096, 4096, 1.02),
    ]
    measured(monkeypatch, *lines)

    def taken(*sizes: int, scheme: str = "nf4", dtype: str = "bfloat16") -> tuple[str, ...]:
        return _fused_rule.platforms(scheme, dtype, *sizes)

    assert taken(1024, 4096, 4096) == taken(2048, 4096, 8192) == ("tpu",)
    assert taken(1024, 4096, 2200) == ()  # the nearer line says no
    assert taken(2050, 4096, 4096) == taken(16, 4096, 4096) == ()  # not near; not worth it
    assert taken(1024, 4096, 4096, scheme="int8") == taken(1024, 4096, 4096, dtype="float32") == ()
    with jpeft.quantized_products("xla"):
        assert taken(1024, 4096, 4096) == ()
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert taken(1024, 4096, 4096) == ()  # a kernel is not split among devices


def test_the_platform_that_a_program_is_for_decides(monkeypatch):
    """Measured for a TPU alone: the same trace has the kernel there, and the product on this CPU."""
    measured(monkeypatch, _fused_rule.Line("tpu", "nf4", "float32", 8, 64, 128, 2.0))
    module, x = linear(64, 128, "nf4"), inputs(8, 64)
    traced = jax.jit(lambda x: module(x)).trace(x)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call" not in traced.lower().as_text()
    check(traced.lower().compile()(x), np.float64(x) @ weight(module, "nf4") + np.linspace(-1, 1, 128))


@pytest.mark.parametrize("platform, call", [("tpu", "tpu_custom_call"), ("cuda", "triton")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernels_are_lowered_for_accelerators(scheme, platform, call):
    module, x = linear(4096, 1024, scheme, "bfloat16"), inputs(8, 4096, dtype="bfloat16")
    with jpeft.quantized_products("pallas"):
        traced = jax.jit(jax.value_and_grad(lambda x: module(x).astype(jnp.float32).sum())).trace(x)
        assert traced.lower(lowering_platforms=(platform,)).as_text().count(call) >= 2


def general() -> nnx.LinearGeneral:
    return nnx.LinearGeneral((2, 32), 5, axis=(-2, -1), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "make, x",
    [
        (lambda: linear(10, 6, "nf4"), (3, 10)),
        (lambda: jpeft.quantize(general(), targets=".*"), (3, 2, 32)),
        (lambda: linear(64, 6, "nf4", "float16"), (3, 64)),
        (lambda: linear(64, 6, "nf4"), (0, 64)),
    ],
    ids=["blocks that run across columns", "no Linear", "float16", "no rows"],
)  # fmt: skip
def test_what_the_kernel_does_not_know_is_taken_by_xla(make, x):
    module, x = make(), jnp.ones(x, "float32")
    with jpeft.quantized_products("pallas"):
        assert "pallas_call" not in jaxpr(module, x)
        np.testing.assert_array_equal(module(x), jpeft.dequantize(module)(x))


def test_a_program_is_compiled_again_in_another_way():
    module, x = linear(64, 8, "nf4"), inputs(3, 64)
    traces = []

    @jax.jit
    def call(x):
        traces.append(_fused_rule.way())
        return product(module.kernel.fused, x, module.kernel.leaves) if _fused_rule.way() == "pallas" else module(x)

    call(x)
    with jpeft.quantized_products("pallas"):
        call(x)
    call(x)
    assert traces == ["auto", "pallas"]


def test_a_way_that_there_is_not():
    with pytest.raises(ValueError, match="one of auto, xla, pallas; got 'triton'"):
        jpeft.quantized_products("triton")
