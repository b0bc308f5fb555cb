# SPDX-License-Identifier: Apache-2.0
"""AIME 2024 and 2025: 30 problems a year, whose answers are whole numbers from 0 to 999.

30 problems are few: one of them is 3.3 points, and the interval says so. Draw several texts of each (`--samples`).
"""

from ..sections.data import Source
from . import formulas
from .kinds import Write


def _year(hub: str) -> Write:
    return Write(
        source=Source(hub),
        prompt="Problem: {problem}\nPut the final answer in \\boxed{{}}.\nSolution:",
        stop=("Problem:", "</s>", "<|im_end|>"),
        max_new_tokens=4096,
        score=formulas.score,
        compared=formulas.COMPARED,
        extractor=formulas.EXTRACTOR,
        columns={"answer": ("expected_answer",)},
        published={"GPT-4o, AIME 2024, pass@1": "9.3 (DeepSeek-AI, 2025)"},
    )


AIME24, AIME25 = _year("HuggingFaceH4/aime_2024"), _year("math-ai/aime25")
