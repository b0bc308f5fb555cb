# SPDX-License-Identifier: Apache-2.0
"""Scoring texts by what they share with a reference; of several texts of a row the first counts."""

from collections.abc import Callable, Sequence

from ..scoring import texts
from ..scoring.intervals import means
from .kinds import Row, Scored

#: Figures that are means over texts, by text, and figures of all texts together, with their signatures.
_EACH = {"rouge_l": texts.each_rouge_l}
_CORPUS = {"bleu": texts.bleu, "chrf": texts.chrf}


def scorer(*names: str) -> Callable[[Sequence[Row], Sequence[Sequence[str]], int], Scored]:
    """A score by some of `rouge_l`, `bleu` and `chrf`, on the column `output`; signatures are among its notes."""

    def score(rows: Sequence[Row], written: Sequence[Sequence[str]], seed: int) -> Scored:
        references = [str(row["output"]).strip() for row in rows]
        said = [each[0].strip() for each in written]
        values = {name: _EACH[name](references, said) for name in names if name in _EACH}
        whole = {name: _CORPUS[name](references, said, seed=seed) for name in names if name in _CORPUS}
        metrics = means(values, seed=seed) | {name: estimate for name, (estimate, _) in whole.items()}
        examples = [{"reference": r, "written": s} for r, s in zip(references, said, strict=True)]
        notes = {"signatures": {name: s for name, (_, s) in whole.items()}, "empty": sum(not text for text in said)}
        return Scored(metrics, examples, notes, values)

    return score
