# SPDX-License-Identifier: Apache-2.0
"""MATH-500 (Lightman et al., 2023): 500 problems of the MATH test set (Hendrycks et al., 2021), of five levels."""

from ..sections.data import Source
from . import formulas
from .kinds import Write

TASK = Write(
    source=Source("HuggingFaceH4/MATH-500", split="test"),
    prompt="Problem: {problem}\nPut the final answer in \\boxed{{}}.\nSolution:",
    answer=" {solution}",
    stop=("Problem:", "</s>", "<|im_end|>"),
    max_new_tokens=1024,
    score=formulas.score,
    compared=formulas.COMPARED,
    extractor=formulas.EXTRACTOR,
    published={"Llama-3.1-8B-Instruct on MATH, 0 shots, chain of thought": "51.9 (Llama 3.1 model card)"},
)
