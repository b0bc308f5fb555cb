# SPDX-License-Identifier: Apache-2.0
"""Tokenised examples as batches of fixed shapes.

Which rows make a batch is a `Buckets` (each row alone, padded to one of few widths) or a `Packs` (several in one row).
"""

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from .buckets import MULTIPLE, Batch, Buckets, choose_widths
from .examples import IGNORED, Examples
from .feed import Feed, Unit
from .packing import Packing, Packs, pack
from .sections import Data


@dataclasses.dataclass(frozen=True)
class Batches(Feed):
    """Tokenised examples as fixed shapes.

    Attributes:
      examples: tokenised rows.
      buckets: which rows make a batch.
      accumulation: micro-batches of a batch.
      pad_id: token that padding is filled with.
      beside: further numbers of every row of the examples, by the names that they have in a batch; 0 of padding.
    """

    examples: Examples
    buckets: Buckets | Packs
    accumulation: int
    pad_id: int
    beside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def unit(self) -> Unit:
        return Unit("tokens", 1)

    @property
    def shapes(self) -> str:
        """The widths that rows are padded to, or the one that they are packed into."""
        if isinstance(self.buckets, Packs):
            beside = "" if self.buckets.targets is None else f" and {self.buckets.target_width} of targets"
            return f"{self.buckets.width} tokens{beside}, packed with up to {self.buckets.most} examples"
        return f"one of {', '.join(map(str, self.buckets.widths))} tokens, padded"

    def collate(self, batch: Batch, own: Collection[int] | None = None) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask` `[accumulation, rows, width]` and `labels`; missing rows weigh nothing.

        With them `token_type_ids` where a row has two texts, and of packed rows `segment_ids` (from 1; padding has the
        last one's, which it may look at) and `positions` (from 0 in every example). Where targets are packed beside
        inputs, `decoder_segment_ids` likewise, `row_segments` (the segments of a row, 0 for none) and no positions,
        which the model counts. Of preference pairs the rows are chosen and rejected in turn.

        Args:
          batch: which rows.
          own: rows of a micro-batch that this process feeds; of the others only the shape is made. None is all.
        """
        examples, each = self.examples, self.examples.per_example
        rows = self.buckets.batch_rows * each
        shape = rows, batch.width
        most = self.buckets.most if isinstance(self.buckets, Packs) else None
        arrays = _empty(shape, self._target(batch.width), self.pad_id, examples, most)
        arrays |= {name: np.zeros(rows, values.dtype) for name, values in self.beside.items()}
        for at, members in enumerate(batch.rows):
            for k in range(each):
                if own is not None and (at * each + k) % (rows // self.accumulation) not in own:
                    continue
                chosen = [member * each + k for member in np.atleast_1d(members)]
                _put(arrays, at * each + k, chosen, examples)
                for name, values in self.beside.items():
                    arrays[name][at * each + k] = values[chosen[0]]
        arrays["attention_mask"][:, 0] = 1  # a row of padding attends to its first token: no softmax is over nothing
        return {name: x.reshape(self.accumulation, -1, *x.shape[1:]) for name, x in arrays.items()}

    def sizes(self, batch: Batch) -> tuple[int, int]:
        """Tokens of a batch: real ones, and with padding."""
        members = np.concatenate([np.atleast_1d(row) for row in batch.rows])
        each = self.examples.per_example
        width = batch.width + self._target(batch.width)
        return int(self._sizes[members].sum()), width * self.buckets.batch_rows * each

    def like(self, examples: Examples) -> "Batches":
        """Other examples in these widths, for which programs are compiled, and one more where a row needs it.

        They are never packed: each is to be told from the others. Beside packed rows they have up to 4 widths of their
        own.
        """
        rows, longest = self.buckets.batch_rows // self.accumulation, int(examples.lengths.max())
        packed = isinstance(self.buckets, Packs)
        widths = choose_widths(examples.lengths, 4, longest) if packed else self.buckets.widths
        widths += () if longest <= widths[-1] else choose_widths([longest], 1, longest)
        return Batches(examples, Buckets(examples.lengths, widths, rows), 1, self.pad_id)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sizes", self.examples.sizes)

    def _target(self, width: int) -> int:
        """Tokens that targets are padded to beside inputs of this width; 0 where there are no targets.

        In packed rows those of the fullest. Else the longest of any input that may stand in a batch of this width, so
        a width is compiled once.
        """
        if self.examples.labels_of != "target":
            return 0
        if isinstance(self.buckets, Packs):
            return self.buckets.target_width
        longest = int(self.examples.target_lengths[self.examples.lengths <= width].max(initial=1))
        return -(-longest // MULTIPLE) * MULTIPLE

    _sizes: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)


def make_batches(
    examples: Examples,
    *,
    batch_size: int,
    accumulation: int,
    max_length: int,
    num_widths: int,
    pad_id: int,
    packing: Packing = "none",
    max_target: int | None = None,
) -> Batches:
    """Batches of `batch_size` rows, `accumulation` of them at a time, in the widths with the least padding.

    Packed rows have all one width: `max_length`, and up to `max_target` (None: `max_length`) tokens of targets.
    """
    rows = batch_size * accumulation
    if packing != "none":
        targets = examples.target_lengths if examples.labels_of == "target" else None
        packs = pack(np.maximum(examples.lengths, 1), max_length, rows, packing, targets, max_target or max_length)
        return Batches(examples, packs, accumulation, pad_id)
    widths = choose_widths(examples.lengths, num_widths, max_length)
    return Batches(examples, Buckets(examples.lengths, widths, rows), accumulation, pad_id)


def batches_by(data: Data, examples: Examples, batch_size: int, pad_id: int) -> Batches:
    """Batches of `batch_size` rows, one at a time and not packed, of a length and in widths as `data` says."""
    return make_batches(
        examples,
        batch_size=batch_size,
        accumulation=1,
        pad_id=pad_id,
        max_length=data.max_length,
        num_widths=data.num_widths,
    )


def _empty(
    shape: tuple[int, int], target: int, pad_id: int, examples: Examples, most: int | None
) -> dict[str, np.ndarray]:
    """Arrays of padding; `most` is how many examples a packed row has at most, None where it is no such row."""
    rows = shape[0]
    labels = {"row": (rows,), "token": shape, "span": (rows, 2), "target": (rows, target)}[examples.labels_of]
    arrays = {
        "input_ids": np.full(shape, pad_id, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
        "labels": np.full(labels, IGNORED, np.int32),
    }
    if examples.types is not None:
        arrays["token_type_ids"] = np.zeros(shape, np.int32)
    if most is None:
        return arrays
    beside = {"positions": shape}
    if examples.labels_of == "target":
        beside = {"decoder_segment_ids": (rows, target), "row_segments": (rows, most)}
    return arrays | {name: np.zeros(size, np.int32) for name, size in {"segment_ids": shape, **beside}.items()}


def _put(arrays: dict[str, np.ndarray], at: int, members: list[int], examples: Examples) -> None:
    """Writes the examples `members` into row `at`, one behind the other; an empty input is one token of padding."""
    start = end = 0
    for segment, member in enumerate(members, 1):
        tokens, labels = examples.tokens[member], examples.labels[member]
        place = at, slice(start, start + len(tokens))
        size = max(len(tokens), 1)
        arrays["input_ids"][place], arrays["attention_mask"][at, start : start + size] = tokens, 1
        where = {"token": place, "target": (at, slice(end, end + len(labels)))} if labels.ndim else {}
        arrays["labels"][where.get(examples.labels_of, at)] = labels
        if examples.types is not None:
            arrays["token_type_ids"][place] = examples.types[member]
        if "segment_ids" in arrays:
            arrays["segment_ids"][at, start:] = segment
        if "positions" in arrays:
            arrays["positions"][place] = np.arange(len(tokens))
        if "row_segments" in arrays:
            arrays["decoder_segment_ids"][at, end:] = arrays["row_segments"][at, segment - 1] = segment
            end += len(labels)
        start += size
