# SPDX-License-Identifier: Apache-2.0
"""Summaries: XSum (Narayan et al., 2018), or any file with an `input` and an `output`."""

from ..sections.data import Source
from . import overlap
from .kinds import Write

TASK = Write(
    source=Source("EdinburghNLP/xsum", split="test"),
    prompt="{input}\n\nSummary:",
    answer=" {output}",
    stop=("\n\n",),
    max_new_tokens=128,
    score=overlap.scorer("rouge_l", "bleu", "chrf"),
    compared=("rouge_l",),
    extractor="the text up to an empty line",
    columns={"input": ("document", "article", "dialogue", "text"), "output": ("summary", "highlights")},
    published={"BART-large on XSum, ROUGE-L": "37.25 (Lewis et al., 2020)"},
)
