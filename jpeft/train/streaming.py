# SPDX-License-Identifier: Apache-2.0
"""Rows read while training goes on: a window of them at a time is tokenised, shuffled and made into batches.

A window is a small data set, so its batches are made as those of any other. Where a training stands is the number of
rows taken from every source before its window, and the batch within it: to go on, the window is read again.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from .batches import Batches
from .buckets import Buckets, choose_widths
from .data import Part
from .encoding import Encoder
from .examples import Examples, joined
from .feed import Fed
from .packing import Packs, pack
from .records import Bad, DataError, Record, Refusals
from .sections import Data


class Mixture:
    """Rows of several sources, each having its turn as often as its weight says; a source that ends begins again.

    Args:
      parts: sources, opened.
      taken: rows taken from each so far, over all passes; and `rows`, of one pass, where it is known.
    """

    def __init__(
        self, parts: Sequence[Part], taken: Sequence[int] | None = None, rows: Sequence[int | None] | None = None
    ):
        self.parts = parts
        self.taken = [0] * len(parts) if taken is None else [*taken]
        self.rows: list[int | None] = [None] * len(parts) if rows is None else [*rows]
        self._open = [self._opened(at) for at in range(len(parts))]

    def next(self) -> tuple[int, Record | Bad]:
        """The source whose turn it is, and its row."""
        weights = [part.opened.source.weight for part in self.parts]
        at = min(range(len(weights)), key=lambda i: ((self.taken[i] + 1) / weights[i], i))
        row = next(self._open[at], None)
        if row is None:  # the end of a pass
            self.rows[at] = self.taken[at] if self.rows[at] is None else self.rows[at]
            self._open[at] = self._opened(at)
            row = next(self._open[at])
        self.taken[at] += 1
        return at, row

    def _opened(self, at: int) -> Iterator[Record | Bad]:
        size = self.rows[at]
        return self.parts[at].opened.rows(self.taken[at] if size is None else self.taken[at] % size)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Batches of a training whose rows are not all held.

    Attributes:
      parts: sources.
      data: options.
      encoder: what makes tokens of rows.
      first: batches of the first window: what can be told before training, and the shapes of all windows.
    """

    parts: Sequence[Part]
    data: Data
    encoder: Encoder
    first: Batches

    def walk(
        self, seed: int, position: Mapping[str, Any] | None = None, own: Collection[int] | None = None
    ) -> Iterator[Fed]:
        """Batches without end, from a position on; `own` as of `Batches.collate`.

        Raises:
          DataError: the position is of another seed, or none of this data; a bad row; a window without a row.
        """
        start = self.position(seed, 0) if position is None else dict(position)
        self._check(seed, start)
        while True:
            mixture = Mixture(self.parts, start["taken"], start["rows"])
            refusals = Refusals(self.data.on_bad_row, self.data.max_bad_rows)
            refusals.count = start["skipped"]
            examples = window(mixture, self.data.window, self.encoder, refusals)
            first = self.first
            buckets = _buckets(examples, self.data, first.buckets.batch_rows, first.buckets.widths)
            batches = Batches(examples, buckets, first.accumulation, first.pad_id)
            order = batches.buckets.epoch(seed, start["window"])
            after = {
                "seed": seed,
                "window": start["window"] + 1,
                "index": 0,
                "taken": mixture.taken,
                "rows": mixture.rows,
                "skipped": refusals.count,
            }
            for at in range(start["index"], len(order)):
                here = start | {"index": at}
                following = after if at + 1 == len(order) else start | {"index": at + 1}
                yield Fed(here, following, batches.collate(order[at], own), *batches.sizes(order[at]))
            start = after

    def position(self, seed: int, updates: int) -> dict[str, Any]:
        """Where a training begins.

        Raises:
          DataError: it has begun: only a position that a batch came with tells where.
        """
        if updates:
            raise DataError(f"where a stream stands after {updates} updates is not known without its position")
        count = len(self.parts)
        return {"seed": seed, "window": 0, "index": 0, "taken": [0] * count, "rows": [None] * count, "skipped": 0}

    def _check(self, seed: int, position: Mapping[str, Any]) -> None:
        known = self.position(seed, 0)
        whole = {*position} == {*known} and all(type(position[name]) is int for name in ("seed", "window", "index"))
        if not whole or position["seed"] != seed or len(position["taken"]) != len(self.parts):
            raise DataError(
                f"{dict(position)} is no position in this stream of {len(self.parts)} sources, whose seed is {seed}; "
                "the data or the seed was another"
            )


def stream(
    parts: Sequence[Part], data: Data, encoder: Encoder, *, batch_size: int, accumulation: int, pad_id: int
) -> Streamed:
    """A stream, with its first window read; the other arguments as of `make_batches`.

    Raises:
      DataError: a bad row, or nothing to train on.
    """
    examples = window(Mixture(parts), data.window, encoder, Refusals(data.on_bad_row, data.max_bad_rows))
    digests = {part.opened.called: part.opened.digest for part in parts}
    examples = dataclasses.replace(examples, digests=digests)
    # the last width holds whatever a later window may bring
    widths = choose_widths([*examples.lengths, data.max_length], data.num_widths, data.max_length)
    buckets = _buckets(examples, data, batch_size * accumulation, widths)
    return Streamed(parts, data, encoder, Batches(examples, buckets, accumulation, pad_id))


def _buckets(examples: Examples, data: Data, batch_rows: int, widths: tuple[int, ...]) -> Buckets | Packs:
    if data.packing == "none":
        return Buckets(examples.lengths, widths, batch_rows)
    return pack(examples.lengths, data.max_length, batch_rows, data.packing)


def window(mixture: Mixture, size: int, encoder: Encoder, refusals: Refusals) -> Examples:
    """The examples of the next `size` rows of a mixture.

    Raises:
      DataError: a bad row that is to stop, or none of the rows has a token that can be trained.
    """
    held: dict[int, list[Record | Bad]] = {}
    for _ in range(size):
        at, row = mixture.next()
        held.setdefault(at, []).append(row)
    parts = mixture.parts
    found = [encoder(rows, parts[at].reader, refusals) for at, rows in sorted(held.items())]
    examples = joined([part for part in found if len(part)] or found)
    if not len(examples):
        raise DataError(f"none of {size} rows of the stream has a token that can be trained")
    return examples
