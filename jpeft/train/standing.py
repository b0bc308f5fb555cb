# SPDX-License-Identifier: Apache-2.0
"""What evaluations so far have shown: which one was best, and how many came after it. This file imports no JAX."""

import dataclasses
from collections.abc import Mapping

#: Figures of an evaluation that are better when they are lower; all others are better when higher.
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})

#: The figures of an evaluation, by task; of preferences, by objective.
METRICS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("loss", "accuracy", "macro_f1"),
    "IMAGE_CLS": ("loss", "accuracy", "macro_f1"),
    "TOKEN_CLS": ("loss", "accuracy", "macro_f1"),
    "QUESTION_ANS": ("loss", "exact_match", "f1"),
    "CAUSAL_LM": ("loss", "perplexity"),
    "SEQ_2_SEQ_LM": ("loss", "perplexity"),
    "dpo": ("loss", "accuracy", "margin", "rewards_chosen", "rewards_rejected"),
}


@dataclasses.dataclass(frozen=True)
class Standing:
    """Plain numbers, saved with a checkpoint and restored by `Standing(**numbers)`.

    Attributes:
      best: highest (or lowest, see `LOWER_IS_BETTER`) value of the followed figure; None before the first evaluation.
      update: the update after which it was measured.
      since: evaluations after that one.
    """

    best: float | None = None
    update: int = 0
    since: int = 0

    def after(self, figure: str, value: float, update: int) -> "Standing":
        """The standing once `figure` was `value` after `update`; an equal value is no gain."""
        if self.best is None or (value < self.best if figure in LOWER_IS_BETTER else value > self.best):
            return Standing(value, update, 0)
        return dataclasses.replace(self, since=self.since + 1)
