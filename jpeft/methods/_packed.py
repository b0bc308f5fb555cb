# SPDX-License-Identifier: Apache-2.0
"""Whose virtual tokens stand in front of a packed row: those that all its examples see, or a copy for every one."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Bool, Int

from .. import seams
from .._scope import current


class Owners(NamedTuple):
    """The copies of a prompt in front of every row, each seen by one example.

    Attributes:
      ids: the examples' segments, `[batch, copies]`; `seams.EVERY_SEGMENT` of a copy that all see, or nobody.
      there: which copies have an example. `[batch, copies]`.
      whole: whether every example of the row has a copy, `[batch]`.
    """

    ids: Int[Array, "batch copies"]
    there: Bool[Array, "batch copies"]
    whole: Bool[Array, " batch"]


def everybody(batch: int) -> Owners:
    """One copy, which all tokens of a row see."""
    there = jnp.ones((batch, 1), bool)
    return Owners(jnp.full((batch, 1), seams.EVERY_SEGMENT), there, there[:, 0])


def each(segments: Any, mask: Any) -> Owners:
    """A copy for every segment that has text: `jpeft.max_segments` of them, else as many as there are.

    Args:
      segments: `[batch, seq]`.
      mask: `[batch, seq]`, 0 for padding, which has no copy; or None.

    Raises:
      ValueError: a row has more segments than `jpeft.max_segments` allows (in a compiled program, which does not know
        them, `whole` is False there); or it says nothing, and they are not known.
    """
    text = jnp.ones(segments.shape, bool) if mask is None else jnp.asarray(mask) != 0
    copies = min(_most(segments, text), segments.shape[1])
    order = jnp.lexsort((segments, ~text))  # those of the text first, equal ones side by side
    ids, text = (jnp.take_along_axis(jnp.asarray(x), order, 1) for x in (segments, text))
    first = text & jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    at = jnp.argsort(~first, axis=1, stable=True)[:, :copies]
    there = jnp.take_along_axis(first, at, 1)
    found = jnp.where(there, jnp.take_along_axis(ids, at, 1), seams.EVERY_SEGMENT)
    return Owners(found, there, first.sum(1) <= copies)


def _most(segments: Any, text: Any) -> int:
    """How many copies of a prompt a row has."""
    most, found = current().max_segments, _count(segments, text)
    if most is None and found is None:
        raise ValueError(
            "each example of a packed row (segment_ids) has virtual tokens of its own here, for what these become "
            "depends on its text, and how many examples a row has is not known while a program is compiled; say it by "
            "`with jpeft.max_segments(n): model(...)`"
        )
    if most is None:
        assert found is not None
        return max(found, 1)
    if found is not None and found > most:
        raise ValueError(
            f"a packed row holds {found} examples, and jpeft.max_segments allows {most}; raise it, or pack fewer"
        )
    return most


def _count(segments: Any, text: Any) -> int | None:
    """The most segments that a row has; None where only the running program will know."""
    if isinstance(segments, core.Tracer):
        return None
    segments = np.asarray(segments)
    known = np.ones(segments.shape, bool) if isinstance(text, core.Tracer) else np.asarray(text)
    return max((len(np.unique(row[seen])) for row, seen in zip(segments, known, strict=True)), default=0)
