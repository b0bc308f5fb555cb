# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning methods, one file each; a method is found by nothing but its entry here."""

from collections.abc import Mapping

from .._method import Method
from .lora import LoRA
from .reft import DiReFT, LoReFT, NoReFT

#: Every method by its kind, the name that stands in leaf paths and configurations.
METHODS: Mapping[str, type[Method]] = {
    method.kind: method
    for method in (
        LoRA,
        LoReFT,
        NoReFT,
        DiReFT,
    )
}  # fmt: skip

__all__ = [
    "METHODS",
    "DiReFT",
    "LoRA",
    "LoReFT",
    "NoReFT",
]
