# SPDX-License-Identifier: Apache-2.0
"""The exact value of what is written as a number: whole, decimal, fraction, mixed, with commas or a power of ten."""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"([-+]?)({_DIGITS})")
_SLASH = re.compile(rf"([-+]?)({_DIGITS})/([-+]?)({_DIGITS})")
_FRACTION = re.compile(rf"([-+]?)\\frac\{{([-+]?{_DIGITS})\}}\{{([-+]?{_DIGITS})\}}")
_MIXED = re.compile(r"([-+]?)(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))")
_POWER = re.compile(rf"([-+]?)({_DIGITS})(?:(?: ?\\times|\\cdot|\*|x) ?10\^\{{?([-+]?\d+)\}}?|[eE]([-+]?\d+))")
_MOST_DIGITS, _MOST_POWER = 2000, 2000


def value(text: str) -> Fraction | None:
    """The value of a normalised text; None where it is no number of these kinds, or one without end."""
    text = _bare(text)
    if len(text) > _MOST_DIGITS:
        return None
    for pattern, read in _READ:
        match = pattern.fullmatch(text)
        if match:
            return read(match)
    return None


def spelled(number: Fraction) -> str:
    """A value as LaTeX that is exact."""
    return str(number.numerator) if number.denominator == 1 else rf"\frac{{{number.numerator}}}{{{number.denominator}}}"


def _bare(text: str) -> str:
    """Without parentheses or braces around all of it."""
    while len(text) > 1 and (text[0], text[-1]) in (("(", ")"), ("{", "}")) and "," not in text:
        inner = text[1:-1]
        if any(sign in inner for sign in "(){}") and not _balanced(inner):
            break
        text = inner.strip()
    return text


def _balanced(text: str) -> bool:
    depth = 0
    for sign in text:
        depth += (sign in "({") - (sign in ")}")
        if depth < 0:
            return False
    return depth == 0


def _number(sign: str, digits: str) -> Fraction:
    return (-1 if sign == "-" else 1) * Fraction(digits.replace(",", "").rstrip(".") or "0")


def _signed(text: str) -> Fraction:
    return _number(text[:1] if text[:1] in "+-" else "", text.lstrip("+-"))


def _over(top: Fraction, bottom: Fraction) -> Fraction | None:
    return top / bottom if bottom else None


def _mixed(match: re.Match[str]) -> Fraction | None:
    sign, whole, *parts = match.groups()
    top, bottom = (int(part) for part in parts if part is not None)
    part = _over(Fraction(top), Fraction(bottom))
    return None if part is None else (-1 if sign == "-" else 1) * (int(whole) + part)


def _scaled(match: re.Match[str]) -> Fraction | None:
    power = int(match.group(3) or match.group(4))
    return None if abs(power) > _MOST_POWER else _number(match.group(1), match.group(2)) * Fraction(10) ** power


_READ = (
    (_PLAIN, lambda m: _number(m.group(1), m.group(2))),
    (_SLASH, lambda m: _over(_number(m.group(1), m.group(2)), _number(m.group(3), m.group(4)))),
    (_FRACTION, lambda m: _over(_number(m.group(1), "1") * _signed(m.group(2)), _signed(m.group(3)))),
    (_MIXED, _mixed),
    (_POWER, _scaled),
)
