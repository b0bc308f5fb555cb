# SPDX-License-Identifier: Apache-2.0
"""The answer in what a model wrote."""

import re

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
#: What GSM8K's exact match of lm-eval leaves out, on both sides.
_IGNORED = [re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$")]
_SAID = re.compile(
    r"(?:final answer|answer)\s*(?:is|:|=)\s*:?\s*(.+?)(?:\s*\. I hope it is correct|\.\s|\.?$|\n)", re.IGNORECASE
)
#: Markdown's bold type, which is no power: `2**3` has no space before it.
_BOLD = re.compile(r"(?<!\S)\*\*(?=\S)(.+?)(?<=\S)\*\*(?!\w)")


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` (or `\fbox{...}`) whose braces balance; None where there is none.

    Of boxes in each other it is the outermost's content, in which the inner ones' marks are left out.
    """
    found, end = None, 0
    for match in re.finditer(r"\\f?boxed\s*(\{| )|\\fbox\s*(\{)", text):
        if match.start() < end:  # in the one before
            continue
        if match.group(1) == " ":  # \boxed 5
            word = re.match(r"[^\s$.,]+", text[match.end() :])
            found, end = (word.group(), match.end() + word.end()) if word else (found, end)
            continue
        close = closing(text, match.end() - 1)
        if close is not None:
            found, end = text[match.end() : close], close
    return None if found is None else _unboxed(found).strip()


def closing(text: str, start: int) -> int | None:
    r"""Where the brace that opens at `start` closes; an escaped brace, `\{`, is a sign and no brace."""
    depth, at = 0, start
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
        at += 1
    return None


def final_answer(text: str) -> str | None:
    """The answer that a text ends in: its last box, else what stands behind the last `####` or "the answer is"."""
    found = boxed(text)
    if found is not None:
        return found
    if "####" in text:
        lines = text.rpartition("####")[2].strip().splitlines()
        return lines[0].strip() if lines else None
    said = list(_SAID.finditer(_BOLD.sub(r"\1", text)))
    return said[-1].group(1).strip() if said else None


def gsm8k_strict(text: str) -> str | None:
    """GSM8K's `strict-match` as lm-eval defines it: the number behind the first `#### `."""
    found = _STRICT.search(text)
    return found.group(1).strip() if found else None


def gsm8k_flexible(text: str) -> str | None:
    """GSM8K's `flexible-extract` as lm-eval defines it: the last thing that looks like a number."""
    found = _FLEXIBLE.findall(text)
    return next(group for group in found[-1] if group).strip() if found else None


def gsm8k_equal(gold: str, answer: str | None) -> bool:
    """lm-eval's exact match: equal once commas, dollars, all up to `#### ` and a last point are left out of both."""
    if answer is None:
        return False
    for pattern in _IGNORED:
        gold, answer = pattern.sub("", gold), pattern.sub("", answer)
    return gold.lower() == answer.lower()


def _unboxed(text: str) -> str:
    while match := re.search(r"\\(?:f?boxed|fbox)\s*\{", text):
        close = closing(text, match.end() - 1)
        if close is None:
            return text
        text = text[: match.start()] + text[match.end() : close] + text[close + 1 :]
    return text
