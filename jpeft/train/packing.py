# SPDX-License-Identifier: Apache-2.0
"""Several examples in one row, each a segment of its own: hardly any padding, and one shape.

Which examples share a row is settled once, from their lengths alone, so an epoch has the same number of batches as any
other and any batch of any epoch can be made without those before it. (grain's packers read a stream and hold rows that
are half full: their place in it is no number.) The order of the rows changes with every epoch.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from .buckets import Batch

Packing = Literal["none", "first_fit", "best_fit"]


@dataclasses.dataclass(frozen=True)
class Packs:
    """Examples by the row that they share.

    Attributes:
      lengths: tokens of every example.
      width: tokens of a row.
      members: the examples of every row.
      batch_rows: rows of a batch.
    """

    lengths: np.ndarray
    width: int
    members: tuple[np.ndarray, ...]
    batch_rows: int

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


def pack(lengths: np.ndarray, width: int, batch_rows: int, packing: Packing) -> Packs:
    """Packs examples into rows of `width` tokens.

    Args:
      lengths: tokens of every example, none above `width`.
      width: tokens of a row.
      batch_rows: rows of a batch.
      packing: `first_fit` takes each example in turn and puts it into the first row that has room; `best_fit` takes
        the longest first and puts each into the row where it leaves least.

    Raises:
      ValueError: an example is longer than a row.
    """
    if lengths.max(initial=0) > width:
        raise ValueError(f"an example of {lengths.max()} tokens is longer than a row of {width}; cut it first")
    order = np.argsort(-lengths, kind="stable") if packing == "best_fit" else np.arange(len(lengths))
    place = _Best(width).place if packing == "best_fit" else _First(width, len(lengths)).place
    rows = _filled(order, lengths, place)
    return Packs(lengths, width, tuple(np.sort(np.array(row)) for row in rows), batch_rows)


def _filled(order: np.ndarray, lengths: np.ndarray, place: Callable[[int], int]) -> list[Sequence[int]]:
    rows: list[list[int]] = []
    for example in order.tolist():
        row = place(int(lengths[example]))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
    return [*rows]


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
