# SPDX-License-Identifier: Apache-2.0
"""SST-2 (Socher et al., 2013), as GLUE has it: whether a sentence of a film review is positive. 872 sentences."""

from ..sections.data import Source
from .kinds import Classify

TASK = Classify(
    source=Source("stanfordnlp/sst2", split="validation"),
    columns={"text": "sentence", "label": "label"},
    form="sentence",
    names=("negative", "positive"),
    published={"BERT-base, fine-tuned, test accuracy": "93.5 (Devlin et al., 2019, table 1)"},
)
