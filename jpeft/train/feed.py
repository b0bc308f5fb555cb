# SPDX-License-Identifier: Apache-2.0
"""What a training is fed with: batches of fixed shapes, in an order that a position of three numbers stands for.

for fed in feed.walk(seed=0, position={"seed": 0, "epoch": 1, "index": 7}): ...
"""

import abc
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .buckets import Batch, Buckets
from .packing import Packs
from .records import DataError


@dataclasses.dataclass(frozen=True)
class Fed:
    """One batch of a training, and where it stands.

    Attributes:
      start: position of this batch, plain JSON; a walk from it gives this batch first.
      after: position of the next.
      arrays: `[accumulation, rows, ...]`, as the losses take them.
      real, padded: its tokens without padding and with it.
    """

    start: dict[str, Any]
    after: dict[str, Any]
    arrays: dict[str, Any]
    real: int
    padded: int


class Unit(NamedTuple):
    """What a training's rate counts: `tokens`, of 1 token each, or `images`, of so many each."""

    name: str
    tokens: int


def counted(entry: Mapping[str, Any]) -> str:
    """The name of the unit that a line of metrics.jsonl counts."""
    return "images" if "images_per_s" in entry else "tokens"


class Feed(abc.ABC):
    """Examples as batches of fixed shapes.

    Attributes:
      examples: what is learnt from: it has a length, `labels`, `digests`, `per_example`, a `warning` or None, and says
        what became of all rows.
      buckets: which of them make a batch.
      accumulation: micro-batches of a batch.
    """

    examples: Any
    buckets: Buckets | Packs
    accumulation: int

    @property
    @abc.abstractmethod
    def unit(self) -> Unit:
        """What rates count."""

    @property
    @abc.abstractmethod
    def shapes(self) -> str:
        """What every row of a batch is, in words."""

    @abc.abstractmethod
    def collate(self, batch: Batch, own: Collection[int] | None = None) -> dict[str, np.ndarray]:
        """The arrays of a batch `[accumulation, rows, ...]`; missing rows weigh nothing.

        Args:
          batch: which rows.
          own: rows of a micro-batch that this process feeds; of the others only the shape is made. None is all.
        """

    @abc.abstractmethod
    def sizes(self, batch: Batch) -> tuple[int, int]:
        """Tokens of a batch: real ones, and with padding."""

    @abc.abstractmethod
    def like(self, examples: Any) -> "Feed":
        """Other examples in the shapes of these, for which programs are compiled, to be evaluated."""

    def walk(
        self, seed: int, position: Mapping[str, Any] | None = None, own: Collection[int] | None = None
    ) -> Iterator[Fed]:
        """Batches without end: those of every epoch, from a position on.

        Args:
          seed: of the order.
          position: None is the beginning.
          own: as of `collate`.

        Raises:
          DataError: the position is of another seed, or none of this data.
        """
        epoch, index = self._start(seed, position)
        while True:
            order = self.buckets.epoch(seed, epoch)
            for at in range(index, len(order)):
                last = at + 1 == len(order)
                start = {"seed": seed, "epoch": epoch, "index": at}
                after = {"seed": seed, "epoch": epoch + last, "index": 0 if last else at + 1}
                yield Fed(start, after, self.collate(order[at], own), *self.sizes(order[at]))
            epoch, index = epoch + 1, 0

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, both of every pair."""
        return self.buckets.batch_rows * self.examples.per_example // self.accumulation

    def position(self, seed: int, updates: int) -> dict[str, Any]:
        """Where a training stands after so many updates."""
        epoch, index = divmod(updates, self.buckets.num_batches)
        return {"seed": seed, "epoch": epoch, "index": index}

    def _start(self, seed: int, position: Mapping[str, Any] | None) -> tuple[int, int]:
        match position:
            case None:
                return 0, 0
            case {"seed": int(its), "epoch": int(epoch), "index": int(index)} if (
                its == seed and epoch >= 0 and 0 <= index < self.buckets.num_batches
            ):
                return epoch, index
        raise DataError(
            f"{dict(position)} is no position in this data, whose seed is {seed} and which has "
            f"{self.buckets.num_batches} batches an epoch; the data, the seed or the batch size was another"
        )
