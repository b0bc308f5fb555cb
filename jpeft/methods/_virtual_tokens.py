# SPDX-License-Identifier: Apache-2.0
"""What the methods with virtual tokens have in common: where they stand, room for them, and torch's first values."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import Array, Float

from .. import seams
from .._fields import one_of, several
from .._method import Site, Targets
from .._scope import current, fold_path
from ._packed import each, everybody

#: Whose input a prompt may stand in front of; by default the first of these that the model has.
INPUTS = ("encoder", "decoder")


def input_targets(blocks: tuple[str, ...] | None, modules_to_save: Any) -> Targets:
    """The inputs of `blocks`; of None, that of the encoder or, in a model without one, of the decoder."""
    prefer = INPUTS if blocks is None else ()
    return Targets(".*", modules_to_save=modules_to_save, seam="input", blocks=blocks, prefer=prefer)


def chosen(method: str, blocks: Any, choices: tuple[str, ...]) -> tuple[str, ...] | None:
    """What `blocks` takes: one or several of `choices`, or None.

    Raises:
      ValueError: it is something else.
    """
    if blocks is None:
        return None
    found = several(method, "blocks", blocks)
    for block in found or (blocks,):
        one_of(method, "blocks", block, choices)
    return found


def places(site: Site, seam: str) -> tuple[int, int, int]:
    """(how many places at seams of a kind, counting every layer; their output width; their key heads).

    Raises:
      ValueError: they are not alike.
    """
    members = [member for member in site.members if member.seam == seam]
    sizes = {(member.d_out, member.heads) for member in members}
    if len(sizes) > 1:
        raise ValueError(
            f"{' and '.join(member.path for member in members)} differ in size, so one table cannot serve them all; "
            "adapt them one by one, each under a name= of its own"
        )
    ((width, heads),) = sizes
    return sum(len(member.names) for member in members), width, heads


class Virtual(NamedTuple):
    """What the places of a method with virtual tokens share.

    Attributes:
      tokens: `[places, tokens, ...]`.
      present: in a bank, whose slots have several numbers of tokens, which of them are there; None for all.
    """

    tokens: jax.Array
    present: jax.Array | None = None

    @property
    def count(self) -> Any:
        """How many are there."""
        return self.tokens.shape[1] if self.present is None else self.present.sum()


def virtual(adapter: Any, flat: Float[Array, "all d_model"], count: int) -> Virtual:
    """The tokens of every place, `count` each at most, of a table that holds those of one place after another."""
    if not hasattr(adapter, "present"):
        return Virtual(flat.reshape(-1, count, flat.shape[-1]))
    present = adapter.present[...]
    rows = jnp.arange(len(flat) // count)[:, None] * present.sum() + jnp.arange(count)[None]
    return Virtual(jnp.take(flat, rows, axis=0, mode="clip"), present)


def padded(method: Any, adapter: Any, size: int) -> tuple[Any, dict[str, jax.Array]]:
    """`Method.padded` of a method with `num_tokens`, where the largest has `size` of them."""
    own = adapter.present[...] if hasattr(adapter, "present") else jnp.ones(method.num_tokens, bool)
    return dataclasses.replace(method, num_tokens=size), {"present": jnp.pad(own, (0, size - len(own)))}


def put_in_front(virtual: Virtual, place: Any, base: seams.InputEmbedding, y: Any) -> tuple[Any, ...]:
    """The input seam's outputs with a place's prompt in front of every row; the text's positions go up by its length.

    The examples of a packed row share one prompt in a causal language model, where it sees nothing but itself.
    Elsewhere what it becomes depends on the text (in a decoder on the encoder's, in a causal classifier by a gate), and
    each has a copy, with the example's segment. What is no token of this slot of a bank stands before those that are,
    and nobody sees it. In a step the prompt is in the cache, and positions alone go up.

    Raises:
      ValueError: more positions than the model has; more examples than `jpeft.max_segments` allows. In a compiled
        program, where neither is known of a packed row, that row is NaN.
    """
    e, positions, mask, segments = y
    prompt = virtual.tokens[place]
    length = len(prompt)
    positions = moved(positions, virtual, base, e.shape[1], segments)
    if current().step:
        return e, positions, mask, segments
    own = segments is not None and (base.beyond or not base.causal)
    owners = each(segments, mask) if own else everybody(len(e))
    if own:
        e = jnp.where(owners.whole[:, None, None], e, jnp.nan)
    seen, first = jnp.ones(length, bool), 0
    if virtual.present is not None:
        first = length - virtual.count
        prompt, seen = jnp.roll(prompt, first, 0), jnp.roll(virtual.present, first)
    if mask is None and (own or virtual.present is not None):
        mask = jnp.ones(e.shape[:2], bool)
    copies = owners.ids.shape[1]
    count = jnp.maximum(jnp.arange(length, dtype=positions.dtype) - first, 0)
    count = jnp.broadcast_to(jnp.tile(count, copies), (len(positions), copies * length))
    front = jnp.broadcast_to(jnp.tile(prompt.astype(e.dtype), (copies, 1)), (len(e), copies * length, e.shape[-1]))
    mask = in_front(mask, (owners.there[..., None] & seen[None, None]).reshape(len(e), -1))
    segments = in_front(segments, jnp.repeat(owners.ids, length, axis=1))
    return jnp.concatenate([front, e], 1), jnp.concatenate([count, positions], 1), mask, segments


def moved(positions: Any, virtual: Virtual, base: seams.InputEmbedding, seq: int, segments: Any) -> Any:
    """`positions` of a row of `seq` tokens, behind virtual ones. Those below 0, as RoBERTa's padding has, stay.

    Raises:
      ValueError: there are more than the model has. (Of a packed row that is only known where the positions are.)
    """
    last, length = base.max_positions, virtual.tokens.shape[1]
    positions = jnp.asarray(positions)
    if segments is not None:
        seq = 0 if isinstance(positions, core.Tracer) else int(positions.max()) + 1
    if last is not None and seq + length > last:
        raise ValueError(
            f"{seq} tokens behind {length} virtual ones are more than the {last} positions this model has; cut the "
            f"input to {last - length} tokens, or take fewer virtual ones"
        )
    return jnp.where(positions < 0, positions, positions + virtual.count)


def in_front(values: Any, new: jax.Array) -> jax.Array | None:
    """`new` before `values` `[..., seq]`, as values of their type; None stays None."""
    if values is None:
        return None
    values = jnp.asarray(values)
    return jnp.concatenate([new.astype(values.dtype), values], -1)


def linear(key: jax.Array, name: str, d_in: int, d_out: int) -> dict[str, jax.Array]:
    """`{name}_kernel` `[d_in, d_out]` and `{name}_bias`, both uniform in ±1/sqrt(d_in), as of torch's `nn.Linear`."""
    return {
        f"{name}_kernel": uniform(fold_path(key, f"{name}_kernel"), (d_in, d_out), d_in),
        f"{name}_bias": uniform(fold_path(key, f"{name}_bias"), (d_out,), d_in),
    }


def uniform(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
    """Uniform in ±1/sqrt(fan)."""
    return jax.random.uniform(key, shape, minval=-(fan**-0.5), maxval=fan**-0.5)


def apply_linear(adapter: Any, name: str, x: Float[Array, "tokens d_in"]) -> Float[Array, "tokens d_out"]:
    """x · kernel + bias, of the leaves that `linear` gave."""
    return x @ getattr(adapter, f"{name}_kernel")[...] + getattr(adapter, f"{name}_bias")[...][None]
