# SPDX-License-Identifier: Apache-2.0
"""The last layers are trained, and what stands behind them; all below is frozen.

Every parameter in the last `n` layers is trained as a copy, and so are the final norm or the pooler and a
classification task's head. Embeddings stay, and so does the head of a language model, which may be the embedding.

In a stack of layers a copy has the axis of all layers, of which `n` are trained: the others are masked, have gradients
of exactly zero and are counted nowhere, but memory (of the optimizer too) is taken for all. The backward pass ends at
the lowest trained layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .._fields import names, selection, whole
from .._method import Method, Site, Targets

#: What stands between the last layer and the head, by the model's type; not every task has it.
FINAL: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"), ("norm",)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "deberta-v2"), ("pooler.dense",)),
    "distilbert": ("pre_classifier",),
    "gpt2": ("ln_f",),
    "t5": ("decoder.final_layer_norm",),
    "vit": ("layernorm",),
    "whisper": ("decoder.layer_norm",),
}


@dataclasses.dataclass(frozen=True)
class LastLayers(Method):
    """The last `n` layers of a model, trained whole.

    Args:
      n: how many layers; 0 trains only what stands behind them, and with `final=()` the head alone (linear probing).
      targets: which modules in them, as of `jpeft.LoRA`; None for all. A model with several stacks of layers, such as
        an encoder and a decoder, needs it to say which is meant: `r"decoder\\..*"`.
      final: names of what stands behind the layers and is trained too; None for the final norm or pooler of the
        model's type, () for nothing.
      exclude, modules_to_save: as of `jpeft.LoRA`.

    Example:
      >>> jpeft.LastLayers(2)
    """

    kind: ClassVar[str] = "last_layers"

    n: int
    targets: Any = None
    final: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        whole("LastLayers", "n", self.n, least=0)
        selection(self)
        object.__setattr__(self, "final", names("final", self.final))

    def select(self, model_type: str | None) -> tuple[Targets, ...]:
        final = self.final
        if final is None and model_type not in FINAL:
            raise ValueError(
                f"LastLayers does not know what stands behind the layers of model type {model_type!r} (it does for "
                f"{', '.join(FINAL)}); pass final=, the names of modules, or () for none"
            )
        inside = (self.targets or ".*") if self.n else None
        layers = Targets(inside, self.exclude, None, self.modules_to_save, seam="parameter", last=self.n)
        if final == ():
            return (layers,)
        behind = FINAL[str(model_type)] if final is None else final
        return layers, Targets(behind, seam="parameter", last=0, optional=final is None)

    def count(self, site: Site) -> tuple[int, int]:
        return 0, 0  # the copies are counted where they are kept
