# SPDX-License-Identifier: Apache-2.0
"""Norm tuning: the scales and biases of all norms are trained (Zhao et al. 2023, https://arxiv.org/abs/2312.11420).

    y = normalised(x) * scale + bias        scale, bias [features], trained; a norm without a bias has none

A norm is a module whose class, or one that it inherits from, is called `...Norm`: LayerNorm, RMSNorm, GroupNorm,
BatchNorm and InstanceNorm of NNX, and those of other authors. Running statistics are none of it. The leaves are trained
as copies, which start as the base's, as in PEFT's LN_TUNING.
"""

import dataclasses
from typing import Any, ClassVar

from .._fields import selection
from .._method import Method, Site, Targets


@dataclasses.dataclass(frozen=True)
class NormTuning(Method):
    """The norms of a model, trained.

    Args:
      targets: which norms, as of `jpeft.LoRA`; None for all, whatever the model's type. (PEFT has defaults by type: for
        Llama all norms as here, for Qwen the one behind the attention alone, for BERT none.)
      layers, exclude, modules_to_save: as of `jpeft.LoRA`.

    Example:
      >>> jpeft.NormTuning()
      >>> jpeft.NormTuning(targets=["post_attention_layernorm"])
    """

    kind: ClassVar[str] = "norm_tuning"

    targets: Any = None
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        selection(self)

    def select(self, model_type: str | None) -> Targets:
        return Targets(self.targets or ".*", self.exclude, self.layers, self.modules_to_save, seam="norm")

    def count(self, site: Site) -> tuple[int, int]:
        return 0, 0  # the copies are counted where they are kept
