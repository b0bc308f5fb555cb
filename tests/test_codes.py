# SPDX-License-Identifier: Apache-2.0
"""Codes and magnitudes of NF4, FP4 and int8, bit for bit as bitsandbytes' (golden/make_bnb.py)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from flax import nnx

import jpeft
from jpeft import _nf4
from jpeft._quantized import QuantizedKernel

GOLDEN = np.load(Path(__file__).parent / "golden" / "bnb.npz")
CASES = ("rows", "across", "odd", "many", "half", "float16", "zeros", "tail", "one", "constant")

#: The mean of the magnitudes, which every device sums in an order of its own.
ULP = 1.2e-7


def linear(kernel: Any, dtype=jnp.float32) -> nnx.Linear:
    """A Linear of `kernel` `[d_in, d_out]`."""
    module = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal())
    module.kernel = nnx.Param(jnp.asarray(kernel, dtype))
    return module


def quantized(case: str, scheme: str) -> QuantizedKernel:
    """The kernel of a golden weight."""
    dtype = {"half": jnp.bfloat16, "float16": jnp.float16}.get(case, jnp.float32)
    return jpeft.quantize(linear(GOLDEN[f"{case}/weight"].T, dtype), scheme, targets=".*").kernel


def in_torchs_order(leaves: dict[str, Any], name: str) -> np.ndarray:
    """Codes or scales as one row, as bitsandbytes keeps them."""
    return np.asarray(leaves[name].T.ravel() if name in leaves else leaves[f"flat_{name}"])


def test_the_code_books_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(_nf4.CODE_BOOK, GOLDEN["map"])
    np.testing.assert_array_equal(_nf4.values(jnp.arange(16, dtype=jnp.uint8)), _nf4.NF4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme, folder", [("nf4", ""), ("fp4", "fp4/")])
def test_codes_of_four_bits_are_those_of_bitsandbytes_bit_for_bit(scheme, folder, case):
    kernel, golden = quantized(case, scheme), f"{case}/{folder}"
    np.testing.assert_array_equal(in_torchs_order(kernel.leaves, "codes"), GOLDEN[f"{golden}packed"][:, 0])
    np.testing.assert_array_equal(in_torchs_order(kernel.leaves, "scales"), GOLDEN[f"{golden}absmax"])
    np.testing.assert_array_equal(kernel[...].T.astype(jnp.float32), GOLDEN[f"{golden}dequantized"])


@pytest.mark.parametrize("case", CASES)
def test_double_quantization_is_that_of_bitsandbytes_bit_for_bit_around_its_mean(case):
    """The mean itself, which bitsandbytes sums as each device likes, is the same to an ulp; from it all follows."""
    kernel = quantized(case, "nf4_double")
    np.testing.assert_array_equal(in_torchs_order(kernel.leaves, "codes"), GOLDEN[f"{case}/double/packed"][:, 0])
    mean = GOLDEN[f"{case}/double/mean"]
    assert abs(kernel.leaves["scale_mean"] - mean) <= ULP * mean
    rest = jnp.asarray(GOLDEN[f"{case}/absmax"] - mean)
    codes, largest = jax.jit(_nf4.quantize_rest)(rest)
    np.testing.assert_array_equal(codes, GOLDEN[f"{case}/double/absmax"])
    np.testing.assert_array_equal(largest, GOLDEN[f"{case}/double/absmax2"])
    if kernel.leaves["scale_mean"] == mean:
        np.testing.assert_array_equal(in_torchs_order(kernel.leaves, "scales"), GOLDEN[f"{case}/double/absmax"])
        np.testing.assert_array_equal(kernel.leaves["scale_largest"], GOLDEN[f"{case}/double/absmax2"])
    theirs = {name: jnp.asarray(GOLDEN[f"{case}/double/{name}"]) for name in ("absmax", "absmax2", "mean")}
    scales = jax.jit(_nf4.dequantize_scales)(theirs["absmax"], theirs["absmax2"], theirs["mean"])
    packed, shape = GOLDEN[f"{case}/double/packed"][:, 0], GOLDEN[f"{case}/weight"].shape
    got = _nf4.dequantize(jnp.asarray(packed), scales, shape[0] * shape[1]).reshape(shape)
    got = got.astype(kernel.dtype).astype(jnp.float32)
    np.testing.assert_array_equal(got, GOLDEN[f"{case}/double/dequantized"])


def test_some_golden_mean_is_the_same_bit_for_bit():
    same = [c for c in CASES if quantized(c, "nf4_double").leaves["scale_mean"] == GOLDEN[f"{c}/double/mean"]]
    assert len(same) >= 6


def test_codes_of_magnitudes_are_those_of_bitsandbytes_beside_every_edge_and_in_a_block_of_zeros():
    """Eleven thousand numbers, most of them within a millionth of where the code changes."""
    codes, largest = jax.jit(_nf4.quantize_rest)(jnp.asarray(GOLDEN["rest"]))
    np.testing.assert_array_equal(codes, GOLDEN["rest/codes"])
    np.testing.assert_array_equal(largest, GOLDEN["rest/absmax"])


@pytest.mark.parametrize("case", CASES)
def test_int8_is_that_of_bitsandbytes(case):
    kernel = quantized(case, "int8")
    np.testing.assert_array_equal(kernel.leaves["codes"].T, GOLDEN[f"{case}/int8/codes"])
    scales = GOLDEN[f"{case}/int8/absmax"].astype(np.float64) / 127
    assert subjects.error(kernel.leaves["scales"][0], scales) < subjects.FLOAT32
    if case not in ("half", "float16"):
        expected = GOLDEN[f"{case}/int8/codes"] * scales[:, None]
        assert subjects.error(kernel[...].T, expected) < subjects.FLOAT32
