# SPDX-License-Identifier: Apache-2.0
"""Replies in a dialogue: of any file with an `input` (what was said) and an `output` (the reply)."""

from . import overlap
from .kinds import Write

TASK = Write(
    source=None,
    prompt="{input}\nReply:",
    answer=" {output}",
    stop=("\n",),
    max_new_tokens=128,
    score=overlap.scorer("rouge_l", "bleu", "chrf"),
    compared=("rouge_l",),
    extractor="the text up to the end of the line",
    columns={"input": ("context", "dialogue", "instruction"), "output": ("response", "reply")},
    published={},
)
