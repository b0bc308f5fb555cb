# SPDX-License-Identifier: Apache-2.0
"""BitFit: every bias is trained and nothing else (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199).

    y = x W + (b + change),   and likewise the biases of norms

Every bias term counts, as in the paper: those of projections and those of norms, in every layer, before the layers and
behind them. The biases are trained as copies, which start as the base's. A task's own head is trained whole.
"""

import dataclasses
from typing import Any, ClassVar

from .._fields import selection
from .._method import Method, Site, Targets


@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """The biases of a model, trained. A model without biases, such as Llama, is refused.

    Args:
      targets: modules whose biases are meant, as of `jpeft.LoRA`; None for all.
      layers, exclude, modules_to_save: as of `jpeft.LoRA`.

    Example:
      >>> jpeft.BitFit()
      >>> jpeft.BitFit(targets=["query", "intermediate.dense"])  # the paper's smaller form
    """

    kind: ClassVar[str] = "bitfit"

    targets: Any = None
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        selection(self)

    def select(self, model_type: str | None) -> Targets:
        return Targets(self.targets or ".*", self.exclude, self.layers, self.modules_to_save, seam="bias")

    def count(self, site: Site) -> tuple[int, int]:
        return 0, 0  # the copies are counted where they are kept
