# SPDX-License-Identifier: Apache-2.0
"""One spelling for what LaTeX and plain text write in many; no value changes but by a unit that is left out."""

import re

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "∅": r"\emptyset ",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^{2}", "³": "^{3}", "\u00a0": " ",
    "\u202f": " ", "€": "", "£": "", "ℝ": r"\mathbb{R}", "θ": r"\theta ", "°": r"^{\circ}",
}  # fmt: skip
_DEGREES = r"(?:\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degrees?(?![a-zA-Z]))"
_OF_ANGLES = r"\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?\d\}?)?"
_SPELLED = [
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:left|right|displaystyle|textstyle|limits|big|Big|bigg|Bigg)(?![a-zA-Z])\s*\.?", ""),
    (r"\\(?:quad|qquad)(?![a-zA-Z])|(?<!\\)\\[,;:! ]|~", " "),
    (r"\\(?:leq|leqslant)(?![a-zA-Z])", r"\\le"),
    (r"\\(?:geq|geqslant)(?![a-zA-Z])", r"\\ge"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\neq(?![a-zA-Z])", r"\\ne"),
    (r"\\(?:varnothing)(?![a-zA-Z])", r"\\emptyset"),
    (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
    (r"\\(?:lbrack)(?![a-zA-Z])", "["),
    (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
    (
        rf"({_OF_ANGLES}\s*[({{]?\s*-?\s*)(\d+(?:\.\d+)?)\s*{_DEGREES}",
        r"\1\\frac{\2\\pi}{180}",
    ),
    (_DEGREES, ""),
    (r"\{,\}", ","),
    (r"_\{(\w)\}", r"_\1"),
    (r"\\log_e(?![a-zA-Z])", r"\\ln"),
    (r"\{\s*-\s*([^{}]*)\}\s*(?=$)", r"{-\1}"),
    (r"\\%|%", r"\\%"),
    (r"\\\$|\$", ""),
]
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|textnormal|rm)\s*\{([^{}]*)\}")
_UNITS = (
    r"(?:square |cubic |sq\.? )?(?:degrees?|units?|inch(?:es)?|in\.?|feet|foot|ft|cm|mm|km|kg|meters?|metres?|m|"
    r"centimeters?|kilometers?|miles?|mph|yards?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|dollars?|"
    r"cents?|grams?|g|pounds?|lbs?|ounces?|liters?|litres?|ml|people|students|ways|apples|eggs|books|cups|points|percent)"
    r"(?:\s*\^\s*\{?[23]\}?| squared| cubed)?(?:\s*(?:/|per)\s*[a-z]+)?"
)
_TRAILING_UNIT = re.compile(rf"(?<=[\d}})])\s*{_UNITS}\s*\.?$")


def normalised(text: str) -> str:
    """An answer in one spelling: no layout, no unit, no dollar sign; `\\%` for percent; `,` between parts."""
    for sign, spelled in _SIGNS.items():
        text = text.replace(sign, spelled)
    text = re.sub(r"√\s*\(([^()]*)\)|√\s*(\w+)", lambda m: rf"\sqrt{{{m.group(1) or m.group(2)}}}", text)
    for sign in (r"\(", r"\)", r"\[", r"\]"):
        text = text.replace(sign, " ")
    for pattern, spelled in _SPELLED:
        text = re.sub(pattern, spelled, text)
    text = _without_text(text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"(?<=[\w})\]])\s*\.$", "", text).strip()
    text = _TRAILING_UNIT.sub("", text).strip()
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", re.sub(r"(?<!\\)\bpi\b", r"\\pi", text))
    return _without_name(_tight(text))


def _without_text(text: str) -> str:
    r"""With `\text{...}` opened where it says something, and left out where it says a unit behind a number."""

    def said(match: re.Match[str]) -> str:
        before = text[: match.start()].rstrip()
        inner = match.group(1)
        if before and re.search(r"[\d})]$", before) and re.fullmatch(rf"\s*{_UNITS}\s*\.?\s*", inner):
            return ""
        return re.sub(r"\s*\b(?:and|or)\b\s*", ", ", inner) if re.fullmatch(r"\s*(?:and|or)\s*", inner) else inner

    out = _TEXT.sub(said, text)
    out = re.sub(r"(?<=[\d})\]])\s*\^\s*\{?[23]\}?$", "", out) if out != text and _squared_unit(text) else out
    return re.sub(r"(?<=[\d})])\s*,?\s+(?:and|or)\s+(?=[-\\(\[\dxa-z])", ", ", out)


def _squared_unit(text: str) -> bool:
    r"""Whether a text ends in a unit with a power behind it, `\text{cm}^2`."""
    return bool(re.search(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}\s*\^\s*\{?[23]\}?\s*\.?$", text))


def _tight(text: str) -> str:
    """Without spaces where they say nothing: beside signs and brackets."""
    text = re.sub(r"\s*([-+*/=<>^_()\[\]{}|;:])\s*", r"\1", text)
    text = re.sub(r"\s*,\s*", lambda m: ", " if m.group().strip(",") else ",", text)
    return re.sub(r"\s+(?=\\)|(?<=[}\d])\s+(?=[a-zA-Z])", "", text) if not _mixed(text) else text


def _mixed(text: str) -> bool:
    return bool(re.search(r"\d\s+(?:\\frac|\d+/\d)", text))


def _without_name(text: str) -> str:
    r"""Without what an answer is called: `x=`, `f(x)=`, `x\in`."""
    return re.sub(
        r"^(?:[a-zA-Z](?:_\{?\w+\}?)?(?:\([a-z]\))?|\\theta|[a-z]{3,})\s*(?:=|\\in(?![a-z]))\s*(?=[^=]*$)", "", text
    ).strip()
