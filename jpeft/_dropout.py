# SPDX-License-Identifier: Apache-2.0
"""Dropout whose masks are computed where they are used, from a seed and the place of each entry.

A mask from `jax.random` is an array of its own, made by twenty rounds of threefry and kept for the backward pass. Here
an entry is kept or dropped by a hash of (seed, its index): a dozen integer operations, fused into what reads the mask
and done again in the backward pass. The index is that of the whole array, so a mask does not depend on how the array
is cut into blocks or over devices.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped, UInt32


def make_seed(key: jax.Array) -> UInt32[Array, "2"]:
    """The seed of one mask."""
    return jax.random.bits(key, (2,), jnp.uint32)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def drop(x: Shaped[Array, "..."], seed: UInt32[Array, "2"], rate: float) -> Shaped[Array, "..."]:
    """`x` with entries set to 0 with probability `rate`, and the others times 1/(1-rate)."""
    kept = keeps(seed, rate, linear_index(x.shape))
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def keeps(seed: UInt32[Array, "2"], rate: float, index: UInt32[Array, "..."]) -> Bool[Array, "..."]:
    """Whether the entry at `index` is kept: with probability 1 - rate, to the nearest 2^-32."""
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return _mixed(_mixed(index ^ seed[0]) + seed[1]) >= threshold


def linear_index(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """The place of every entry of an array in row-major order, modulo 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def _mixed(h: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every input bit flips every output bit with probability near 1/2.

    Shifts and multipliers: "lowbias32" of the hash prospector (https://github.com/skeeto/hash-prospector).
    """
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)
