# SPDX-License-Identifier: Apache-2.0
"""Which characters of a conversation's text are learnt, found by their place and never by what token stands there.

What a message is made of, its end marker included, stands between the text that would be rendered before an answer and
the text with the answer. Not every template renders the beginning of a conversation as the beginning of the whole (some
take earlier thoughts out): where it does not, the message is found by marks put around it.
"""

import itertools
from collections.abc import Sequence

from .examples import IGNORED
from .items import Message
from .templates import Template

#: Characters of no alphabet, which no text of a data set should hold.
_OPEN, _CLOSE = "\ue0b0", "\ue0b1"

Span = tuple[int, int]


def chosen(messages: Sequence[Message], loss_on: str | Sequence[str]) -> list[int]:
    """Numbers of the messages that are learnt.

    Args:
      messages: of a conversation.
      loss_on: `responses`, `last` (the last response), `all`, or roles; a message's own word goes first.
    """
    if loss_on == "all":
        by_role = [*range(len(messages))]
    else:
        roles = ("assistant",) if loss_on in ("responses", "last") else loss_on
        by_role = [i for i, message in enumerate(messages) if message.role in roles]
    if loss_on == "last":
        by_role = by_role[-1:]
    return [i for i, m in enumerate(messages) if (i in by_role if m.trained is None else m.trained)]


def rendered(template: Template, messages: Sequence[Message], learnt: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of a conversation, and the characters `[start, end)` of every message in `learnt`.

    Raises:
      ValueError: the template refuses the messages, or changes one so that it cannot be found in the whole.
    """
    text = _render(template, messages)
    spans = []
    for number in learnt:
        span = _between(template, messages, number, text) or _marked(template, messages, number, text)
        if span is None:
            raise ValueError(
                f"the template {template.name} writes message {number + 1} otherwise in the whole conversation than at "
                "its end, so what to learn of it cannot be found; data.loss_on=last learns the last answer alone"
            )
        spans.append(span)
    return text, spans


def _render(template: Template, messages: Sequence[Message], generation: bool = False) -> str:
    return template([{"role": m.role, "content": m.content} for m in messages], generation=generation)


def _between(template: Template, messages: Sequence[Message], number: int, text: str) -> Span | None:
    """Between the conversation before the message and with it, if the whole begins with both."""
    if messages[number].role != "assistant":  # what stands before others' messages is rendered with them alone
        return None
    try:
        before = _render(template, messages[:number], generation=True)
        through = _render(template, messages[: number + 1]).rstrip()
    except ValueError:  # a template that wants a user's message first
        return None
    fits = text.startswith(before) and text.startswith(through) and len(before) < len(through)
    return (len(before), len(through)) if fits else None


def _marked(template: Template, messages: Sequence[Message], number: int, text: str) -> Span | None:
    """Where marks around the message come out, and what ends an answer after it."""
    place = _place(template, messages, number, text)
    if place is None:
        return None
    last = max((i for i, m in enumerate(messages) if m.role == messages[number].role), default=number)
    until = messages[: last + 1]
    shorter = _render(template, until)
    ends = _place(template, until, last, shorter)
    if ends is None:
        return None
    after = zip(shorter[ends[1] :].rstrip(), text[place[1] :], strict=False)
    ending = itertools.takewhile(lambda both: both[0] == both[1], after)
    return place[0], place[1] + sum(1 for _ in ending)


def _place(template: Template, messages: Sequence[Message], number: int, text: str) -> Span | None:
    content = messages[number].content
    core = content.strip()
    if not core or _OPEN in text or _CLOSE in text:
        return None
    marked = Message(messages[number].role, content.replace(core, f"{_OPEN}{core}{_CLOSE}", 1))
    with_marks = _render(template, [*messages[:number], marked, *messages[number + 1 :]])
    if with_marks.count(_OPEN) != 1 or with_marks.count(_CLOSE) != 1:
        return None
    start, end = with_marks.index(_OPEN), with_marks.index(_CLOSE) - 1
    return (start, end) if start < end and with_marks.replace(_OPEN, "").replace(_CLOSE, "") == text else None


def labels(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """The ids whose last character lies in a span, `IGNORED` in the place of all others."""
    ends = [max(end - 1, start) for start, end in offsets]
    return [
        token if any(start <= end < stop for start, stop in spans) else IGNORED
        for token, end in zip(ids, ends, strict=True)
    ]
