# SPDX-License-Identifier: Apache-2.0
"""What the columns of a data set mean: which of the usual forms they have, and what a row of that form says.

A form is found by its columns alone. Where several forms or none would fit, an error lists the columns and what every
form needs; `data.format` names one, and `data.columns` says which column is which part.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from .items import Item, Labelled, Message, Pictured, Preference, Talk, Text, Written
from .marked import asked, tagged
from .records import DataError, brief

#: What data sets call those who speak, and what templates call them.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


Parts = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to write a row.

    Attributes:
      name: as `data.format` takes it.
      tasks: that it can be read for.
      needs: names that each part's column may have; a part in `optional` may be missing.
      optional: parts.
      read: parts by name -> what the row says.
      template: the template where the configuration names none; None is the tokenizer's own.
      talks: whether its rows are messages, which a template makes text.
    """

    name: str
    tasks: tuple[str, ...]
    needs: Mapping[str, tuple[str, ...]]
    read: Callable[[Parts], Item]
    optional: tuple[str, ...] = ()
    template: str | None = None
    talks: bool = False

    def columns(self, given: Collection[str], named: Mapping[str, str]) -> dict[str, str] | None:
        """The column of every part, or None where one is missing."""
        found = {}
        for part, names in self.needs.items():
            wanted = (named[part],) if part in named else names
            column = next((name for name in wanted if name in given and name not in found.values()), None)
            if column is not None:
                found[part] = column
            elif part not in self.optional or part in named:
                return None
        return found

    def optional_columns(self, given: Collection[str]) -> dict[str, str]:
        """The columns of the optional parts that are there, for the first row need not have had them."""
        return {p: name for p in self.optional for name in reversed(self.needs[p]) if name in given}

    def __str__(self) -> str:
        parts = [f"[{'|'.join(n)}]" if p in self.optional else "|".join(n) for p, n in self.needs.items()]
        return f"{self.name}: {', '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class Reader:
    """A form, and the columns that hold its parts."""

    form: Form
    columns: Mapping[str, str]

    def __call__(self, values: Mapping[str, Any]) -> Item:
        """What a row says.

        Raises:
          ValueError: a part is missing or of the wrong type; the message is for the row's line.
        """
        columns = self.form.optional_columns(values) | dict(self.columns)
        for part, column in self.columns.items():
            if column not in values and part not in self.form.optional:
                raise ValueError(f"it has no {column!r}")
        return self.form.read(_Row({part: values.get(column) for part, column in columns.items()}, columns))


class _Row(dict[str, Any]):
    """Parts of a row, which are called as their columns are in messages."""

    def __init__(self, parts: Parts, columns: Mapping[str, str]):
        super().__init__(parts)
        self.columns = columns


def find(given: Collection[str], task: str, named: Mapping[str, str], form: str | None, where: str) -> Reader:
    """The form of a data set with columns `given`.

    Args:
      given: names of the columns.
      task: what is trained, such as `CAUSAL_LM`, or `PREFERENCE`.
      named: columns by part, as the configuration names them.
      form: the form's name, or None to find it.
      where: the file, for messages.

    Raises:
      DataError: no form fits, or several.
    """
    usable = [f for f in FORMS if task in f.tasks and form in (None, f.name)]
    unknown = sorted({*named} - {part for f in usable for part in f.needs})
    if unknown:
        raise DataError(f"data.columns names {unknown[0]!r}, which is no part of {_listed(usable)}")
    fitting = [
        (f, columns) for f in usable if {*named} <= {*f.needs} and (columns := f.columns(given, named)) is not None
    ]
    for part, column in named.items():
        if column not in given:
            key = part if part in ("text", "label") else "columns"
            raise DataError(f"{where} has no column {column!r}; it has {', '.join(given)} (see data.{key})")
    if len(fitting) == 1:
        return Reader(*fitting[0])
    if not fitting:
        raise DataError(f"{where} has the columns {', '.join(given)}, which fit no form for {task}; {_listed(usable)}")
    several = ", ".join(form.name for form, _ in fitting)
    raise DataError(
        f"{where} has the columns {', '.join(given)}, which fit several forms: {several}; say which by data.format"
    )


def _listed(forms: list[Form]) -> str:
    return "the forms and their columns are\n  " + "\n  ".join(map(str, forms))


def _string(row: Parts, part: str) -> str:
    value = row[part]
    if not isinstance(value, str):
        raise ValueError(f"column {_column(row, part)!r} must be text, got {brief(value)}")
    return value


def _filled(row: Parts, part: str) -> str:
    text = _string(row, part)
    if not text.strip():
        raise ValueError(f"column {_column(row, part)!r} is empty")
    return text


def _column(row: Parts, part: str) -> str:
    return row.columns[part] if isinstance(row, _Row) else part


def _optional(row: Parts, part: str) -> str:
    return "" if row.get(part) is None else _string(row, part)


def _texts(row: Parts, part: str) -> str:
    """One text, or a list of them, as paragraphs."""
    value = row[part]
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return "\n".join(value)
    return _string(row, part)


def _text(row: Parts) -> Item:
    return Text(_filled(row, "text"))


def _labelled(row: Parts) -> Item:
    return Labelled(_filled(row, "text"), row["label"])


def _pair(row: Parts) -> Item:
    return Labelled((_filled(row, "text"), _texts(row, "pair")), row["label"])


def _alpaca(row: Parts) -> Item:
    asked = [text for text in (_filled(row, "instruction"), _optional(row, "input")) if text]
    system = _optional(row, "system")
    said = [Message("system", system)] if system else []
    return Talk((*said, Message("user", "\n\n".join(asked)), Message("assistant", _filled(row, "output"))))


def _prompted(row: Parts) -> Item:
    return Talk((Message("user", _string(row, "prompt")), Message("assistant", _filled(row, "completion"))))


def _answered(row: Parts) -> Item:
    context = [] if row.get("context") is None else [_texts(row, "context")]
    asked = "\n\n".join([*context, _string(row, "question")])
    return Talk((Message("user", asked), Message("assistant", _texts(row, "answer"))))


def _tagged(row: Parts) -> Item:
    return tagged(row["words"], row["tags"])


def _asked(row: Parts) -> Item:
    return asked(_filled(row, "question"), _filled(row, "context"), row["answers"])


def _written(row: Parts) -> Item:
    return Written(_filled(row, "source"), _filled(row, "target"))


def _pictured(row: Parts) -> Item:
    """Of a file's name, its bytes, or what `datasets` writes for an image: both, of which one may be missing."""
    value = row["image"]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise ValueError(f"column {_column(row, 'image')!r} must name an image file, or hold one; got {brief(value)}")
    return Pictured(value, row["label"])


def _messages(row: Parts) -> Item:
    return Talk(tuple(_turns(row["messages"], _column(row, "messages"), "role", "content")))


def _sharegpt(row: Parts) -> Item:
    system = _optional(row, "system")
    turns = tuple(_turns(row["conversations"], _column(row, "conversations"), "from", "value"))
    return Talk(((Message("system", system),) if system else ()) + turns)


def _preference(row: Parts) -> Item:
    before = _sayings(row, "prompt", "user") if row.get("prompt") is not None else ()
    both = [_sayings(row, part, "assistant") for part in ("chosen", "rejected")]
    if before and all(talk[: len(before)] == before for talk in both):
        before = ()  # the answers repeat it
    chosen, rejected = ((*before, *talk) for talk in both)
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant" or len(chosen) < 2:
        raise ValueError("chosen and rejected must each end with what the assistant says, to a prompt")
    if chosen[:-1] != rejected[:-1] and not (before or _same_start(chosen, rejected)):
        raise ValueError("chosen and rejected must begin with the same prompt")
    return Preference(Talk(chosen), Talk(rejected))


def _same_start(one: tuple[Message, ...], other: tuple[Message, ...]) -> bool:
    return bool(one and other) and one[0] == other[0]


def _sayings(row: Parts, part: str, role: str) -> tuple[Message, ...]:
    """Messages, or one text that `role` says."""
    value = row[part]
    if isinstance(value, list):
        return tuple(_turns(value, _column(row, part), "role", "content"))
    return (Message(role, _string(row, part)),)


def _turns(value: Any, column: str, role: str, content: str) -> Iterator[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"column {column!r} must be a list of messages, got {brief(value)}")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or role not in turn or content not in turn:
            raise ValueError(f"message {number} of {column!r} must have {role!r} and {content!r}, got {brief(turn)}")
        who = turn[role]
        if not isinstance(who, str) or who not in _ROLES:
            raise ValueError(f"message {number} of {column!r} is by {brief(who)}; known are {', '.join(_ROLES)}")
        yield Message(_ROLES[who], _content(turn[content], number, column), _trained(turn, number, column))


def _content(value: Any, number: int, column: str) -> str:
    """A text, or a list of parts that are texts."""
    if isinstance(value, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type", "text") == "text" else None for p in value]
        if parts and all(isinstance(part, str) for part in parts):
            return "".join(parts)  # type: ignore[arg-type]
    if not isinstance(value, str):
        raise ValueError(f"message {number} of {column!r} must be text, got {brief(value)}")
    return value


def _trained(turn: Mapping[str, Any], number: int, column: str) -> bool | None:
    """What the message itself says of its loss: `"train": false`, or `"weight": 0`."""
    said = [turn[key] for key in ("train", "weight") if turn.get(key) is not None]
    if not said:
        return None
    if said[0] not in (0, 1):
        raise ValueError(f"message {number} of {column!r}: train and weight are 0 or 1, got {brief(said[0])}")
    return bool(said[0])


_LABEL = ("label", "labels")

#: All forms, in the order in which they are listed.
FORMS = (
    Form("text", ("CAUSAL_LM",), {"text": ("text",)}, _text),
    Form(
        "alpaca",
        ("CAUSAL_LM",),
        {"instruction": ("instruction",), "input": ("input",), "output": ("output",), "system": ("system",)},
        _alpaca,
        ("input", "system"),
        talks=True,
    ),
    Form("messages", ("CAUSAL_LM",), {"messages": ("messages",)}, _messages, talks=True),
    Form(
        "sharegpt",
        ("CAUSAL_LM",),
        {"conversations": ("conversations", "conversation"), "system": ("system",)},
        _sharegpt,
        ("system",),
        talks=True,
    ),
    Form(
        "prompt_completion",
        ("CAUSAL_LM",),
        {"prompt": ("prompt",), "completion": ("completion", "response")},
        _prompted,
        template="plain",
        talks=True,
    ),
    Form(
        "question_answer",
        ("CAUSAL_LM",),
        {"question": ("question", "problem"), "context": ("context", "contexts"), "answer": ("answer", "solution")},
        _answered,
        ("context",),
        talks=True,
    ),
    Form(
        "preference",
        ("PREFERENCE",),
        {"prompt": ("prompt", "question"), "chosen": ("chosen",), "rejected": ("rejected",)},
        _preference,
        ("prompt",),
        talks=True,
    ),
    Form("sentence", ("SEQ_CLS",), {"text": ("text", "sentence"), "label": _LABEL}, _labelled),
    Form(
        "sentence_pair",
        ("SEQ_CLS",),
        {
            "text": ("sentence1", "premise", "question1", "text1", "question"),
            "pair": ("sentence2", "hypothesis", "question2", "text2", "sentence", "text_pair", "context", "contexts"),
            "label": _LABEL,
        },
        _pair,
    ),
    Form(
        "words",
        ("TOKEN_CLS",),
        {"words": ("tokens", "words"), "tags": ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels")},
        _tagged,
    ),
    Form(
        "squad",
        ("QUESTION_ANS",),
        {"question": ("question",), "context": ("context",), "answers": ("answers",)},
        _asked,
    ),
    Form(
        "source_target",
        ("SEQ_2_SEQ_LM",),
        {
            "source": ("source", "input", "document", "article", "dialogue", "question", "text"),
            "target": ("target", "summary", "highlights", "output", "answer"),
        },
        _written,
    ),
    Form(
        "image",
        ("IMAGE_CLS",),
        {"image": ("image", "img", "file_name", "image_path", "path", "file"), "label": _LABEL},
        _pictured,
    ),
)
