# SPDX-License-Identifier: Apache-2.0
"""Answers of several parts: lists, sets, tuples, intervals and their unions, matrices, chains of inequalities."""

import re
from typing import NamedTuple

_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[clr|]*\})?(.*?)\\end\{\1\}", re.DOTALL)
_TIME = re.compile(r"\d{1,2}:\d\d(?::\d\d)?\s*(?:[ap]\.?m\.?)?", re.IGNORECASE)
_CHAIN = re.compile(
    r"(?P<low>[^<>=]+?)(?P<left><|\\le) ?(?P<name>[a-zA-Z]|\\theta) ?(?P<right><|\\le)(?P<high>[^<>=]+)"
)
_HALF = re.compile(r"(?P<name>[a-zA-Z]|\\theta) ?(?P<sign><|>|\\le|\\ge)(?P<end>[^<>=]+)")


class Parts(NamedTuple):
    """A compound answer.

    Attributes:
      kind: `list`, `set`, `union`, `matrix`, or the brackets around: `()`, `[)`.
      items: of it; a matrix has the number of its columns in its kind.
    """

    kind: str
    items: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        """Whether the order says something."""
        return self.kind not in ("list", "set", "union")


def parts(text: str) -> Parts | None:
    """What a normalised text consists of; None where it is one thing."""
    text = interval(text)
    if match := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", match.group(2).strip()) if row.strip()]
        return Parts(f"matrix of {max(map(len, rows), default=0)}", tuple(item.strip() for row in rows for item in row))
    united = split(text, r"\cup")
    if len(united) > 1:
        return Parts("union", tuple(united))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return Parts("set", tuple(dict.fromkeys(split(text[2:-2], ","))))
    if text.startswith("{") and text.endswith("}") and "," in text:
        return Parts("set", tuple(dict.fromkeys(split(text[1:-1], ","))))
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]" and _closes_at_end(text):
        items = split(text[1:-1], ",")
        return Parts(text[0] + text[-1], tuple(items)) if len(items) > 1 else None
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        return None
    items = [part for item in split(text, ",") for part in _both_signs(item)]
    return Parts("list", tuple(_named(item) for item in items)) if len(items) > 1 else None


def is_time(text: str) -> bool:
    """Whether a text is a time of day, which no number equals."""
    return _TIME.fullmatch(text.strip()) is not None


def interval(text: str) -> str:
    r"""A chain of inequalities of one name as an interval: `2\le x<5` is `[2,5)`, `x<3` is `(-\infty,3)`."""
    text = text.strip()
    if match := _CHAIN.fullmatch(text):
        opens, shuts = "[" if match["left"] != "<" else "(", "]" if match["right"] != "<" else ")"
        return f"{opens}{match['low'].strip()},{match['high'].strip()}{shuts}"
    if match := _HALF.fullmatch(text):
        end, sign = match["end"].strip(), match["sign"]
        if sign in ("<", r"\le"):
            return rf"(-\infty,{end}{')' if sign == '<' else ']'}"
        return rf"{'(' if sign == '>' else '['}{end},\infty)"
    return text


def split(text: str, mark: str) -> list[str]:
    """A text cut at a mark that stands in no bracket; half-open brackets count as brackets."""
    out, depth, start, at = [], 0, 0, 0
    while at < len(text):
        if depth == 0 and text.startswith(mark, at):
            out.append(text[start:at].strip())
            start = at = at + len(mark)
            continue
        depth += (text[at] in "([{") - (text[at] in ")]}")
        at += 1
    return [*out, text[start:].strip()]


def _closes_at_end(text: str) -> bool:
    depth = 0
    for at, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return at == len(text) - 1
    return False


def _both_signs(item: str) -> list[str]:
    r"""`a\pm b` as two."""
    if r"\pm" not in item:
        return [item]
    return [
        item.replace(r"\pm", sign, 1).strip().removeprefix("+").replace("+ ", "+").replace("- ", "-") for sign in "+-"
    ]


def _named(item: str) -> str:
    """An item without its name, `x=`."""
    return re.sub(r"^[a-zA-Z](?:_\{?\w+\}?)?=(?=[^=]*$)", "", item)
