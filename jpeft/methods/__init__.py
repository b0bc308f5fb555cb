# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning methods, one file each; a method is found by nothing but its entry here."""

from collections.abc import Mapping

from .._method import Method
from .bottleneck import Houlsby, ParallelAdapter, Pfeiffer
from .compacter import Compacter
from .fusion import AdapterFusion
from .lora import LoRA

#: Every method by its kind, the name that stands in leaf paths and configurations.
METHODS: Mapping[str, type[Method]] = {
    method.kind: method
    for method in (
        LoRA,
        Houlsby,
        Pfeiffer,
        ParallelAdapter,
        Compacter,
        AdapterFusion,
    )
}  # fmt: skip

__all__ = [
    "METHODS",
    "AdapterFusion",
    "Compacter",
    "Houlsby",
    "LoRA",
    "ParallelAdapter",
    "Pfeiffer",
]
