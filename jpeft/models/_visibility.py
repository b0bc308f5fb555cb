# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees, by blocks of queries: what is known when a program is compiled, and what when it runs.

Where a mesh splits a row's tokens over `ways` devices, the queries are in as many parts, each an example of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from .._given import Given
from .._stream import split_parts
from ..seams import EVERY_SEGMENT


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is known when the program is compiled.

    Attributes:
      seq, keys: how many a row has.
      ways: in how many parts the queries of a row are; each sees the keys of all.
      rows: queries in a block.
      causal, window, scale, dropout, cap: as of `attention`.
      unseeing: whether there may be a query that sees no key.
    """

    seq: int
    keys: int
    ways: int
    rows: int
    causal: bool
    window: int | None
    scale: float
    dropout: float
    cap: float | None
    unseeing: bool

    @property
    def offset(self) -> int:
        """Query i stands at key i + offset."""
        return self.keys - self.seq

    @property
    def own(self) -> int:
        """How many of a row's queries are together: all, or a device's."""
        return -(-self.seq // self.ways)

    def blocks(self) -> Iterator[tuple[range, range]]:
        """Queries by `rows`, each block with the keys beyond which none of its queries sees."""
        for start in range(0, self.own, self.rows):
            queries = range(start, min(start + self.rows, self.own))
            last = queries.stop + self.offset if self.causal and self.ways == 1 else self.keys
            first = 0 if self.window is None or self.offset or self.ways > 1 else max(0, start - self.window + 1)
            yield queries, range(first, last)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["window", "mask", "segments", "key_segments", "places", "key_places", "seed", "starts"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Limits:
    """What is known of visibility when the program runs: arrays or None, and JAX's own stand-ins for these.

    `segments` and `places` are of queries, `key_segments` and `key_places` of the last keys. `starts` `[batch]` is
    where the queries of each example begin in their row, of which they are a part; None where they are whole.
    """

    window: Any
    mask: Any
    segments: Any
    key_segments: Any
    places: Any
    key_places: Any
    seed: Any
    starts: Any = None


def limits_of_parts(limits: Limits, rules: Rules, batch: int) -> Limits:
    """The limits of queries in `ways` parts of each row, each an example."""
    whole, parts = functools.partial(repeated, ways=rules.ways), functools.partial(in_parts, ways=rules.ways)
    places = limits.places if limits.places is None else jnp.broadcast_to(limits.places, (batch, rules.seq))
    of_queries = limits.mask is not None and limits.mask.ndim == 3
    return dataclasses.replace(
        limits,
        mask=_made(parts if of_queries else whole, limits.mask),
        segments=_made(parts, limits.segments),
        key_segments=_made(whole, limits.key_segments),
        places=_made(parts, places),
        key_places=_made(whole, places),
        starts=jnp.tile(jnp.arange(rules.ways) * rules.own, batch),
    )


def _made(change: Callable[[Any], jax.Array], x: Any) -> Any:
    return x if x is None else change(x)


def in_parts(x: Any, ways: int, axis: int = 1) -> jax.Array:
    """`[batch ... seq ...]` -> `[batch·ways ... seq/ways ...]`: the parts of a row, padded at its end, as examples."""
    x = jnp.moveaxis(jnp.asarray(x), axis, 1)
    own = -(-x.shape[1] // ways)
    x = jnp.pad(x, ((0, 0), (0, own * ways - x.shape[1]), *((0, 0) for _ in x.shape[2:])))
    return split_parts(jnp.moveaxis(x.reshape(x.shape[0] * ways, own, *x.shape[2:]), 1, axis))


def repeated(x: Any, ways: int) -> jax.Array:
    """`[batch ...]` -> `[batch·ways ...]`: what every part of a row has whole."""
    return split_parts(jnp.repeat(jnp.asarray(x), ways, axis=0))


def visible_keys(rules: Rules, limits: Limits, queries: range, keys: range) -> Given | None:
    """Which of the keys each query sees, `[batch or 1, queries or 1, keys]`; None where all see all."""
    here = jnp.arange(queries.start, queries.stop)[None, :, None] + rules.offset
    if limits.starts is not None:
        here = here + limits.starts[:, None, None]
    there = jnp.arange(keys.start, keys.stop)[None, None]
    conditions = []
    if rules.causal and (rules.ways > 1 or keys[-1] > queries[0] + rules.offset):
        conditions.append(there <= here)
    if limits.window is not None:
        near = there > here - limits.window if limits.places is None else _near(rules, limits, queries, keys)
        conditions.append(near | (there < rules.offset))
    if rules.window is not None and (rules.ways > 1 or keys[0] <= queries[-1] + rules.offset - rules.window):
        conditions.append((there > here - rules.window) | (there < rules.offset))
    if limits.mask is not None:
        own = limits.mask[:, None] if limits.mask.ndim == 2 else limits.mask[:, cut(queries)]
        conditions.append(own[..., cut(keys)] != 0)
    if limits.segments is not None:
        every = ((0, 0), (rules.keys - limits.key_segments.shape[1], 0))
        segments = jnp.pad(limits.key_segments, every, constant_values=EVERY_SEGMENT)[:, None, cut(keys)]
        same = limits.segments[:, cut(queries), None] == segments
        conditions.append(same | (segments == EVERY_SEGMENT))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _near(rules: Rules, limits: Limits, queries: range, keys: range) -> jax.Array:
    """Which of the keys are within the window of each query, by their places."""
    there = jnp.pad(limits.key_places, ((0, 0), (rules.offset, 0)))[:, None, cut(keys)]
    return there > limits.places[:, cut(queries), None] - limits.window


def cut(span: range) -> slice:
    return slice(span.start, span.stop)
