# SPDX-License-Identifier: Apache-2.0
"""What a row of data says, whatever its columns are called."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Message:
    """What one says; `trained` None leaves it to the role."""

    role: str
    content: str
    trained: bool | None = None


@dataclasses.dataclass(frozen=True)
class Text:
    """A text that a language model learns whole."""

    text: str


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text, or two, and its class."""

    text: str | tuple[str, str]
    label: Any


@dataclasses.dataclass(frozen=True)
class Talk:
    """A conversation."""

    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two conversations with the same beginning, of which the first ended better."""

    chosen: Talk
    rejected: Talk


@dataclasses.dataclass(frozen=True)
class Tagged:
    """Words, and the tag of each."""

    words: tuple[str, ...]
    tags: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, the text that answers it, and the answer's characters `[start, end)` there; None has no answer."""

    question: str
    context: str
    answer: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Written:
    """A text, and what a model is to write when it has read it."""

    source: str
    target: str


@dataclasses.dataclass(frozen=True)
class Pictured:
    """An image, as the name of its file or its bytes, and its class."""

    image: str | bytes
    label: Any


Item = Text | Labelled | Talk | Preference | Tagged | Asked | Written | Pictured
