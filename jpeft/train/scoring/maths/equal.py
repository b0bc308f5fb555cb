# SPDX-License-Identifier: Apache-2.0
"""Whether an answer equals the solution, by the first of these that decides: text, number, parts, math-verify.

The first three are this package's own and exact. They also decide where math-verify is known to err: a time is no
number, a decimal equals no fraction that it only comes near, an inequality equals its interval whichever is the
solution, a percent equals its number and its value, a tuple's order counts and a list's does not.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from .normal import normalised
from .number import spelled, value
from .parts import Parts, is_time, parts
from .workers import Workers

_LETTER = re.compile(r"\(?([A-Ja-j])\)?[.):]?(?:\s.*)?")
_BASE = re.compile(r"[0-9A-F]+_(?:\d|\{\d+\})")
_WORDS = re.compile(r"[a-zA-Z][a-zA-Z' -]*[a-zA-Z]")


class Verdict(NamedTuple):
    """Whether an answer is right, and what decided: `text`, `number`, `parts`, `math-verify`, `timeout`, `nothing`."""

    right: bool
    by: str


def equal(solution: str, answer: str | None, workers: Workers) -> Verdict:
    """The verdict on an answer, both as `extract.final_answer` finds them; None is no answer."""
    if answer is None or not answer.strip():
        return Verdict(False, "nothing")
    if is_time(solution) or is_time(answer):
        same = _time(solution) == _time(answer)
        return Verdict(same, "text")
    return _equal(normalised(solution), normalised(answer), workers)


def _equal(gold: str, said: str, workers: Workers) -> Verdict:
    if _folded(gold) == _folded(said):
        return Verdict(True, "text")
    if re.fullmatch(r"\(?[A-J]\)?", gold) and (letter := _LETTER.fullmatch(said)):
        return Verdict(letter.group(1).upper() == gold.strip("()"), "text")
    if r"\%" in gold or r"\%" in said:
        return _percent(gold, said, workers)
    one, other = value(gold), value(said)
    if one is not None and other is not None:
        return Verdict(one == other, "number")
    if _BASE.fullmatch(gold) and _BASE.fullmatch(said):
        return Verdict(False, "text")
    if _WORDS.fullmatch(gold) and len(gold) > 2 and "\\" not in said:
        return Verdict(False, "text")
    whole, told = parts(gold), parts(said)
    if whole is not None or told is not None:
        return _by_parts(whole, told, workers)
    found = workers.ask(_exact(gold, one), _exact(said, other))
    return Verdict(False, "timeout") if found is None else Verdict(found, "math-verify")


def _percent(gold: str, said: str, workers: Workers) -> Verdict:
    r"""`50\%` is right as `50\%`, as `50` and as `0.5`; `50` is not right as `0.5`."""
    bare = [text.replace(r"\%", "").strip() for text in (gold, said)]
    one, other = value(bare[0]), value(bare[1])
    if one is None or other is None:
        return _equal(bare[0], bare[1], workers)
    if r"\%" in gold and r"\%" in said:
        return Verdict(one == other, "number")
    percent, number = (one, other) if r"\%" in gold else (other, one)
    return Verdict(number in (percent, percent / Fraction(100)), "number")


def _by_parts(gold: Parts | None, said: Parts | None, workers: Workers) -> Verdict:
    if gold is None or said is None or gold.kind != said.kind or len(gold.items) != len(said.items):
        return Verdict(False, "parts")
    if gold.ordered:
        pairs = zip(gold.items, said.items, strict=True)
        return Verdict(all(_equal(*pair, workers).right for pair in pairs), "parts")
    left = list(said.items)
    for item in gold.items:
        match = next((other for other in left if _equal(item, other, workers).right), None)
        if match is None:
            return Verdict(False, "parts")
        left.remove(match)
    return Verdict(True, "parts")


def _exact(text: str, number: Fraction | None) -> str:
    return text if number is None else spelled(number)


def _folded(text: str) -> str:
    """A text without spaces; words alone without their case."""
    tight = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # 1 1/2 is not 11/2
    return tight.lower() if _WORDS.fullmatch(text) and len(text) > 2 else tight


def _time(text: str) -> str:
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).lower()
    return re.sub(r"[\s.$\\]", "", text).removeprefix("0")


def equal_all(pairs: Sequence[tuple[str, str | None]], workers: Workers) -> list[Verdict]:
    """The verdicts on many (solution, answer), each as `equal`."""
    return workers.map(lambda pair: equal(*pair, workers), pairs)
