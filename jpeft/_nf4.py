# SPDX-License-Identifier: Apache-2.0
"""NF4 and FP4: a weight as one of 16 values of a table, times its block's largest magnitude.

NF4's values are quantiles of a normal distribution (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), FP4's
those of a sign, two bits of exponent and one of mantissa. Bit for bit as bitsandbytes computes them: blocks of 64
consecutive weights of torch's `[d_out, d_in]`, the last one as short as it comes. With double quantization the
magnitudes themselves, less their mean, are codes of 8 bits in blocks of 256 (`CODE_BOOK`). Everything here is about
flat rows of numbers, `[*lead, n]`, in that order.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._scope import platform

#: How many weights share one magnitude, and how many magnitudes one of their own.
BLOCK, SCALE_BLOCK = 64, 256

#: The 16 values, from bitsandbytes (`create_normal_map(offset=0.9677083)`).
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip

#: The values of FP4 by code, from bitsandbytes: its 0.0625, 8, 12, 4, 6, 2 and 3 over 12; the high bit is the sign.
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)


def _dynamic_map() -> np.ndarray:
    """256 values of which each has an exponent of 0 to 6 bits and, in what is left, a linear fraction."""
    values = [0.0, 1.0]
    for bits in range(7):
        bounds = _between(np.float32(0.1), np.float32(1), 2**bits + 1)
        means = np.float32(10.0 ** (bits - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def _between(start: np.float32, end: np.float32, count: int) -> np.ndarray:
    """`torch.linspace`: in float32, rounded once, from both ends to the middle."""
    step, index = np.float64((end - start) / np.float32(count - 1)), np.arange(count)
    return np.where(index < count // 2, start + step * index, end - step * index[::-1]).astype(np.float32)


#: The 8-bit code book of the magnitudes (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861).
CODE_BOOK = _dynamic_map()


#: The last of the places that magnitudes' codes are found by, and the first place of every code but 0.
_PLACES = np.float32(65535)
_FIRST_PLACES = np.searchsorted(
    (np.arange(65536) / 32767.5 - 1).astype(np.float32), (CODE_BOOK[:-1] + CODE_BOOK[1:]) / np.float32(2), side="right"
).astype(np.int32)


def quantize(weights: jax.Array, table: np.ndarray = NF4) -> tuple[jax.Array, jax.Array]:
    """`[*lead, n]` as packed codes `[*lead, ceil(n / 2)]`, the first of two in the high half, and magnitudes.

    The magnitudes are `[*lead, ceil(n / 64)]`, float32.
    """
    blocks = _blocks(weights.astype(jnp.float32), BLOCK)
    absmax, scaled = _scaled(blocks, short=weights.shape[-1] % BLOCK > 0)
    codes = _code_of(scaled, table).reshape(*weights.shape[:-1], -1)[..., : 2 * math.ceil(weights.shape[-1] / 2)]
    return codes[..., ::2] << 4 | codes[..., 1::2], absmax


def quantize_columns(matrix: jax.Array, table: np.ndarray = NF4) -> tuple[jax.Array, jax.Array]:
    """The same of every column of `[*lead, d_in, d_out]`, where 64 divides d_in, without turning the matrix.

    Packed codes are `[*lead, d_in / 2, d_out]`, magnitudes `[*lead, d_in / 64, d_out]`.
    """
    *lead, d_in, d_out = matrix.shape
    blocks = matrix.astype(jnp.float32).reshape(*lead, d_in // BLOCK, BLOCK, d_out)
    absmax = _largest(jnp.abs(blocks))
    scaled = jnp.clip(blocks * (1 / jnp.where(absmax > 0, absmax, 1))[..., None, :], -1, 1)
    codes = _code_of(scaled, table).reshape(*lead, d_in // 2, 2, d_out)
    return codes[..., 0, :] << 4 | codes[..., 1, :], absmax


def _largest(blocks: jax.Array) -> jax.Array:
    """The largest of every column of `[..., 64, d_out]`.

    On a CPU by halves, which XLA fuses with what makes the blocks; a reduction has them written out in float32 first,
    which takes more than twice as long, and four times the memory.
    """
    if platform() != "cpu":
        return blocks.max(-2)
    while (half := blocks.shape[-2] // 2) > 0:
        blocks = jnp.maximum(blocks[..., :half, :], blocks[..., half:, :])
    return blocks[..., 0, :]


def dequantize(packed: jax.Array, absmax: jax.Array, n: int, table: np.ndarray = NF4) -> jax.Array:
    """The inverse of `quantize`, as far as there is one: `[*lead, n]`, float32 (float64 of such magnitudes)."""
    codes = jnp.stack([packed >> 4, packed & 15], -1).reshape(*packed.shape[:-1], -1)[..., :n]
    return (_blocks(values(codes, table), BLOCK) * absmax[..., None]).reshape(*packed.shape[:-1], -1)[..., :n]


def values(codes: jax.Array, table: np.ndarray = NF4) -> jax.Array:
    """The value of every code, by selections alone: accelerators are slow to look up."""

    def among(table: np.ndarray) -> Any:
        if len(table) == 1:
            return table[0]  # a number, as a Pallas kernel may hold no array of its own
        half = len(table) // 2
        return jnp.where(codes & half > 0, among(table[half:]), among(table[:half]))

    return among(table)


def pairs(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values of the two codes of every byte, the first one's first."""
    return values(packed >> 4), values(packed & 15)


def quantize_scales(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[*lead, blocks]` as 8-bit codes of the same shape, magnitudes `[*lead, ceil(blocks / 256)]`, mean `[*lead]`."""
    mean = _sum(absmax) / absmax.shape[-1]
    # No mean lies outside, so the clip changes nothing, but it has the mean rounded before it is taken away.
    mean = jnp.clip(mean, absmax.min(-1), absmax.max(-1))
    return *quantize_rest(absmax - mean[..., None]), mean


def quantize_rest(rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Magnitudes less their mean as the codes and magnitudes of `quantize_scales`.

    As bitsandbytes' CPU build finds them: a number is rounded to one of 65,536 places between -1 and 1, and has the
    code nearest to that place; in a block of zeros all codes are 0.
    """
    largest, scaled = _scaled(_blocks(rest, SCALE_BLOCK), short=False)
    place = jnp.clip((scaled + 1) * np.float32(0.5) * _PLACES, 0, _PLACES) + np.float32(0.5)
    codes = jnp.searchsorted(jnp.asarray(_FIRST_PLACES), place.astype(jnp.int32), side="right").astype(jnp.uint8)
    codes = jnp.where(largest[..., None] > 0, codes, np.uint8(0))
    return codes.reshape(*rest.shape[:-1], -1)[..., : rest.shape[-1]], largest


def dequantize_scales(codes: jax.Array, largest: jax.Array, mean: jax.Array) -> jax.Array:
    """The inverse of `quantize_scales`, as far as there is one."""
    largest, found = largest[..., None], _blocks(jnp.asarray(CODE_BOOK)[codes.astype(jnp.int32)], SCALE_BLOCK)
    # No code exceeds one, so the clip changes nothing, but it keeps compilers from rounding product and sum as one.
    found = jnp.clip(found * largest, -largest, largest).reshape(*codes.shape[:-1], -1)
    return found[..., : codes.shape[-1]] + mean[..., None]


def _blocks(flat: jax.Array, size: int) -> jax.Array:
    """`[*lead, n]` as `[*lead, ceil(n / size), size]`, zeros at the end."""
    padding = [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % size)]
    return jnp.pad(flat, padding).reshape(*flat.shape[:-1], -1, size)


def _sum(flat: jax.Array) -> jax.Array:
    """`[*lead, n]` as `[*lead]`, in pairs of pairs: as many digits as there are, and the same ones on every device."""
    while flat.shape[-1] > 1:
        flat = _blocks(flat, 2).sum(-1)
    return flat[..., 0]


def _scaled(blocks: jax.Array, short: bool) -> tuple[jax.Array, jax.Array]:
    """Every block's largest magnitude, and the block over it; zeros stay zeros.

    bitsandbytes multiplies by the inverse, but divides a `short` last block of 4-bit codes, which can round apart, and
    gives it a magnitude above zero.
    """
    absmax = jnp.abs(blocks).max(-1)
    safe = jnp.where(absmax > 0, absmax, 1)[..., None]
    scaled = blocks * (1 / safe)
    if short:
        scaled = scaled.at[..., -1, :].set(blocks[..., -1, :] / safe[..., -1, :])
        last = absmax[..., -1]
        absmax = absmax.at[..., -1].set(jnp.where(last > 0, last, np.float32(1e-38)))
    return absmax, jnp.clip(scaled, -1, 1)


def _code_of(scaled: jax.Array, table: np.ndarray) -> jax.Array:
    """The code of the nearest of 16 values, of two as near the lower: by selections; a search is far slower."""
    order = np.argsort(table, kind="stable").astype(np.uint8)
    bounds = (table[order][:-1] + table[order][1:]) / np.float32(2)

    def among(first: int, last: int) -> Any:
        if last - first == 1:
            return order[first]
        half = (first + last) // 2
        return jnp.where(scaled > bounds[half - 1], among(half, last), among(first, half))

    return among(0, len(order))
