# SPDX-License-Identifier: Apache-2.0
"""Rows of unequal length in batches of few widths: little padding, few compilations, an order that can be repeated.

A row goes to the narrowest width that holds it, and a batch is filled from one width alone; what is left of a width
at the end of an epoch goes to the next wider one, so each epoch has at most one batch that is not full.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

#: Widths are multiples of this: what vector units and accelerators' tiles are made for.
MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are computed together, and the number of tokens that each is padded to.

    Attributes:
      rows: the example of every row, `[rows]`; where rows are packed, those of every row.
    """

    width: int
    rows: np.ndarray | Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Rows by length.

    Attributes:
      lengths: tokens of every row.
      widths: ascending; the last holds the longest row.
      batch_rows: rows of a batch.
    """

    lengths: np.ndarray
    widths: tuple[int, ...]
    batch_rows: int

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, the same in every one."""
        return -(-len(self.lengths) // self.batch_rows)

    def epoch(self, seed: int, epoch: int) -> list[Batch]:
        """Every row once, shuffled, the same for the same (seed, epoch)."""
        rng = np.random.default_rng((seed, epoch))
        batches = self._fill(rng.permutation(len(self.lengths)))
        return [batches[i] for i in rng.permutation(len(batches))]

    def in_order(self) -> list[Batch]:
        """Every row once, not shuffled, for evaluation."""
        return self._fill(np.arange(len(self.lengths)))

    def _fill(self, order: np.ndarray) -> list[Batch]:
        batches: list[Batch] = []
        narrowest = np.searchsorted(self.widths, self.lengths)[order]
        left = order[:0]
        for index, width in enumerate(self.widths):
            rows = np.concatenate([left, order[narrowest == index]])
            full = len(rows) - len(rows) % self.batch_rows
            batches += [Batch(width, rows[i : i + self.batch_rows]) for i in range(0, full, self.batch_rows)]
            left = rows[full:]
        if len(left):
            batches.append(Batch(self.widths[max(np.searchsorted(self.widths, self.lengths[left]))], left))
        return batches


def choose_widths(lengths: Sequence[int] | np.ndarray, num_widths: int, max_length: int) -> tuple[int, ...]:
    """At most `num_widths` multiples of 8 (`max_length` may be one that is not) with the least padding on `lengths`.

    Exact, by dynamic programming: the least padded size of the rows up to width j is the least one up to a narrower
    width i, and the rows between the two padded to j.
    """
    ordered = np.sort(np.asarray(lengths))
    longest = int(ordered[-1])
    if longest > max_length:
        raise ValueError(f"a row of {longest} tokens is longer than max_length={max_length}; cut it first")
    widths = [*range(MULTIPLE, longest, MULTIPLE), min(-(-longest // MULTIPLE) * MULTIPLE, max_length)]
    rows = np.searchsorted(ordered, widths, side="right")  # up to each width
    size = rows * widths
    chosen: list[tuple[int, ...]] = [(width,) for width in widths]
    for _ in range(num_widths - 1):
        best, chains = size.copy(), list(chosen)
        for j in range(1, len(widths)):
            sizes = size[:j] + (rows[j] - rows[:j]) * widths[j]
            i = int(sizes.argmin())
            if sizes[i] < best[j]:
                best[j], chains[j] = sizes[i], (*chosen[i], widths[j])
        size, chosen = best, chains
    return chosen[-1]
