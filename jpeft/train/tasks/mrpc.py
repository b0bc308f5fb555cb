# SPDX-License-Identifier: Apache-2.0
"""MRPC (Dolan and Brockett, 2005), as GLUE has it: whether two sentences say the same. 408 pairs."""

from ..sections.data import Source
from .kinds import Classify

TASK = Classify(
    source=Source("nyu-mll/glue", name="mrpc", split="validation"),
    columns={"text": "sentence1", "pair": "sentence2", "label": "label"},
    form="sentence_pair",
    names=("not_equivalent", "equivalent"),
    published={"BERT-base, fine-tuned, test F1": "88.9 (Devlin et al., 2019, table 1)"},
)
