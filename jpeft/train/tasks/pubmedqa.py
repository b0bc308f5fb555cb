# SPDX-License-Identifier: Apache-2.0
"""PubMedQA (Jin et al., 2019): does an abstract, without its conclusion, answer a question by yes, no or maybe?

The official test split is 500 of the 1,000 labelled questions. The hub does not have it: there, all 1,000 are one
split, in other columns. So it is read from a file, `--data test.jsonl`, with the columns question, contexts and
final_decision.
The long answer is the conclusion and must not be given.
"""

from .kinds import Classify

TASK = Classify(
    source=None,
    columns={"text": "question", "pair": "contexts", "label": "final_decision"},
    form="sentence_pair",
    names=("yes", "no", "maybe"),
    published={
        "human, accuracy": "78.0 (Jin et al., 2019)",
        "human, macro-F1": "72.2 (Jin et al., 2019)",
        "majority class, accuracy": "55.2 (Jin et al., 2019)",
        "BioBERT, multi-phase, accuracy": "68.1 (Jin et al., 2019)",
    },
)
