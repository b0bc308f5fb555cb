# SPDX-License-Identifier: Apache-2.0
"""Scoring texts by what they share with a reference; of several texts of a row the first counts."""

from collections.abc import Callable, Sequence

from ..scoring import texts
from ..scoring.intervals import Estimate
from .kinds import Row, Scored

_METRICS = {"rouge_l": texts.rouge_l, "bleu": texts.bleu, "chrf": texts.chrf}


def scorer(*names: str) -> Callable[[Sequence[Row], Sequence[Sequence[str]], int], Scored]:
    """A score by some of `rouge_l`, `bleu` and `chrf`, on the column `output`; signatures are among its notes."""

    def score(rows: Sequence[Row], written: Sequence[Sequence[str]], seed: int) -> Scored:
        references = [str(row["output"]).strip() for row in rows]
        said = [each[0].strip() for each in written]
        metrics: dict[str, Estimate] = {}
        signatures = {}
        for name in names:
            found = _METRICS[name](references, said, seed=seed)
            if isinstance(found, Estimate):
                metrics[name] = found
            else:
                metrics[name], signatures[name] = found
        examples = [{"reference": r, "written": s} for r, s in zip(references, said, strict=True)]
        return Scored(metrics, examples, {"signatures": signatures, "empty": sum(not text for text in said)})

    return score
