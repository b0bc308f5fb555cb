# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning methods, one file each; a method is found by nothing but its entry here."""

from collections.abc import Mapping

from .._method import Method
from .bitfit import BitFit
from .full import FullFineTune
from .ia3 import IA3
from .last_layers import LastLayers
from .lora import LoRA
from .norm_tuning import NormTuning
from .trainable_tokens import TrainableTokens

#: Every method by its kind, the name that stands in leaf paths and configurations.
METHODS: Mapping[str, type[Method]] = {
    method.kind: method
    for method in (
        LoRA,
        IA3,
        TrainableTokens,
        BitFit,
        NormTuning,
        FullFineTune,
        LastLayers,
    )
}  # fmt: skip

__all__ = [
    "IA3",
    "METHODS",
    "BitFit",
    "FullFineTune",
    "LastLayers",
    "LoRA",
    "NormTuning",
    "TrainableTokens",
]
