# SPDX-License-Identifier: Apache-2.0
"""From the sources of a configuration to examples, with every loss on the way counted.

  parts = read_rows(config.data, "CAUSAL_LM", "train")
  examples = encode(parts, config.data, tokenizer, None)

Truncated rows, lost tokens, dropped and bad rows are counted and printed. What cannot be trained on at all is an error
that names file and line.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, overload

from . import formats, pictures, store
from .batches import Batches, batches_by, make_batches
from .encoding import Encoder, is_number
from .examples import IGNORED, Examples, drawn, joined
from .feed import Feed
from .formats import Reader as Form
from .pictures import Pictures
from .picturing import Picturer
from .readers import Reader, Sight
from .records import Bad, DataError, Record, Refusals, brief
from .sections import Data
from .sections.model import SEEING
from .sources import Opened, open_source
from .tokenizer import Tokenizer

__all__ = [
    "IGNORED",
    "Batches",
    "DataError",
    "Examples",
    "Part",
    "batches_by",
    "encode",
    "evaluated",
    "label_names",
    "make_batches",
    "read_rows",
    "told",
]


_Made = TypeVar("_Made", Examples, Pictures)


@dataclasses.dataclass(frozen=True)
class Part:
    """One source, opened, and what its columns mean."""

    opened: Opened
    reader: Form


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
        streaming = data.streaming and split == "train"
        opened = open_source(source, data.txt, streaming=streaming, images=task in SEEING)
        reader = formats.find(opened.columns, task, source.columns or {}, source.format, source.path)
        parts.append(Part(opened, reader))
    return parts


def label_names(parts: Sequence[Part]) -> tuple[str, ...]:
    """The labels of these rows, sorted: the names themselves, or `"0" ... "n-1"` for class numbers without names.

    Raises:
      DataError: fewer than two labels, names and numbers mixed, class numbers that leave gaps, or sources that name
        them in different ways.
    """
    column = _class_column(parts[0])
    known = {names for part in parts if (names := told(part))}
    if len(known) > 1:
        raise DataError(
            f"the sources name the classes of column {column!r} in different ways, "
            f"{' and '.join(brief(list(names)) for names in sorted(known))}; give data.label_names"
        )
    if known:
        return known.pop()
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
    column = _class_column(part)
    for row in part.opened.rows():
        value = row.values.get(column) if isinstance(row, Record) else None
        yield from value if "tags" in part.reader.columns and isinstance(value, list) else (value,)


def _class_column(part: Part) -> str:
    """The column of the class of a row, or of those of its words."""
    return part.reader.columns.get("label") or part.reader.columns["tags"]


def told(part: Part) -> tuple[str, ...]:
    """What a data set says that its class numbers mean; empty where it says nothing."""
    return part.opened.classes.get(_class_column(part), ())


def _by_name(part: Part, names: Sequence[str] | None) -> Part:
    """With the names of classes in the place of their numbers, where the data set numbers `names` in another way."""
    if names is None or not (own := told(part)) or own == tuple(names) or {*own}.isdisjoint(names):
        return part
    column, read = _class_column(part), part.opened.rows

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(each) for each in value]
        return own[value] if is_number(value) and 0 <= value < len(own) else value

    def rows(start: int) -> Iterator[Record | Bad]:
        for row in read(start):
            if isinstance(row, Record) and column in row.values:
                yield Record({**row.values, column: named(row.values[column])}, row.where)
            else:
                yield row

    return dataclasses.replace(part, opened=dataclasses.replace(part.opened, _rows=rows))


@overload
def encode(
    parts: Sequence[Part], data: Data, reader: Tokenizer, names: Sequence[str] | None, seed: int = 0
) -> Examples: ...
@overload
def encode(
    parts: Sequence[Part], data: Data, reader: Sight, names: Sequence[str] | None, seed: int = 0
) -> Pictures: ...
@overload
def encode(
    parts: Sequence[Part], data: Data, reader: Reader, names: Sequence[str] | None, seed: int = 0
) -> Examples | Pictures: ...
def encode(
    parts: Sequence[Part], data: Data, reader: Reader, names: Sequence[str] | None, seed: int = 0
) -> Examples | Pictures:
    """Tokenised rows, or images: for classification with label `names`, for a language model without.

    Rows of a source that has a weight are repeated accordingly; `seed` draws the fraction. Class numbers are those of
    `names`, unless the source is a data set that says which of these names each of its numbers is.

    Raises:
      DataError: a bad row, more of them than may be skipped, or nothing left to train on.
    """
    refusals = Refusals(data.on_bad_row, data.max_bad_rows)
    parts = [_by_name(part, names) for part in parts]
    if isinstance(reader, Sight):
        picturer = Picturer(data, reader, names or ())
        made = [picturer(part.opened, part.reader, refusals) for part in parts]
        examples = pictures.joined(_weighed(made, parts, seed))
    else:
        encoder = Encoder(data, reader, names)
        made = [_tokenised(part, data, encoder, names, refusals) for part in parts]
        examples = joined(_weighed(made, parts, seed))
    if refusals.shown:
        print_refused(refusals)
    if not len(examples):
        where = ", ".join(part.opened.source.path for part in parts)
        what = "an image" if isinstance(reader, Sight) else "a token"
        raise DataError(f"none of the {examples.rows} rows of {where} has {what} that can be trained")
    return examples


def _tokenised(
    part: Part, data: Data, encoder: Encoder, names: Sequence[str] | None, refusals: Refusals
) -> Examples:  # fmt: skip
    """The examples of one source, kept where `data.cache` says."""
    key = store.key_of(part.opened, part.reader, data, encoder, names)
    examples = store.kept(data.cache, key, lambda: encoder(part.opened.rows(), part.reader, refusals))
    return dataclasses.replace(examples, digests={part.opened.called: part.opened.digest})


def _weighed(made: Sequence[_Made], parts: Sequence[Part], seed: int) -> list[_Made]:
    """What each source gives, as often as its weight says."""
    weights = [part.opened.source.weight for part in parts]
    return [
        one if weight == 1 else one.chosen(drawn(len(one), weight, seed))
        for one, weight in zip(made, weights, strict=True)
    ]


def evaluated(data: Data, examples: Examples | Pictures, batch_size: int, reader: Reader) -> Feed:
    """Batches of what is evaluated and not trained on, texts in widths as `data` says."""
    if isinstance(reader, Sight):
        assert isinstance(examples, Pictures)
        size = min(batch_size, len(examples))
        return pictures.pixels(examples, reader.processor, reader.image, reader.tokens, batch_size=size)
    assert isinstance(examples, Examples)
    return batches_by(data, examples, batch_size, reader.pad_id)


def print_refused(refusals: Refusals) -> None:
    """Names the first bad rows."""
    from .progress import say

    say("bad rows, which are left out:\n  " + "\n  ".join(refusals.shown))
