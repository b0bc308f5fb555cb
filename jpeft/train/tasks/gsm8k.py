# SPDX-License-Identifier: Apache-2.0
"""GSM8K (Cobbe et al., 2021): word problems of grade school, 1,319 of them, scored as lm-eval does, and by value."""

from collections.abc import Sequence

from ..scoring.intervals import means
from ..scoring.maths import extract, normal, number
from ..sections.data import Source
from .kinds import Row, Scored, Write


def score(rows: Sequence[Row], written: Sequence[Sequence[str]], seed: int) -> Scored:
    """Exact match by both of lm-eval's rules, equality of value, and how often a rule finds nothing.

    Of several texts of a row, its figures are means.
    """
    examples = [
        {"answer": row["answer"].rpartition("#### ")[2], "found": [_found(row["answer"], text) for text in texts]}
        for row, texts in zip(rows, written, strict=True)
    ]
    names = ("strict_match", "flexible_extract", "equal_value", "strict_failed", "flexible_failed")
    values = {
        name: [sum(found[name] for found in row["found"]) / len(row["found"]) for row in examples] for name in names
    }
    return Scored(means(values, seed=seed), examples, values=values)


def _found(answer: str, text: str) -> dict[str, object]:
    strict, flexible = extract.gsm8k_strict(text), extract.gsm8k_flexible(text)
    gold = number.value(normal.normalised(answer.rpartition("#### ")[2]))
    values = [None if found is None else number.value(normal.normalised(found)) for found in (strict, flexible)]
    said = values[1] if strict is None else values[0]
    return {
        "strict": strict,
        "flexible": flexible,
        "strict_match": extract.gsm8k_equal(answer, strict),
        "flexible_extract": extract.gsm8k_equal(answer, flexible),
        "equal_value": said is not None and said == gold,
        "strict_failed": strict is None,
        "flexible_failed": flexible is None,
    }


TASK = Write(
    source=Source("openai/gsm8k", name="main", split="test"),
    shots_from=Source("openai/gsm8k", name="main", split="train"),
    prompt="Question: {question}\nAnswer:",
    answer=" {answer}",
    stop=("Question:", "</s>", "<|im_end|>"),
    score=score,
    compared=("strict_match", "flexible_extract", "equal_value"),
    extractor="strict: the number behind the first '#### '; flexible: the last number; equal_value: the strict number, "
    "else the flexible one, by value",
    published={
        "Llama-3.1-8B-Instruct, 5 shots, chat": "strict 20.2, flexible 78.5 (lm-evaluation-harness PR 2034)",
        "Llama-2-7B, 8 shots": "14.6 (Touvron et al., 2023)",
    },
)
