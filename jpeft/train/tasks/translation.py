# SPDX-License-Identifier: Apache-2.0
"""Translations: of any file with an `input` and an `output`, such as parallel lines of WMT."""

from . import overlap
from .kinds import Write

TASK = Write(
    source=None,
    prompt="{input}\n\nTranslation:",
    answer=" {output}",
    stop=("\n",),
    max_new_tokens=256,
    score=overlap.scorer("bleu", "chrf"),
    extractor="the text up to the end of the line",
    columns={"input": ("source", "src"), "output": ("target", "tgt")},
    published={"Transformer big on WMT 2014 English to German, BLEU (tokenised)": "28.4 (Vaswani et al., 2017)"},
)
