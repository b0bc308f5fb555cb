# SPDX-License-Identifier: Apache-2.0
"""From the sources of a configuration to examples, with every loss on the way counted.

  parts = read_rows(config.data, "CAUSAL_LM", "train")
  examples = encode(parts, config.data, tokenizer, None)

Truncated rows, lost tokens, dropped and bad rows are counted and printed. What cannot be trained on at all is an error
that names file and line.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from . import formats, store
from .batches import Batches, Fed, batches_by, batches_like, make_batches
from .encoding import Encoder, is_number
from .examples import IGNORED, Examples, joined, repeated
from .formats import Reader
from .records import DataError, Record, Refusals
from .sections import Data
from .sources import Opened, open_source
from .tokenizer import Tokenizer

__all__ = [
    "IGNORED",
    "Batches",
    "DataError",
    "Examples",
    "Fed",
    "Part",
    "batches_by",
    "batches_like",
    "encode",
    "label_names",
    "make_batches",
    "read_rows",
]


@dataclasses.dataclass(frozen=True)
class Part:
    """One source, opened, and what its columns mean."""

    opened: Opened
    reader: Reader


def read_rows(data: Data, task: str, split: str) -> list[Part]:
    """The sources of `split`, `train` or `eval`, and the form of each.

    Args:
      data: options.
      task: what the model is for, or `PREFERENCE`.
      split: `train` or `eval`.

    Raises:
      FileNotFoundError: no such file.
      DataError: a source cannot be read, holds no row, or its columns fit no form, or several.
    """
    parts = []
    for source in data.sources(split):
        opened = open_source(source, data.txt, streaming=data.streaming and split == "train")
        reader = formats.find(opened.columns, task, source.columns or {}, source.format, source.path)
        parts.append(Part(opened, reader))
    return parts


def label_names(parts: Sequence[Part]) -> tuple[str, ...]:
    """The labels of these rows, sorted: the names themselves, or `"0" ... "n-1"` for class numbers.

    Raises:
      DataError: fewer than two labels, names and numbers mixed, or class numbers that leave gaps.
    """
    column = parts[0].reader.columns.get("label") or parts[0].reader.columns["tags"]
    found = {label for part in parts for label in _labels(part) if isinstance(label, str | int)}
    numbers = {value for value in found if is_number(value)}
    words = {value for value in found if isinstance(value, str)}
    if numbers and not words:
        gaps = sorted({*range(max(numbers) + 1)} - numbers) if min(numbers) >= 0 else []
        if gaps:
            raise DataError(
                f"the classes of column {column!r} go up to {max(numbers)} without {gaps[0]}; give data.label_names"
            )
        names = tuple(str(value) for value in sorted(numbers))
    else:
        names = tuple(sorted(words, key=int if all(word.isdecimal() for word in words) else None))
        if numbers and names:
            raise DataError(
                f"column {column!r} holds names ({names[0]!r}) and numbers ({min(numbers)}); use one of them"
            )
    if len(names) < 2:
        raise DataError(
            f"classification needs two labels or more; column {column!r} holds {', '.join(names) or 'none'}"
        )
    return names


def _labels(part: Part) -> Iterator[Any]:
    """The class of every row, or of every word."""
    columns = part.reader.columns
    column = columns.get("label") or columns["tags"]
    for row in part.opened.rows():
        value = row.values.get(column) if isinstance(row, Record) else None
        yield from value if "tags" in columns and isinstance(value, list) else (value,)


def encode(
    parts: Sequence[Part], data: Data, tokenizer: Tokenizer, names: Sequence[str] | None, seed: int = 0
) -> Examples:
    """Tokenised rows: for classification with label `names`, for a language model without.

    Rows of a source that has a weight are repeated accordingly; `seed` draws the fraction.

    Raises:
      DataError: a bad row, more of them than may be skipped, or nothing left to train on.
    """
    encoder = Encoder(data, tokenizer, names)
    refusals = Refusals(data.on_bad_row, data.max_bad_rows)
    found = []
    for part in parts:
        source = part.opened.source
        key = store.key_of(part.opened, part.reader, data, encoder, names)
        examples = store.kept(data.cache, key, lambda part=part: encoder(part.opened.rows(), part.reader, refusals))
        known = dataclasses.replace(examples, digests={source.path: part.opened.digest})
        found.append(repeated(known, source.weight, seed) if len(known) else known)
    examples = joined(found)
    if refusals.shown:
        print_refused(refusals)
    if not len(examples):
        where = ", ".join(part.opened.source.path for part in parts)
        raise DataError(f"none of the {examples.rows} rows of {where} has a token that can be trained")
    return examples


def print_refused(refusals: Refusals) -> None:
    """Names the first bad rows."""
    from .progress import say

    say("bad rows, which are left out:\n  " + "\n  ".join(refusals.shown))
