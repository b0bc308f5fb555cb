# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens that a decoder has read, kept so that the next token costs one.

A cache is a pytree of static shape: it is passed in and returned, through `jax.jit`, `jax.lax.while_loop` and
`jax.vmap` alike. Slot i holds what stands at place i of the row that a call without a cache would read: virtual tokens
in front, then the prompt with its padding, then what was generated. What a method adds to every call's keys and values
(a prefix) is not kept, as it is added to every call again.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import core
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from .._stack import Apart, apart, loops_apart
from .._stream import split_cache
from ..seams import InputEmbedding


class KV(NamedTuple):
    """Keys and values of one attention, or with a leading axis those of all layers.

    As an attention makes them their axes are `batch keys kv_heads d_head`; in a cache `batch kv_heads keys d_head`,
    which the products of a step read as it lies.
    """

    keys: Float[Array, "*layers batch keys kv_heads d_head"]
    values: Float[Array, "*layers batch keys kv_heads d_head"]


#: Of one attention, of all layers in arrays with a leading axis, or layer by layer.
Kept = TypeVar("Kept", KV, Apart)


def in_cache(kv: Kept) -> Kept:
    """Keys and values as an attention makes them, with the axes that they have in a cache."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, -3, -2), kv)


class Cache(NamedTuple):
    """What a decoder has read.

    Attributes:
      kv: of all layers, `[layers, batch, kv_heads, slots, d_head]`; or `_stack.Apart`, layer by layer.
      mask: `[batch, slots]`, whether a slot holds something to be seen: it is filled, and not by padding.
      places: `[batch, slots]`, the positions of what the slots hold, virtual tokens counted in.
      next: `[batch]`, the position of the next token, virtual tokens not counted in.
      used: how many slots are filled, the same number in all rows.
      cross: of all layers of a decoder beside an encoder, keys and values of the encoder's states, likewise.
      cross_mask: `[batch, keys]`, which of those are seen; None for all.
    """

    kv: Any
    mask: Bool[Array, "batch slots"]
    places: Int[Array, "batch slots"]
    next: Int[Array, " batch"]
    used: Int[Array, ""]
    cross: Any = None
    cross_mask: Any = None

    @property
    def slots(self) -> int:
        """How many there are."""
        return self.mask.shape[1]


def empty(layers: int, batch: int, slots: int, kv_heads: int, d_head: int, dtype: Any) -> Cache:
    """A cache that holds nothing."""
    zeros = jnp.zeros((layers, batch, kv_heads, slots, d_head), dtype)
    mask, places = jnp.zeros((batch, slots), bool), jnp.zeros((batch, slots), jnp.int32)
    return Cache(KV(zeros, zeros), mask, places, jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.int32))


def filled(cache: Cache, new: KV, mask: Any, places: Any, positions: Any) -> Cache:
    """`cache` with a whole prompt in it, in the place of whatever it held.

    Args:
      cache: with room for it.
      new: keys and values of all layers as their attentions made them, virtual tokens in front.
      mask: `[batch, seq]` of the same tokens, or None.
      places: `[batch or 1, seq]`, their positions.
      positions: `[batch or 1, text]`, those of the text before virtual tokens were counted in.

    Raises:
      ValueError: there are more tokens, or other rows, than the cache was made for.
    """
    batch, seq = new.keys.shape[1:3]
    if batch != cache.mask.shape[0] or seq > cache.slots:
        raise ValueError(
            f"a prompt of {batch} rows and {seq} tokens (virtual ones counted in) does not go into a cache of "
            f"{cache.mask.shape[0]} rows and {cache.slots} slots; make one by model.cache(batch, length)"
        )
    room = ((0, 0), (0, cache.slots - seq))
    seen = jnp.ones((batch, seq), bool) if mask is None else jnp.broadcast_to(mask != 0, (batch, seq))

    def put(old: jax.Array, x: jax.Array) -> jax.Array:
        return split_cache(jnp.pad(x.astype(old.dtype), ((0, 0), (0, 0), *room, (0, 0))))

    return cache._replace(
        kv=jax.tree.map(put, cache.kv, in_cache(new)),
        mask=jnp.pad(seen, room).astype(bool),  # of no weak type, as after a step
        places=jnp.pad(jnp.broadcast_to(places, (batch, seq)).astype(jnp.int32), room),
        next=jnp.broadcast_to(positions[:, -1] + 1, (batch,)).astype(jnp.int32),
        used=jnp.asarray(seq, jnp.int32),
    )


def extended(cache: Cache, new: Any, places: Any, last: Any) -> Cache:
    """`cache` with one token more in every row: its keys and values of all layers, and its positions `[batch, 1]`.

    In a loop they are written in place: after `last`, the token's state behind all layers, which all slots were read
    for. Where the order is left to XLA, it copies a whole cache that is written and read in one step.
    """
    at = cache.used + _nothing(last) if loops_apart() else cache.used

    def put(old: jax.Array, x: Any, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.asarray(x).astype(old.dtype), at, axis)

    return cache._replace(
        kv=jax.tree.map(lambda old, x: put(old, x, old.ndim - 2), cache.kv, in_cache(new)),
        mask=put(cache.mask, jnp.ones_like(cache.mask[:, :1]), 1),
        places=put(cache.places, places, 1),
        next=cache.next + 1,
        used=cache.used + 1,
    )


@custom_vmap
def _nothing(x: jax.Array) -> jax.Array:
    """0, of which a compiler knows no more than that it is made of `x`; of all rows of a `jax.vmap` the same one."""
    return jnp.minimum(jnp.isnan(x).sum(dtype=jnp.int32), 0)


@_nothing.def_vmap
def _(_size: int, _batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
    return _nothing(x), False


def repeated(cache: Cache, times: int) -> Cache:
    """`cache` with every row `times` times, its copies next to each other."""
    rows = jnp.repeat(jnp.arange(len(cache.mask)), times)
    mask, places, following, crossed = (
        jax.tree.map(lambda x: x[rows], x) for x in (cache.mask, cache.places, cache.next, cache.cross_mask)
    )
    cache = reordered(cache._replace(mask=mask, places=places, next=following, cross_mask=crossed), rows)
    return cache._replace(cross=_rows(cache.cross, rows))


def reordered(cache: Cache, rows: Int[Array, " batch"]) -> Cache:
    """`cache` whose row i is the row `rows[i]` of `cache`, a copy of the same prompt with another text behind it."""
    return cache._replace(kv=_rows(cache.kv, rows))


def taken_apart(cache: Cache) -> Cache:
    """`cache` for a model that was taken apart (`_stack.take_apart`)."""
    if not loops_apart():
        return cache
    return cache._replace(kv=apart(cache.kv), cross=apart(cache.cross))


def _rows(kv: Any, rows: Int[Array, " batch"]) -> Any:
    """These rows of keys and values in a cache."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4, mode="clip"), kv)


def reach(cache: Cache, window: Any = None, places: Any = None) -> Bool[Array, "batch slots"]:
    """What the next token sees of the slots.

    Args:
      cache: what was read.
      window: how many slots back it sees, itself counted; None for all.
      places: `[batch, 1]`, its positions, in which the window is then counted, as of `_attention.attention`.
    """
    seen = cache.mask
    if window is not None and places is None:
        seen = seen & (jnp.arange(cache.slots) > cache.used - window)[None]
    elif window is not None:
        seen = seen & (cache.places > places - window)
    return seen


def check_step(cache: Cache, input_ids: Any) -> None:
    """A step reads one token in every row, and needs a slot for it.

    Raises:
      ValueError: the tokens are of another shape, or the cache is full. (Under `jax.jit` that is not known; `or_nan`.)
    """
    if input_ids.shape != (cache.mask.shape[0], 1):
        raise ValueError(
            f"a step reads one token in each of the cache's {cache.mask.shape[0]} rows, [batch 1]; got "
            f"{input_ids.shape} (a prompt is read by prefill)"
        )
    if not isinstance(cache.used, core.Tracer) and int(cache.used) >= cache.slots:
        raise ValueError(f"all {cache.slots} slots of the cache are filled; make one of a greater length")


def or_nan(x: jax.Array, cache: Cache) -> jax.Array:
    """`x`, or NaN where the cache had no slot left."""
    return jnp.where(cache.used < cache.slots, x, jnp.nan)


def step_scope(batch: int) -> dict[str, Any]:
    """What the scope says of a step's tokens: text, none of it the prompt, behind what a cache holds."""
    one = jnp.ones((batch, 1), bool)
    return {"text": one, "segments": None, "prompt": ~one, "step": True}


def num_slots(seam: InputEmbedding, length: int, dtype: Any) -> int:
    """How many slots `length` tokens take, with the virtual ones that methods put in front; by shape alone."""
    e = jax.ShapeDtypeStruct((1, length, seam.d_model), dtype)
    return jax.eval_shape(lambda e: seam(e, jnp.arange(length)[None], None, None)[0], e).shape[1]
