# SPDX-License-Identifier: Apache-2.0
"""Rows to token ids and labels, with an account of what was cut, dropped and left out.

Which labels count is settled by their place in a row. So a model whose padding token is its end-of-text token learns to
stop all the same.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from . import masking, placing, templates
from .examples import IGNORED, Examples, Labelling, joined
from .formats import Reader
from .items import Asked, Item, Labelled, Preference, Tagged, Talk, Text, Written
from .records import Bad, DataError, Record, Refusals, brief
from .sections import Data
from .tokenizer import Tokenizer, ends

#: What the labels of an item are of; of all others they are of tokens.
LABELS_OF: Mapping[type, Labelling] = {Labelled: "row", Asked: "span", Written: "target"}
#: Rows that are held as text at a time.
_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of tokens.

    Attributes:
      tokens: ids.
      labels: a class, or a list, as `Examples.labels_of` says.
      lost: tokens that were cut off.
      types: which of two texts each token is of, where the model is told.
      unpredicted: labels at the start that nothing predicts: the first of a language model's.
    """

    tokens: Sequence[int]
    labels: Any
    lost: int = 0
    types: Sequence[int] | None = None
    unpredicted: int = 0

    @property
    def trains(self) -> bool:
        """Whether a label counts."""
        return not isinstance(self.labels, list) or any(label != IGNORED for label in self.labels[self.unpredicted :])


class Encoder:
    """Encodes the rows of any source in one way.

    Args:
      data: options.
      tokenizer: of the model.
      names: labels of a classification, else None.
    """

    def __init__(self, data: Data, tokenizer: Tokenizer, names: Sequence[str] | None):
        self._data, self._tokenizer, self._names = data, tokenizer, names
        own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self._ends = {*ends(tokenizer.folder, tokenizer), *own}
        self._templates: dict[str | None, templates.Template] = {}

    def template(self, reader: Reader) -> templates.Template:
        """The template for the conversations of a form.

        Raises:
          ValueError: there is none.
        """
        name = self._data.template or reader.form.template
        if name not in self._templates:
            self._templates[name] = templates.load(self._tokenizer, name)
        return self._templates[name]

    def spoken(self, readers: Sequence[Reader]) -> templates.Template | None:
        """The template of the conversations among several forms; None where there are none.

        Where the forms differ it is that of messages, not that of rows which are one text after another.
        """
        talks = sorted((r for r in readers if r.form.talks), key=lambda r: r.form.template is not None)
        return self.template(talks[0]) if talks else None

    def known_by(self, readers: Sequence[Reader]) -> dict[str, Any]:
        """What the tokens of several forms follow from beside rows, options and tokenizer, for a run's record.

        SHA-256 of the templates (None without conversations), and the tokens that begin and end a text.
        """
        said = [self.identity(reader) for reader in readers]
        used = sorted({json.dumps(one["template"]) for one in said if one["template"] is not None})
        digest = hashlib.sha256("\n".join(used).encode()).hexdigest() if used else None
        return {"template_sha256": digest, "special_tokens": {name: said[0][name] for name in ("starts", "ends")}}

    def identity(self, reader: Reader) -> dict[str, Any]:
        """What the tokens of a form follow from beside the rows and options, as plain values."""
        template = self.template(reader) if reader.form.talks else None
        return {
            "tokenizer": self._tokenizer.digest,
            "ends": sorted(self._ends),
            "starts": self._tokenizer.bos_id,
            "types": self._tokenizer.has_types,
            "template": None if template is None else [template.source, sorted(template.tokens.items())],
        }

    def __call__(self, rows: Iterable[Record | Bad], reader: Reader, refusals: Refusals) -> Examples:
        """The examples of one source, without its digest; empty where none is left.

        Raises:
          DataError: a row is bad, and that is to stop; the options do not go with the form.
        """
        self._check(reader)
        before = refusals.count
        good = refusals.passing(self._item(row, reader) for row in rows)
        parts = [self._some(chunk, reader, refusals) for chunk in _chunks(good, _AT_ONCE)]
        per = 2 if reader.form.name == "preference" else 1
        found = joined(parts) if parts else Examples([], [], 0, 0, 0, 0, {}, per_example=per)
        bad = refusals.count - before
        return dataclasses.replace(found, rows=found.rows + bad - found.skipped, skipped=bad)

    def _check(self, reader: Reader) -> None:
        if self._data.longer == "split" and reader.form.name != "text":
            raise DataError(f"data.longer=split cuts plain texts into rows; {reader.form.name} rows lose their sense")
        texts = {"CAUSAL_LM", "SEQ_2_SEQ_LM"} & {*reader.form.tasks}
        if self._data.packing != "none" and (reader.form.name == "preference" or not texts):
            raise DataError(
                f"data.packing={self._data.packing} puts several texts into one row; {reader.form.name} rows have one "
                "answer each"
            )
        if reader.form.talks:
            self.template(reader)

    def _item(self, row: Record | Bad, reader: Reader) -> Any:
        if isinstance(row, Bad):
            return row
        try:
            return _Said(row.where, reader(row.values))
        except ValueError as error:
            return Bad(row.where, str(error))

    def _some(self, chunk: list["_Said"], reader: Reader, refusals: Refusals) -> Examples:
        before = refusals.count
        found = [*refusals.passing(self._encoded(chunk, reader))]  # type: ignore[arg-type]
        kept = [rows for rows in found if all(row.trains for row in rows)]
        flat = [row for rows in kept for row in rows]
        labels_of = LABELS_OF.get(type(chunk[0].item), "token")
        ends = self._ends if labels_of == "target" or (self._names is None and labels_of == "token") else None
        return Examples(
            [np.asarray(row.tokens, np.int32) for row in flat],
            [np.asarray(row.labels, np.int32) for row in flat],
            rows=len(chunk),
            truncated=sum(row.lost > 0 for rows in found for row in rows),
            lost=sum(row.lost for rows in found for row in rows),
            dropped=len(found) - len(kept),
            digests={},
            skipped=refusals.count - before,
            unended=0 if ends is None else sum(ends.isdisjoint(row.labels[row.unpredicted :]) for row in flat),
            types=None if any(row.types is None for row in flat) or not flat else _types(flat),
            per_example=2 if reader.form.name == "preference" else 1,
            labels_of=labels_of,
        )

    def _encoded(self, chunk: list["_Said"], reader: Reader) -> Iterator[list[Row] | Bad]:
        """Rows of every item: one; several of a text that is split, or asked about; two of a preference."""
        items: list[Any] = [said.item for said in chunk]
        match items[0]:
            case Text():
                yield from self._texts([item.text for item in items])
            case Labelled():
                yield from self._labelled(chunk)
            case Tagged():
                yield from _each(chunk, self._tagged)
            case Written():
                yield from self._written(items)
            case Asked():
                yield from _each(chunk, self._asked)
            case _:
                yield from _each(chunk, lambda item: [self._talk(talk, reader) for talk in _talks(item)])

    def _texts(self, texts: list[str]) -> Iterator[list[Row]]:
        end = [] if self._tokenizer.eos_id is None else [self._tokenizer.eos_id]
        size = self._data.max_length
        for whole in self._tokenizer.encode(texts):
            ids = self._started(whole)
            ids = ids if ids[-1:] == end else ids + end
            if self._data.longer == "split":
                for at in range(0, max(len(ids), 1), size):
                    yield [Row(ids[at : at + size], ids[at : at + size], unpredicted=1)]
            else:
                yield [Row(ids[:size], ids[:size], max(len(ids) - size, 0), unpredicted=1)]

    def _labelled(self, chunk: list["_Said"]) -> Iterator[list[Row] | Bad]:
        found = [said.item.text for said in chunk]  # type: ignore[union-attr]
        tokens, lost, types = self._tokenizer.cut_typed(found, self._data.max_length)
        typed = self._tokenizer.has_types and isinstance(found[0], tuple)
        assert self._names is not None
        for said, ids, gone, kinds in zip(chunk, tokens, lost, types, strict=True):
            try:
                label = class_of(said.item.label, self._names)  # type: ignore[union-attr]
                yield [Row(ids, label, gone, kinds if typed else None)]
            except ValueError as error:
                yield Bad(said.where, str(error))

    def _tagged(self, item: Tagged) -> list[Row]:
        assert self._names is not None
        tags = [class_of(tag, self._names) for tag in item.tags]
        row = placing.by_word(item, tags, self._tokenizer, self._data.max_length)
        return [Row(row.tokens, row.labels, row.lost)]

    def _asked(self, item: Asked) -> list[Row]:
        size = self._data.max_length
        stride = size // 4 if self._data.stride is None else self._data.stride
        found = placing.answers(item, self._tokenizer, size, stride)
        typed = self._tokenizer.has_types
        return [Row(row.tokens, row.labels, types=row.types if typed else None) for row in found]

    def _written(self, items: list[Written]) -> Iterator[list[Row]]:
        size, most = self._data.max_length, self._data.max_target or self._data.max_length
        end = [] if self._tokenizer.eos_id is None else [self._tokenizer.eos_id]
        sources, cut = self._tokenizer.cut([item.source for item in items], size)
        for ids, lost, whole in zip(sources, cut, self._tokenizer.encode([i.target for i in items]), strict=True):
            target = whole if whole[-1:] == end else whole + end
            yield [Row(ids, target[:most], lost + max(len(target) - most, 0))]

    def _talk(self, talk: Talk, reader: Reader) -> Row:
        loss_on = "last" if reader.form.name == "preference" else self._data.loss_on
        learnt = masking.chosen(talk.messages, loss_on)
        whole = loss_on == "all" and len(learnt) == len(talk.messages)
        text, spans = masking.rendered(self.template(reader), talk.messages, [] if whole else learnt)
        ids, offsets = self._tokenizer.located(text)
        labels = masking.labels(ids, offsets, [(0, len(text))] if whole else spans)
        extra = len(ids) - len(self._started(ids))
        size = self._data.max_length
        ids, labels = ids[extra:], labels[extra:]
        return Row(ids[:size], labels[:size], max(len(ids) - size, 0), unpredicted=1)

    def _started(self, ids: list[int]) -> list[int]:
        """Ids that begin once: without a start token that the text held and the tokenizer put in front again."""
        start = self._tokenizer.bos_id
        return ids[1:] if start is not None and ids[:2] == [start, start] else ids


@dataclasses.dataclass(frozen=True)
class _Said:
    where: str
    item: Item


def _each(chunk: list[_Said], encode: Callable[[Any], list[Row]]) -> Iterator[list[Row] | Bad]:
    """The rows of every item by itself, or what is wrong with it."""
    for said in chunk:
        try:
            yield encode(said.item)
        except ValueError as error:
            yield Bad(said.where, str(error))


def _talks(item: Any) -> tuple[Talk, ...]:
    return (item.chosen, item.rejected) if isinstance(item, Preference) else (item,)


def class_of(value: Any, names: Sequence[str]) -> int:
    """The number of a label: its place among the names, or itself.

    Raises:
      ValueError: it is none.
    """
    if isinstance(value, str) and value in names:
        return names.index(value)
    if is_number(value) and 0 <= value < len(names):
        return value
    known = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
    raise ValueError(
        f"label {brief(value)} is out of range; there are {len(names)} labels, {known}, or 0 to {len(names) - 1}"
    )


def is_number(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _types(rows: Sequence[Row]) -> list[np.ndarray]:
    return [np.asarray(row.types, np.int32) for row in rows]


def _chunks(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    values = iter(values)
    while chunk := list(itertools.islice(values, size)):
        yield chunk
