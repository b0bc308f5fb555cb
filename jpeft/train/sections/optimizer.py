# SPDX-License-Identifier: Apache-2.0
"""The section `optimizer`: the update rule and its rate."""

import dataclasses
from typing import ClassVar, Literal

from ._checks import FORBID, positive, shares


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW and its learning rate.

    Attributes:
      lr: highest learning rate.
      schedule: towards 0 at the end by `linear` or `cosine`, or `constant`.
      warmup: share of all updates, in [0, 1), in which the rate rises from 0.
      weight_decay: biases and norms have none.
      betas, eps: of Adam.
      clip: largest norm of the gradient of the whole trainable tree; None does not clip.
      lora_plus_ratio: LoRA+ (Hayou et al. 2024): the rate of B over that of A.
    """

    __pydantic_config__: ClassVar = FORBID
    lr: float = 1e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    lora_plus_ratio: float = 1.0

    def wrong(self) -> list[str]:
        """What cannot be, a line each."""
        lines = positive(
            {
                "optimizer.lr": self.lr,
                "optimizer.eps": self.eps,
                "optimizer.clip": self.clip,
                "optimizer.lora_plus_ratio": self.lora_plus_ratio,
            }
        )
        lines += shares({"optimizer.warmup": self.warmup, "optimizer.betas": max(self.betas, key=abs)})
        if self.weight_decay < 0:
            lines.append(f"optimizer.weight_decay must not be negative, got {self.weight_decay}")
        return lines
