# SPDX-License-Identifier: Apache-2.0
"""Every scheme of quantized bases: its codes by an independent formula, and what methods compute beside them."""

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import subjects
from contracts.models import LLAMA
from contracts.table import METHODS
from flax import nnx

import jpeft
from jpeft import _schemes
from jpeft._schemes import SCHEMES
from jpeft.train.sections.model import Scheme

KEY = jax.random.key(0)
GROUPED = [scheme for scheme in SCHEMES if scheme.startswith("int4")]
FLOATS = {"fp8_e4m3": (ml_dtypes.float8_e4m3fn, 448), "fp8_e5m2": (ml_dtypes.float8_e5m2, 57344)}


def weight(d_in: int, d_out: int) -> np.ndarray:
    """Columns of several scales, one of zeros, one of one sign."""
    rng = np.random.default_rng(d_in)
    found = rng.standard_normal((d_in, d_out)) * np.exp(rng.standard_normal(d_out))
    found[:, 1], found[:, 2] = 0, np.abs(found[:, 2])
    return found.astype(np.float32)


def linear(kernel: np.ndarray, scheme: str) -> Any:
    module = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal())
    module.kernel = nnx.Param(jnp.asarray(kernel))
    return jpeft.quantize(module, scheme, targets=".*")


def unpacked(kernel: Any, d_in: int) -> np.ndarray:
    codes = np.asarray(kernel.leaves["codes"])
    return np.stack([codes // 16, codes % 16], 1).reshape(-1, codes.shape[1])[:d_in]


@pytest.mark.parametrize("d_in", [256, 100], ids=["whole groups", "a short one"])
@pytest.mark.parametrize("scheme", GROUPED)
def test_codes_of_groups_are_nearest_to_the_weights(scheme, d_in):
    """In float64: no other code is nearer by more than rounding, and the kernel is `(code - zero) * scale`."""
    size, kernel = int(scheme.split("_")[1]), weight(d_in, 6)
    found = linear(kernel, scheme).kernel
    group, scales = np.arange(d_in) // size, np.asarray(found.leaves["scales"], np.float64)
    assert scales.shape == (math.ceil(d_in / size), 6)
    for g in range(len(scales)):
        block = kernel[group == g].astype(np.float64)
        spread = np.abs(block).max(0) / 7
        if "asymmetric" in scheme:
            spread = (np.maximum(block.max(0), 0) - np.minimum(block.min(0), 0)) / 15
        np.testing.assert_allclose(scales[g], spread, rtol=1e-6)
    zeros = np.asarray(found.leaves["zeros"], np.float64) if "asymmetric" in scheme else np.full_like(scales, 8)
    values = (unpacked(found, d_in) - zeros[group]) * scales[group]
    assert subjects.error(found[...], values) < subjects.FLOAT32
    error = np.abs(values - kernel)
    assert (error <= scales[group] * (1 if "asymmetric" in scheme else 0.5) * (1 + 1e-5)).all()
    assert (error <= scales[group] * (0.5 + 1e-5)).mean() > 0.97  # a rounded zero moves an end of the range
    assert (values[:, 1] == 0).all()


@pytest.mark.parametrize("tensor", [False, True], ids=["columns", "tensor"])
@pytest.mark.parametrize("kind", FLOATS)
def test_fp8_is_that_of_ml_dtypes(kind, tensor):
    dtype, most = FLOATS[kind]
    kernel = weight(40, 6)
    found = linear(kernel, kind + "_tensor" * tensor).kernel
    largest = np.abs(kernel).max(None if tensor else 0, keepdims=True).astype(np.float32)
    np.testing.assert_allclose(found.leaves["scales"], largest / most, rtol=1e-6)
    codes = np.asarray(found.leaves["codes"]).astype(np.float64)
    scaled = kernel * (np.float32(most) / np.where(largest > 0, largest, np.float32(1)))
    np.testing.assert_array_equal(codes, scaled.astype(dtype).astype(np.float64))
    assert subjects.error(found[...], codes * np.asarray(found.leaves["scales"], np.float64)) < subjects.FLOAT32


def test_a_device_without_the_numbers_is_named(monkeypatch):
    def without(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    _schemes._converts.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(_schemes.jax, "jit", without)
        with pytest.raises(ValueError, match="fp8_e4m3 keeps numbers of float8_e4m3fn, which a cpu here does not"):
            _schemes.check_scheme("fp8_e4m3")
        _schemes.check_scheme("nf4")
    _schemes._converts.cache_clear()
    _schemes.check_scheme("fp8_e4m3")


def test_a_configuration_knows_every_scheme():
    assert set(get_args(Scheme)) == set(SCHEMES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_inputs_gradient_is_the_formulas_beside_a_lora(scheme):
    """In float64: `x (W + s A B)`, with W the codes' kernel."""
    module = jpeft.adapt(linear(weight(64, 6), scheme), jpeft.LoRA(rank=2, alpha=3.0, targets=".*"), key=KEY)
    module = subjects.fill(module)
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in jpeft.partition(module)[1].items()}
    a, b = leaves["adapters/lora/A"], leaves["adapters/lora/B"]
    w = np.asarray(module.kernel[...], np.float64) + 1.5 * a @ b
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    y = np.float64(x) @ w + np.asarray(module.bias[...], np.float64)
    assert subjects.error(module(x), y) < 10 * subjects.FLOAT32
    got = jax.grad(lambda x: (module(x) ** 2).sum())(x)
    assert subjects.error(got, 2 * y @ w.T) < 10 * subjects.FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, line in METHODS.items() if "quantized llama" in line.on])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_method_trains_on_every_scheme(scheme, name):
    """Its gradients are those beside the kernels in floats that the codes stand for."""
    base = jpeft.models.build(LLAMA, "CAUSAL_LM", key=jax.random.key(1))
    model = jpeft.adapt(jpeft.quantize(base, scheme), METHODS[name].make(("q_proj", "down_proj", "lm_head")), key=KEY)
    model, ids = subjects.fill(model), np.arange(8).reshape(2, 4)

    def gradients(model: Any) -> dict[str, jax.Array]:
        graphdef, trainable, frozen = jpeft.partition(model)
        return jax.jit(jax.grad(lambda t, f: (jpeft.combine(graphdef, t, f)(ids) ** 2).sum()))(trainable, frozen)

    got, expected = gradients(model), gradients(jpeft.dequantize(model))
    assert got.keys() == expected.keys()
    assert any(np.any(value) for value in got.values())
    for path, value in expected.items():
        assert subjects.error(got[path], value) < 20 * subjects.FLOAT32, path
