# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning methods, one file each; a method is found by nothing but its entry here."""

from collections.abc import Mapping

from .._method import Method
from .lora import LoRA
from .p_tuning import PTuning
from .prefix import PrefixTuning
from .prompt import PromptTuning

#: Every method by its kind, the name that stands in leaf paths and configurations.
METHODS: Mapping[str, type[Method]] = {
    method.kind: method
    for method in (
        LoRA,
        PromptTuning,
        PTuning,
        PrefixTuning,
    )
}  # fmt: skip

__all__ = [
    "METHODS",
    "LoRA",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
]
