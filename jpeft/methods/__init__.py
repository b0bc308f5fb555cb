# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning methods, one file each; a method is found by nothing but its entry here."""

from collections.abc import Mapping

from .._method import Method
from .adalora import AdaLoRA
from .dora import DoRA
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .oft import OFT
from .vera import VeRA

#: Every method by its kind, the name that stands in leaf paths and configurations.
METHODS: Mapping[str, type[Method]] = {
    method.kind: method
    for method in (
        LoRA,
        DoRA,
        AdaLoRA,
        LoHa,
        LoKr,
        VeRA,
        OFT,
    )
}  # fmt: skip

__all__ = [
    "METHODS",
    "OFT",
    "AdaLoRA",
    "DoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "VeRA",
]
