# SPDX-License-Identifier: Apache-2.0
"""The section `preference`: how pairs of answers are learnt from."""

import dataclasses
from typing import ClassVar, Literal

from ._checks import FORBID, positive


@dataclasses.dataclass(frozen=True)
class Preference:
    """Of `train.objective=dpo`.

    Attributes:
      loss: `sigmoid` (DPO), `ipo` or `hinge`.
      beta: how much a log-probability above the reference's is worth; a larger one stays nearer to the reference.
      label_smoothing: share of pairs taken to be the wrong way round, in [0, 0.5), of `sigmoid`: cDPO.
      precompute: whether the reference's log-probabilities are computed once, before training, and not in every update.
    """

    __pydantic_config__: ClassVar = FORBID
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    precompute: bool = False

    def wrong(self) -> list[str]:
        """What cannot be, a line each."""
        lines = positive({"preference.beta": self.beta})
        if not 0 <= self.label_smoothing < 0.5:
            lines.append(f"preference.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss != "sigmoid":
            lines.append(f"preference.label_smoothing is for preference.loss=sigmoid, got {self.loss}")
        return lines
