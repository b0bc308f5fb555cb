# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning methods, one file each; a method is found by nothing but its entry here."""

from collections.abc import Mapping

from .._method import Method
from .adalora import AdaLoRA
from .bitfit import BitFit
from .bottleneck import Houlsby, ParallelAdapter, Pfeiffer
from .compacter import Compacter
from .dora import DoRA
from .full import FullFineTune
from .fusion import AdapterFusion
from .ia3 import IA3
from .last_layers import LastLayers
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .norm_tuning import NormTuning
from .oft import OFT
from .p_tuning import PTuning
from .prefix import PrefixTuning
from .prompt import PromptTuning
from .reft import DiReFT, LoReFT, NoReFT
from .trainable_tokens import TrainableTokens
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
        IA3,
        TrainableTokens,
        BitFit,
        NormTuning,
        FullFineTune,
        LastLayers,
        Houlsby,
        Pfeiffer,
        ParallelAdapter,
        Compacter,
        AdapterFusion,
        PromptTuning,
        PTuning,
        PrefixTuning,
        LoReFT,
        NoReFT,
        DiReFT,
    )
}  # fmt: skip

__all__ = [
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "AdapterFusion",
    "BitFit",
    "Compacter",
    "DiReFT",
    "DoRA",
    "FullFineTune",
    "Houlsby",
    "LastLayers",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoReFT",
    "NoReFT",
    "NormTuning",
    "PTuning",
    "ParallelAdapter",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "TrainableTokens",
    "VeRA",
]
