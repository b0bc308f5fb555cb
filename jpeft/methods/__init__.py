# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning methods, one file each; a method is found by nothing but its entry here."""

from collections.abc import Mapping

from .._method import Method
from .adalora import AdaLoRA as AdaLoRA
from .bitfit import BitFit as BitFit
from .bottleneck import Houlsby as Houlsby
from .bottleneck import ParallelAdapter as ParallelAdapter
from .bottleneck import Pfeiffer as Pfeiffer
from .compacter import Compacter as Compacter
from .dora import DoRA as DoRA
from .fourierft import FourierFT as FourierFT
from .full import FullFineTune as FullFineTune
from .fusion import AdapterFusion as AdapterFusion
from .ia3 import IA3 as IA3
from .last_layers import LastLayers as LastLayers
from .loha import LoHa as LoHa
from .lokr import LoKr as LoKr
from .lora import LoRA as LoRA
from .norm_tuning import NormTuning as NormTuning
from .oft import OFT as OFT
from .p_tuning import PTuning as PTuning
from .prefix import PrefixTuning as PrefixTuning
from .prompt import PromptTuning as PromptTuning
from .reft import DiReFT as DiReFT
from .reft import LoReFT as LoReFT
from .reft import NoReFT as NoReFT
from .trainable_tokens import TrainableTokens as TrainableTokens
from .vera import VeRA as VeRA

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
        FourierFT,
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
