# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning methods, one file each; a method is found by nothing but its entry here."""

from collections.abc import Mapping

from .._method import Method
from .ia3 import IA3
from .lora import LoRA
from .trainable_tokens import TrainableTokens

#: Every method by its kind, the name that stands in leaf paths and configurations.
METHODS: Mapping[str, type[Method]] = {
    method.kind: method
    for method in (
        LoRA,
        IA3,
        TrainableTokens,
    )
}  # fmt: skip

__all__ = [
    "IA3",
    "METHODS",
    "LoRA",
    "TrainableTokens",
]
