# SPDX-License-Identifier: Apache-2.0
"""Schemes: how a matrix is kept as codes and scales, and what they stand for. A new one is one line of `SCHEMES`.

The leaves of a kernel seen as a matrix `[d_in, d_out]`, below its own path, after the layer axes:

  int8             codes [d_in, d_out] int8; scales [1, d_out] float32
  nf4              codes [d_in / 2, d_out] uint8, row 2 i in the high half of row i and 2 i + 1 in the low one;
                   scales [d_in / 64, d_out] float32. Transposed they are bitsandbytes' bytes of torch's [d_out, d_in].
                   Where 64 does not divide d_in a block runs from one column into the next, so both are left as they
                   are there: flat_codes [ceil(d_in d_out / 2)], flat_scales [ceil(d_in d_out / 64)].
  nf4_double       the same, with scales or flat_scales as uint8 codes, whose values scale_largest
                   [ceil(blocks / 256)] and scale_mean [], both float32, give.
  fp4, fp4_double  as nf4 and nf4_double, with another table
  fp8_...          codes [d_in, d_out] float8; scales [1, d_out], or [1, 1] of a whole matrix, float32
  int4_...         those of `_groups`
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _fused, _groups, _nf4
from ._method import wide

Leaves = dict[str, jax.Array]


class Format(NamedTuple):
    """`dequantize`: leaves, d_in, d_out -> the matrix `[*lead, d_in, d_out]`; `reading`: as of `Scheme`."""

    dequantize: Callable[[Mapping[str, jax.Array], int, int], jax.Array]
    reading: _fused.Reading | None = None


class Scheme(NamedTuple):
    """A format that a matrix can be brought to.

    Attributes:
      quantize: a matrix `[*lead, d_in, d_out]` -> leaves by name.
      dequantize: as of `Format`.
      reading: how the Pallas kernel reads leaves of the name `codes`; None for a scheme that it does not know.
      dtype: of codes that not every device has; None where all have them.
    """

    quantize: Callable[[jax.Array], Leaves]
    dequantize: Callable[[Mapping[str, jax.Array], int, int], jax.Array]
    reading: _fused.Reading | None = None
    dtype: Any = None


#: What bitsandbytes multiplies a row's largest magnitude by; a quotient by 127 is rounded as each compiler likes.
INT8_STEP = np.float32(1 / 127)


def _to_int8(matrix: jax.Array) -> Leaves:
    """Every column over its largest magnitude, times 127, rounded (Dettmers et al. 2022, without outliers).

    By 127 times the inverse, as torch divides a number by a tensor: a weight between two codes can be rounded apart.
    """
    matrix = matrix.astype(jnp.float32)
    largest = jnp.abs(matrix).max(-2, keepdims=True)
    codes = jnp.round(matrix * (1 / jnp.where(largest > 0, largest, 1) * 127))
    return {"codes": codes.astype(jnp.int8), "scales": largest * INT8_STEP}


def _from_scaled(leaves: Mapping[str, jax.Array], d_in: int, d_out: int) -> jax.Array:
    return leaves["codes"].astype(wide(leaves["scales"].dtype)) * leaves["scales"]


def _to_table(matrix: jax.Array, table: np.ndarray) -> Leaves:
    *lead, d_in, d_out = matrix.shape
    if d_in % _nf4.BLOCK:
        codes, scale = _nf4.quantize(jnp.swapaxes(matrix, -1, -2).reshape(*lead, d_out * d_in), table)
        return {"flat_codes": codes, "flat_scales": scale}
    codes, scale = _nf4.quantize_columns(matrix, table)
    return {"codes": codes, "scales": scale}


def _from_table(leaves: Mapping[str, jax.Array], d_in: int, d_out: int, table: np.ndarray) -> jax.Array:
    if "flat_codes" in leaves:
        codes, scale = leaves["flat_codes"], leaves["flat_scales"]
        flat = _nf4.dequantize(codes, scale.astype(wide(scale.dtype)), d_in * d_out, table)
        return jnp.swapaxes(flat.reshape(*flat.shape[:-1], d_out, d_in), -1, -2)
    codes, scale = leaves["codes"], leaves["scales"].astype(wide(leaves["scales"].dtype))
    codes = jnp.stack([codes >> 4, codes & 15], -2)  # [*lead, d_in / 2, 2, d_out]
    values = _nf4.values(codes.reshape(*scale.shape[:-1], _nf4.BLOCK, d_out), table) * scale[..., None, :]
    return values.reshape(*scale.shape[:-2], d_in, d_out)


def _to_double(matrix: jax.Array, table: np.ndarray) -> Leaves:
    leaves = _to_table(matrix, table)
    name = "scales" if "scales" in leaves else "flat_scales"
    flat = leaves[name] if name == "flat_scales" else _flat(leaves[name])
    codes, largest, mean = _nf4.quantize_scales(flat)
    codes = codes if name == "flat_scales" else _in_columns(codes, matrix.shape[-1])
    return {**leaves, name: codes, "scale_largest": largest, "scale_mean": mean}


def _from_double(leaves: Mapping[str, jax.Array], d_in: int, d_out: int, table: np.ndarray) -> jax.Array:
    if "scales" in leaves:
        return _from_table({**leaves, "scales": _scales(leaves, d_out)}, d_in, d_out, table)
    scale = _nf4.dequantize_scales(leaves["flat_scales"], leaves["scale_largest"], leaves["scale_mean"])
    return _from_table({**leaves, "flat_scales": scale}, d_in, d_out, table)


def _scales(leaves: Mapping[str, jax.Array], d_out: int) -> jax.Array:
    """The scales of double quantization, where they stand in columns."""
    found = _nf4.dequantize_scales(_flat(leaves["scales"]), leaves["scale_largest"], leaves["scale_mean"])
    return _in_columns(found, d_out)


def _in_columns(flat: jax.Array, d_out: int) -> jax.Array:
    """`[*lead, d_out n]`, one column after another, as `[*lead, n, d_out]`."""
    return jnp.swapaxes(flat.reshape(*flat.shape[:-1], d_out, -1), -1, -2)


def _flat(columns: jax.Array) -> jax.Array:
    """The inverse of `_in_columns`."""
    return jnp.swapaxes(columns, -1, -2).reshape(*columns.shape[:-2], -1)


def _to_fp8(matrix: jax.Array, dtype: Any, axes: tuple[int, ...]) -> Leaves:
    """Every column, or the matrix, over its largest magnitude times the largest number of `dtype`."""
    most, matrix = float(jnp.finfo(dtype).max), matrix.astype(jnp.float32)
    largest = jnp.abs(matrix).max(axes, keepdims=True)
    codes = jnp.clip(matrix * (most / jnp.where(largest > 0, largest, 1)), -most, most)
    return {"codes": codes.astype(dtype), "scales": largest / most}


_NF4 = _fused.Reading(lambda leaves, d_out: (leaves["codes"], leaves["scales"]), _nf4.pairs)
_INT8 = _NF4._replace(values=lambda codes: (codes.astype(jnp.float32),))
_DOUBLE = _NF4._replace(columns=lambda leaves, d_out: (leaves["codes"], _scales(leaves, d_out)))


def _of_table(table: np.ndarray, reading: _fused.Reading | None = None) -> Scheme:
    return Scheme(functools.partial(_to_table, table=table), functools.partial(_from_table, table=table), reading)


def _of_double(table: np.ndarray, reading: _fused.Reading | None = None) -> Scheme:
    return Scheme(functools.partial(_to_double, table=table), functools.partial(_from_double, table=table), reading)


def _of_groups(size: int, symmetric: bool) -> Scheme:
    return Scheme(functools.partial(_groups.quantize, size=size, symmetric=symmetric), _groups.dequantize)


def _of_fp8(dtype: Any, *axes: int) -> Scheme:
    return Scheme(functools.partial(_to_fp8, dtype=dtype, axes=axes), _from_scaled, dtype=dtype)


#: `scheme=` by name.
SCHEMES: Mapping[str, Scheme] = {
    "nf4": _of_table(_nf4.NF4, _NF4),
    "nf4_double": _of_double(_nf4.NF4, _DOUBLE),
    "fp4": _of_table(_nf4.FP4),
    "fp4_double": _of_double(_nf4.FP4),
    "int8": Scheme(_to_int8, _from_scaled, _INT8),
    **{f"int4_{size}": _of_groups(size, symmetric=True) for size in _groups.SIZES},
    **{f"int4_{size}_asymmetric": _of_groups(size, symmetric=False) for size in _groups.SIZES},
    "fp8_e4m3": _of_fp8(jnp.float8_e4m3fn, -2),
    "fp8_e5m2": _of_fp8(jnp.float8_e5m2, -2),
    "fp8_e4m3_tensor": _of_fp8(jnp.float8_e4m3fn, -2, -1),
    "fp8_e5m2_tensor": _of_fp8(jnp.float8_e5m2, -2, -1),
}

#: What a kernel may be kept as: the schemes, and what only files bring, whose groups are of any size.
FORMATS: Mapping[str, Format | Scheme] = {
    **SCHEMES,
    "grouped4": Format(_groups.dequantize),
    "grouped8": Format(functools.partial(_groups.dequantize, bits=8)),
}


def check_scheme(scheme: Any) -> None:
    """Raises a ValueError unless `scheme` is the name of one whose numbers this device has."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    dtype, platform = SCHEMES[scheme].dtype, jax.default_backend()
    if dtype is not None and not _converts(dtype, platform):
        raise ValueError(f"{scheme} keeps numbers of {jnp.dtype(dtype).name}, which a {platform} here does not convert")


@functools.cache
def _converts(dtype: Any, platform: str) -> bool:
    del platform  # the default one; here for the cache
    try:
        shape = jax.ShapeDtypeStruct((8, 128), dtype)
        jax.jit(lambda x: x.astype(jnp.float32)).lower(shape).compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return False
    return True
