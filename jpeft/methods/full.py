# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning, through the same functions as everything else: the baseline that methods are compared with.

Every parameter is trained, as a float32 copy that starts as the base's and stands in for it, in the base's dtype, while
the model runs. The base stays beside the copies, so it takes its memory as well.
"""

import dataclasses
from typing import Any, ClassVar

from .._fields import selection
from .._method import Method, Site, Targets


@dataclasses.dataclass(frozen=True)
class FullFineTune(Method):
    """All parameters of a model, or of some of its modules, trained.

    Args:
      targets: modules that hold parameters, as of `jpeft.LoRA`; None for all.
      layers, exclude, modules_to_save: as of `jpeft.LoRA`.

    Example:
      >>> jpeft.FullFineTune()
      >>> jpeft.FullFineTune(exclude=["word_embeddings"])
    """

    kind: ClassVar[str] = "full"

    targets: Any = None
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        selection(self)

    def select(self, model_type: str | None) -> Targets:
        return Targets(self.targets or ".*", self.exclude, self.layers, self.modules_to_save, seam="parameter")

    def count(self, site: Site) -> tuple[int, int]:
        return 0, 0  # the copies are counted where they are kept
