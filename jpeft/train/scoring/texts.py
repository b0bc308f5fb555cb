# SPDX-License-Identifier: Apache-2.0
"""How near written texts come to reference texts: ROUGE-L, BLEU and chrF, by the libraries that define them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .intervals import Estimate, bootstrap, mean

#: Resamples of a whole corpus' BLEU, each of which is computed from sums over its texts.
_RESAMPLES = 1000


def rouge_l(references: Sequence[str], written: Sequence[str], *, seed: int = 0) -> Estimate:
    """Mean ROUGE-L F1 over texts, 0 to 100, with Porter's stemmer, as papers report it (`rouge-score`)."""
    return mean(each_rouge_l(references, written), seed=seed)


def each_rouge_l(references: Sequence[str], written: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of every text, 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, written, strict=True)
    return [100 * scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs]


def bleu(references: Sequence[str], written: Sequence[str], *, seed: int = 0) -> tuple[Estimate, str]:
    """BLEU of the corpus, and sacrebleu's signature of how it was computed."""
    from sacrebleu.metrics import BLEU  # pyright: ignore[reportAttributeAccessIssue]

    return _corpus(BLEU(), references, written, seed)


def chrf(references: Sequence[str], written: Sequence[str], *, seed: int = 0) -> tuple[Estimate, str]:
    """chrF2 of the corpus, and sacrebleu's signature of how it was computed."""
    from sacrebleu.metrics import CHRF  # pyright: ignore[reportAttributeAccessIssue]

    return _corpus(CHRF(), references, written, seed)


def _corpus(metric: Any, references: Sequence[str], written: Sequence[str], seed: int) -> tuple[Estimate, str]:
    """A corpus' score, and its interval over resampled texts."""
    given, said = list(references), list(written)

    def score(rows: np.ndarray) -> float:
        return metric.corpus_score([said[i] for i in rows], [[given[i] for i in rows]]).score

    found = bootstrap(score, len(said), seed=seed, resamples=_RESAMPLES if len(said) < 200 else 100)
    score(np.arange(len(said)))  # the signature tells of the last call
    return found, str(metric.get_signature())
