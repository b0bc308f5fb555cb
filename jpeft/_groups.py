# SPDX-License-Identifier: Apache-2.0
"""Whole numbers of 4 or 8 bits times the scale of their group: rows of a matrix that follow one another share one.

A weight is `(code - zero) * scale` of its column and its group of rows, as in files of GPTQ and AWQ. Symmetric codes
have one zero for all, the middle. The leaves of a matrix `[d_in, d_out]`:

  codes   uint8; of 4 bits `[ceil(d_in / 2), d_out]`, row 2 i in the high half of row i; of 8 bits `[d_in, d_out]`
  scales  `[groups, d_out]`, of any floating dtype
  zeros   uint8 `[groups, d_out]`; absent where all are the middle, 8 or 128
  rows    int32 `[d_in]`, the group of every row; absent where groups are of one size, one after another
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ._method import wide

#: How many rows share a scale, where jpeft chooses.
SIZES = (32, 64, 128)


def quantize(matrix: jax.Array, size: int, symmetric: bool) -> dict[str, jax.Array]:
    """The leaves of `[*lead, d_in, d_out]` in 4 bits, each rounded to the nearest code.

    Symmetric: `scale = max |w| / 7`, codes from 1 to 15. Otherwise `scale = (max w - min w) / 15`, where 0 counts among
    the weights and has a code of its own. The last group is as short as it comes.
    """
    *lead, d_in, d_out = matrix.shape
    padding = [(0, 0)] * len(lead) + [(0, -d_in % size), (0, 0)]
    groups = jnp.pad(matrix.astype(jnp.float32), padding).reshape(*lead, -1, size, d_out)
    low = jnp.minimum(groups.min(-2), 0)
    high = jnp.maximum(groups.max(-2), 0)
    scales = jnp.maximum(-low, high) / 7 if symmetric else (high - low) / 15
    inverse = 1 / jnp.where(scales > 0, scales, 1)
    zeros = jnp.full_like(scales, 8) if symmetric else jnp.round(-low * inverse)
    codes = jnp.clip(jnp.round(groups * inverse[..., None, :]) + zeros[..., None, :], 0, 15).astype(jnp.uint8)
    leaves = {"codes": pack(codes.reshape(*lead, -1, d_out)[..., :d_in, :]), "scales": scales}
    leaves |= {} if symmetric else {"zeros": zeros.astype(jnp.uint8)}
    rows = np.broadcast_to(np.arange(d_in, dtype=np.int32) // size, (*lead, d_in))
    return leaves | ({"rows": jnp.asarray(rows)} if d_in % size else {})


def dequantize(leaves: Mapping[str, jax.Array], d_in: int, d_out: int, bits: int = 4) -> jax.Array:
    """The matrix `[*lead, d_in, d_out]` in float32, or in the scales' dtype where that is wider."""
    codes = unpack(leaves["codes"], d_in) if bits == 4 else leaves["codes"]
    scales = leaves["scales"].astype(wide(leaves["scales"].dtype))
    zeros = leaves["zeros"].astype(scales.dtype) if "zeros" in leaves else jnp.asarray(2 ** (bits - 1), scales.dtype)
    if "rows" in leaves:
        rows = leaves["rows"][..., None]
        zeros = jnp.take_along_axis(zeros, rows, -2) if zeros.ndim else zeros
        return (codes.astype(scales.dtype) - zeros) * jnp.take_along_axis(scales, rows, -2)
    grouped = codes.reshape(*scales.shape[:-1], -1, d_out).astype(scales.dtype)
    zeros = zeros[..., None, :] if zeros.ndim else zeros
    return ((grouped - zeros) * scales[..., None, :]).reshape(*codes.shape[:-2], d_in, d_out)


def pack(codes: jax.Array) -> jax.Array:
    """Codes of 4 bits `[*lead, d_in, d_out]`, two rows in one: `[*lead, ceil(d_in / 2), d_out]`."""
    padding = [(0, 0)] * (codes.ndim - 2) + [(0, codes.shape[-2] % 2), (0, 0)]
    codes = jnp.pad(codes, padding)
    return codes[..., ::2, :] << 4 | codes[..., 1::2, :]


def unpack(packed: jax.Array, d_in: int) -> jax.Array:
    """The inverse of `pack`."""
    codes = jnp.stack([packed >> 4, packed & 15], -2)
    return codes.reshape(*packed.shape[:-2], -1, packed.shape[-1])[..., :d_in, :]
