# SPDX-License-Identifier: Apache-2.0
"""Scoring answers that are formulas: by what is boxed, and by whatever looks like an answer."""

from collections.abc import Sequence

from ..scoring.intervals import means
from ..scoring.maths import extract
from ..scoring.maths.equal import equal_all
from ..scoring.maths.workers import Workers
from .kinds import Row, Scored


def score(rows: Sequence[Row], written: Sequence[Sequence[str]], seed: int) -> Scored:
    r"""Exact match of the last box (`strict_match`), and of the box or else of what is said to be the answer, or the
    last number (`flexible_extract`); how often nothing was found; and strict figures by what groups the rows have.
    """
    answers = [str(row["answer"]) for row in rows]
    strict = [[extract.boxed(text) for text in texts] for texts in written]
    flexible = [
        [extract.final_answer(text) or extract.gsm8k_flexible(text) if box is None else box for text, box in each]
        for each in (zip(texts, boxes, strict=True) for texts, boxes in zip(written, strict, strict=True))
    ]
    with Workers() as workers:
        verdicts = [
            equal_all([(a, f) for a, texts in zip(answers, found, strict=True) for f in texts], workers)
            for found in (strict, flexible)
        ]
    by_row = [iter(found) for found in verdicts]
    examples = []
    for answer, boxes, found in zip(answers, strict, flexible, strict=True):
        said = [{"strict": b, "flexible": f} for b, f in zip(boxes, found, strict=True)]
        for each in said:
            each |= {"strict_match": next(by_row[0]), "flexible_extract": next(by_row[1])}
        examples.append({"answer": answer, "found": [_plain(each) for each in said]})
    values = {
        name: [sum(each[name] for each in row["found"]) / len(row["found"]) for row in examples]
        for name in ("strict_match", "flexible_extract", "strict_failed", "flexible_failed")
    }
    return Scored(means(values, seed=seed), examples, {"strict_match by group": _groups(rows, examples)}, values)


def _plain(found: dict) -> dict:
    strict, flexible = found["strict_match"], found["flexible_extract"]
    return {
        "strict": found["strict"],
        "flexible": found["flexible"],
        "strict_match": strict.right,
        "flexible_extract": flexible.right,
        "decided_by": [strict.by, flexible.by],
        "strict_failed": not found["strict"],
        "flexible_failed": not found["flexible"],
    }


def _groups(rows: Sequence[Row], examples: Sequence[dict]) -> dict[str, float]:
    """The share of right rows of every subject and level that the rows name."""
    right: dict[str, list[float]] = {}
    for row, example in zip(rows, examples, strict=True):
        value = sum(each["strict_match"] for each in example["found"]) / len(example["found"])
        for column in ("subject", "level"):
            if column in row:
                right.setdefault(f"{column} {row[column]}", []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


#: Figures that models may be compared by.
COMPARED = ("strict_match", "flexible_extract")

#: How an answer is found, in words.
EXTRACTOR = (
    "strict: the last balanced \\boxed{}; flexible: that, else what stands behind '####' or 'the answer is', else the "
    "last number; equal by text, value, parts, then math-verify"
)
