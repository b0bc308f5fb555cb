# SPDX-License-Identifier: Apache-2.0
"""Several examples in one row, each a segment of its own: hardly any padding, and one shape.

Which examples share a row is settled once, from their lengths alone, so an epoch has the same number of batches as any
other and any batch of any epoch can be made without those before it. (grain's packers read a stream and hold rows that
are half full: their place in it is no number.) The order of the rows changes with every epoch.

An example that has a target beside its input needs room for both, in the row of inputs and in that of targets.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from .buckets import MULTIPLE, Batch

Packing = Literal["none", "first_fit", "best_fit"]

#: Rows of pairs that are looked through for room at most: beyond them the time for n pairs grows as n.
OPEN_ROWS = 2**14


@dataclasses.dataclass(frozen=True)
class Packs:
    """Examples by the row that they share.

    Attributes:
      lengths: tokens of every example.
      width: tokens of a row.
      members: the examples of every row.
      batch_rows: rows of a batch.
      targets: tokens of every example's target; None where there are none.
      target_width: tokens of a row of targets: those of the fullest, to a multiple of 8.
    """

    lengths: np.ndarray
    width: int
    members: tuple[np.ndarray, ...]
    batch_rows: int
    targets: np.ndarray | None = None
    target_width: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, the same in every one."""
        return -(-len(self.members) // self.batch_rows)

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that is no padding."""
        return float(self.lengths.sum() / (len(self.members) * self.width))

    @property
    def target_fill(self) -> float | None:
        """Likewise of the targets' rows; None where there are none."""
        return None if self.targets is None else float(self.targets.sum() / (len(self.members) * self.target_width))

    @property
    def most(self) -> int:
        """Examples of the row that has most."""
        return max(map(len, self.members))

    def epoch(self, seed: int, epoch: int) -> list[Batch]:
        """Every row once, shuffled, the same for the same (seed, epoch)."""
        return self._batches(np.random.default_rng((seed, epoch)).permutation(len(self.members)))

    def in_order(self) -> list[Batch]:
        """Every row once, not shuffled."""
        return self._batches(np.arange(len(self.members)))

    def _batches(self, order: np.ndarray) -> list[Batch]:
        rows = [self.members[i] for i in order]
        return [Batch(self.width, rows[i : i + self.batch_rows]) for i in range(0, len(rows), self.batch_rows)]


def pack(
    lengths: np.ndarray,
    width: int,
    batch_rows: int,
    packing: Packing,
    targets: np.ndarray | None = None,
    target_width: int = 0,
) -> Packs:
    """Packs examples into rows of `width` tokens.

    Args:
      lengths: tokens of every example, none above `width`.
      width: tokens of a row.
      batch_rows: rows of a batch.
      packing: `first_fit` takes each example in turn and puts it into the first row that has room; `best_fit` takes
        the longest first and puts each into the row where it leaves least. With targets there has to be room for both;
        the longest is that which takes the largest share of a row on either side, and what is left is the sum of the
        two sides' shares. Of more than 16,384 rows with room the fullest is done with.
      targets: tokens of every example's target, none above `target_width`; None where there are none.
      target_width: tokens of the targets of a row.

    Raises:
      ValueError: an example is longer than a row.
    """
    if lengths.max(initial=0) > width:
        raise ValueError(f"an example of {lengths.max()} tokens is longer than a row of {width}; cut it first")
    if targets is not None:
        return _pack_pairs(lengths, width, batch_rows, packing, targets, target_width)
    order = np.argsort(-lengths, kind="stable") if packing == "best_fit" else np.arange(len(lengths))
    place = _Best(width).place if packing == "best_fit" else _First(width, len(lengths)).place
    return Packs(lengths, width, _filled(order, lengths.tolist(), place), batch_rows)


def _pack_pairs(
    lengths: np.ndarray, width: int, batch_rows: int, packing: Packing, targets: np.ndarray, target_width: int
) -> Packs:
    """Packs inputs and their targets at once."""
    if targets.max(initial=0) > target_width:
        raise ValueError(f"a target of {targets.max()} tokens is longer than a row of {target_width}; cut it first")
    sizes, room = np.stack([lengths, targets], 1), np.array([width, target_width])
    best = packing == "best_fit"
    order = np.argsort(-(sizes / room).max(1), kind="stable") if best else np.arange(len(lengths))
    members = _filled(order, sizes, _Sides(room, sizes.min(0, initial=max(room)), best).place)
    fullest = max((int(targets[row].sum()) for row in members), default=1)
    return Packs(lengths, width, members, batch_rows, targets, -(-fullest // MULTIPLE) * MULTIPLE)


def _filled(order: np.ndarray, sizes: Sequence[Any] | np.ndarray, place: Callable[[Any], int]) -> tuple[Any, ...]:
    """The examples of every row, ascending."""
    rows: list[list[int]] = []
    for example in order.tolist():
        row = place(sizes[example])
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
    return tuple(np.sort(np.array(row)) for row in rows)


class _Best:
    """Rows by the room that is left in them."""

    def __init__(self, width: int):
        self._width, self._count = width, 0
        self._rooms: list[int] = []  # ascending, without those that no row has
        self._rows: dict[int, list[int]] = {}

    def place(self, length: int) -> int:
        """The row where `length` tokens leave least; a new one where they fit into none."""
        at = bisect.bisect_left(self._rooms, length)
        if at == len(self._rooms):
            row, room = self._count, self._width
            self._count += 1
        else:
            room = self._rooms[at]
            row = self._rows[room].pop()
            if not self._rows[room]:
                del self._rows[room], self._rooms[at]
        left = room - length
        if left not in self._rows:
            bisect.insort(self._rooms, left)
            self._rows[left] = []
        self._rows[left].append(row)
        return row


class _First:
    """Rows in their order, with the most room that any row of a range has, as a binary tree."""

    def __init__(self, width: int, most_rows: int):
        self._leaves = 1 << max(most_rows - 1, 0).bit_length()
        self._room = [width] * (2 * self._leaves)

    def place(self, length: int) -> int:
        """The first row that has room for `length` tokens; rows that are empty count as rows."""
        node = 1
        while node < self._leaves:
            node = 2 * node if self._room[2 * node] >= length else 2 * node + 1
        self._room[node] -= length
        row = node - self._leaves
        while node > 1:
            node //= 2
            self._room[node] = max(self._room[2 * node], self._room[2 * node + 1])
        return row


class _Sides:
    """Rows by the room that is left in them on both sides, which an example needs at once.

    Args:
      room: of an empty row, on each side.
      least: what any example needs of it; a row that has less is done with. So is, of more than `OPEN_ROWS`, the one
        that has least on its fuller side.
      best: into the row where an example leaves least, else into the first.
    """

    def __init__(self, room: np.ndarray, least: np.ndarray, best: bool):
        self._room, self._least, self._best = room, least, best
        self._held = np.zeros((3, OPEN_ROWS + 1), int)  # what is left on either side, and which row it is
        self._open = self._count = 0

    def place(self, size: np.ndarray) -> int:
        """The row for an example of these sizes; a new one where it fits into none."""
        at = self._found(size)
        if at is None:
            at = self._open
            self._held[:, at] = *self._room, self._count
            self._open, self._count = at + 1, self._count + 1
        row = int(self._held[2, at])
        self._held[:2, at] -= size
        if (self._held[:2, at] < self._least).any():
            self._close(at)
        elif self._open > OPEN_ROWS:
            self._close(int(np.argmin(np.minimum(*self._shares(slice(self._open))))))
        return row

    def _found(self, size: np.ndarray) -> int | None:
        """Where the row stands among those that are open; None where there is none."""
        one, other = self._held[:2, : self._open]
        fits = np.flatnonzero((one >= size[0]) & (other >= size[1]))
        if not len(fits):
            return None
        return int(fits[np.argmin(np.add(*self._shares(fits)))] if self._best else fits[0])

    def _shares(self, which: Any) -> np.ndarray:
        """What part of a row is left on either side."""
        return self._held[:2, which] / self._room[:, None]

    def _close(self, at: int) -> None:
        self._held[:, at : self._open - 1] = self._held[:, at + 1 : self._open]
        self._open -= 1
