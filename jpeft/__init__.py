# SPDX-License-Identifier: Apache-2.0
"""Parameter-efficient fine-tuning for JAX: functions on pytrees.

  model = jpeft.adapt(model, jpeft.LoRA(rank=16, targets=["q_proj", "v_proj"]), key=key)
  graphdef, trainable, frozen = jpeft.partition(model)
  grads = jax.grad(lambda t: loss(jpeft.combine(graphdef, t, frozen), batch))(trainable)

Names are loaded when first used, so that `jpeft --help` needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; `_WHERE` says the same to Python
    from . import io, models, seams, train
    from ._adapt import adapt, merge, penalty, strip
    from ._algebra import as_lora, average, combine_adapters
    from ._bank import Bank, apply_bank, bank, select, vote
    from ._eva import eva
    from ._fold import fold
    from ._fused_rule import quantized_products
    from ._hybrids import MAM, UniPELT
    from ._loftq import loftq
    from ._masks import labels, mask, optimizer
    from ._mesh import gather, local_rows, mesh, shard_batch
    from ._method import AdapterConstant, AdapterParam, Method
    from ._partition import GraphDef, combine, partition
    from ._prefix_from import prefix_from
    from ._quantize import dequantize, quantize
    from ._scale import disable, scale
    from ._scope import dropout_key, max_segments, prompt_tokens
    from ._sharding import SHARDING_RULES, optimizer_state, placement, shard, shardings
    from ._summary import summary
    from ._walk import sites
    from .io import export_adapters, export_merged, export_peft, import_adapters, import_peft, push
    from .methods import *
    from .seams import register
    from .train.many import train_many

__version__ = "0.1.0"

#: Module -> public names in it; those of `__all__` that are in none of these are methods.
_WHERE: dict[str, tuple[str, ...]] = {
    "_adapt": ("adapt", "merge", "penalty", "strip"),
    "_eva": ("eva",),
    "_prefix_from": ("prefix_from",),
    "_fold": ("fold",),
    "_fused_rule": ("quantized_products",),
    "_hybrids": ("MAM", "UniPELT"),
    "_scale": ("disable", "scale"),
    "_bank": ("bank", "Bank", "select", "apply_bank", "vote"),
    "_algebra": ("combine_adapters", "average", "as_lora"),
    "train.many": ("train_many",),
    "_partition": ("partition", "combine", "GraphDef"),
    "_quantize": ("quantize", "dequantize"),
    "_loftq": ("loftq",),
    "_walk": ("sites",),
    "_summary": ("summary",),
    "_masks": ("mask", "labels", "optimizer"),
    "_mesh": ("mesh", "local_rows", "shard_batch", "gather"),
    "_sharding": ("SHARDING_RULES", "placement", "shardings", "shard", "optimizer_state"),
    "_method": ("Method", "AdapterParam", "AdapterConstant"),
    "_scope": ("dropout_key", "max_segments", "prompt_tokens"),
    "seams": ("register",),
    "io": ("export_adapters", "export_merged", "export_peft", "import_adapters", "import_peft", "push"),
}
_MODULES = ("io", "models", "seams", "train")
_HOME = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "IA3",
    "MAM",
    "METHODS",
    "OFT",
    "SHARDING_RULES",
    "AdaLoRA",
    "AdapterConstant",
    "AdapterFusion",
    "AdapterParam",
    "Bank",
    "BitFit",
    "Compacter",
    "DiReFT",
    "DoRA",
    "FourierFT",
    "FullFineTune",
    "GraphDef",
    "Houlsby",
    "LastLayers",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoReFT",
    "Method",
    "NoReFT",
    "NormTuning",
    "PTuning",
    "ParallelAdapter",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "TrainableTokens",
    "UniPELT",
    "VeRA",
    "adapt",
    "apply_bank",
    "as_lora",
    "average",
    "bank",
    "combine",
    "combine_adapters",
    "dequantize",
    "disable",
    "dropout_key",
    "eva",
    "export_adapters",
    "export_merged",
    "export_peft",
    "fold",
    "gather",
    "import_adapters",
    "import_peft",
    "io",
    "labels",
    "local_rows",
    "loftq",
    "mask",
    "max_segments",
    "merge",
    "mesh",
    "models",
    "optimizer",
    "optimizer_state",
    "partition",
    "penalty",
    "placement",
    "prefix_from",
    "prompt_tokens",
    "push",
    "quantize",
    "quantized_products",
    "register",
    "scale",
    "seams",
    "select",
    "shard",
    "shard_batch",
    "shardings",
    "sites",
    "strip",
    "summary",
    "train",
    "train_many",
    "vote",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(importlib.import_module(f".{_HOME.get(name, 'methods')}", __name__), name)
    raise AttributeError(f"module 'jpeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
