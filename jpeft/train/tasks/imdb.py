# SPDX-License-Identifier: Apache-2.0
"""IMDB (Maas et al., 2011): whether a film review is positive. 25,000 reviews, half of them each."""

from ..sections.data import Source
from .kinds import Classify

TASK = Classify(
    source=Source("stanfordnlp/imdb", split="test"),
    columns={"text": "text", "label": "label"},
    form="sentence",
    names=("negative", "positive"),
    published={"BERT-base, fine-tuned, error": "5.4 % (Sun et al., 2019)"},
)
