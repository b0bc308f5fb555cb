# SPDX-License-Identifier: Apache-2.0
"""LoRA on parameters instead of modules (PEFT's `target_parameters`): the experts of a mixture, in PEFT's two forms.

transformers 5 holds the experts of a layer in two tensors, on which PEFT's LoRA is one pair of matrices each:

  mlp.experts.gate_up_proj [experts, 2 d_ff, d_model]   lora_A [experts · r, d_model]   lora_B [2 d_ff, r · experts]

Expert e has the rows `e r ... e r + r` of lora_A and the columns `e, experts + e, ...` of lora_B. Here, in checkpoints
and in what PEFT wrote on transformers 4, each expert's w1, w3 and w2 are a module. Such files are written, since PEFT
reads them on any version of transformers (w1 and w3 as one pair of twice the rank); both kinds are read.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .. import seams
from .._matching import pattern_value
from .._method import Adapter
from ..models import _safetensors as safetensors
from ..models._table import Joined, Renamed
from ._filling import Piece
from ._names import Names
from ._slots import PREFIX


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of transformers 5: its name, and the modules that it is here, `modules[part][expert]`."""

    name: str
    modules: tuple[tuple[str, ...], ...]

    def parts(self, side: str, tensor: safetensors.Tensor) -> dict[str, safetensors.Tensor | Piece]:
        """lora_A or lora_B of every module, of a pair on the whole; nothing where the shape is of no such pair."""
        experts, parts = len(self.modules[0]), len(self.modules)
        if len(tensor.shape) != 2 or tensor.shape[side == "B"] % experts or (side == "B" and tensor.shape[0] % parts):
            return {}
        rank, rows = tensor.shape[side == "B"] // experts, tensor.shape[0] // parts
        found: dict[str, safetensors.Tensor | Piece] = {}
        for part, names in enumerate(self.modules):
            for e, name in enumerate(names):
                if side == "A":
                    cut = functools.partial(_rows, slice(e * rank, (e + 1) * rank))
                    found[f"{name}.lora_A.weight"] = Piece(tensor, (rank, tensor.shape[1]), cut)
                else:
                    cut = functools.partial(_rows, (slice(part * rows, (part + 1) * rows), slice(e, None, experts)))
                    found[f"{name}.lora_B.weight"] = Piece(tensor, (rows, rank), cut)
        return found


def _rows(index: Any, whole: np.ndarray) -> np.ndarray:
    return whole[index]


def by_module(
    config: dict[str, Any], tensors: Mapping[str, Any], names: Names
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """An adapter's configuration and tensors with modules in the place of parameters.

    Raises:
      ValueError: `target_parameters` names what is no such parameter of this model.
    """
    targets = config.get("target_parameters")
    if not targets:
        return config, tensors
    known = list(_parameters(names))
    chosen = [p for p in known if any(p.name == t or p.name.endswith(f".{t}") for t in targets)]
    for target in targets:
        if not any(p.name == target or p.name.endswith(f".{target}") for p in chosen):
            ends = sorted({p.name.split(".", 3)[-1] for p in known})
            raise ValueError(
                f"target_parameters={[target]!r}: of parameters jpeft adapts those of experts and their routers, and "
                f"this model has {', '.join(ends) or 'none'}; modules are named by target_modules"
            )
    found = dict(tensors)
    for p, depth in _nested(chosen):
        for side in "AB":
            key = f"{PREFIX}{p.name.rpartition('.')[0]}.{'base_layer.' * depth}lora_{side}.weight"
            if key in found and (parts := p.parts(side, found[key])):
                del found[key]
                found |= {PREFIX + name: part for name, part in parts.items()}
    modules = [name for p in chosen for part in p.modules for name in part]
    given = config.get("target_modules") or []
    patterns = {
        field: _pattern(chosen, config.get(field) or {}, config.get(default, 8))
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    }
    joined = "|".join([f"(?:{given})", *map(re.escape, modules)]) if isinstance(given, str) else [*given, *modules]
    return {**config, "target_parameters": None, "target_modules": joined, **patterns}, found


def _pattern(chosen: list[Parameter], pattern: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """`pattern`, with what it says of parameters said of modules."""
    own = {
        re.escape(name): value
        for p in chosen
        if (value := pattern_value(pattern, p.name, default)) != default
        for part in p.modules
        for name in part
    }
    return {**own, **pattern}


def _parameters(names: Names) -> Iterator[Parameter]:
    """The parameters that transformers 5 has in the place of modules, in the order in which it registers them."""
    for entry in names.entries:
        if isinstance(entry, Joined):
            first = entry.parts[0].format(e=0)
            for start in [key.removesuffix(first) for key in names.tensors if key.endswith(first)]:
                experts = range(names.found[names.tensors[start + first].path.rpartition("/")[0]].lead[-1])
                modules = (tuple(_module(start + part.format(e=e)) for e in experts) for part in entry.parts)
                yield Parameter(start + entry.old, tuple(modules))
        elif isinstance(entry, Renamed) and entry.old.count(".") > 1:
            for key in [key for key in names.tensors if key.endswith(entry.new)]:
                yield Parameter(key.removesuffix(entry.new) + entry.old, ((_module(key),),))


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _nested(chosen: list[Parameter]) -> Iterator[tuple[Parameter, int]]:
    """Each with the number of other pairs that PEFT puts around its own, on the same module."""
    for i, p in enumerate(chosen):
        module = p.name.rpartition(".")[0]
        yield p, sum(other.name.rpartition(".")[0] == module for other in chosen[i + 1 :])


def check_experts(kind: str, adapters: Mapping[str, Adapter], names: Names) -> None:
    """Raises a ValueError where PEFT, which has experts and routers as parameters, has no form for what is on them."""
    blocks = {path.rsplit("/", 2)[0] for path, found in names.found.items() if seams.beside(found.module)}
    inside = {path: a for path, a in adapters.items() if path.rpartition("/")[0].removesuffix("/experts") in blocks}
    for path, adapter in inside.items():
        reason = _no_form(kind, adapter)
        if reason is not None:
            raise ValueError(f"{path}: {reason}; PEFT has no form for this adapter. Merge and save the model")
    for path in inside:
        block, _, name = path.rpartition("/")
        missing = [w for w in ("w1", "w2", "w3") if name in ("w1", "w3") and f"{block}/{w}" not in inside]
        if missing:
            raise ValueError(
                f"{path} is adapted and {' and '.join(missing)} not, and PEFT, for which w1 and w3 are one parameter, "
                "reads an adapter of all three, or of w2 alone: PEFT has no form for this adapter. Merge and save the "
                "model"
            )


def _no_form(kind: str, adapter: Adapter) -> str | None:
    """Why PEFT has no form for an adapter on experts or their router; None where it has one."""
    method: Any = adapter.method
    if adapter.saved_layers:
        return "transformers 5 has no module of this name that modules_to_save could find"
    if kind != "lora":
        return (
            f"in transformers 5 this is a parameter and no module, and PEFT puts LoRA alone on parameters, not {kind}"
        )
    if method.dropout:
        return "PEFT's LoRA on parameters has no dropout"
    if not all(adapter.site.active):
        return "PEFT puts LoRA on the experts of all layers or of none"
    ranks = {(rank, pattern_value(method.alpha_pattern, name, method.alpha)) for name, rank in _ranks(adapter)}
    if ranks != {(method.rank, method.alpha)}:
        return "PEFT reads rank_pattern and alpha_pattern for none of the experts' modules"
    if method.rslora and adapter.site.path.rpartition("/")[2] in ("w1", "w3"):
        return (
            "PEFT reads w1 and w3 as one pair of twice the rank and alpha, which rslora=True scales by another factor"
        )
    return None


def _ranks(adapter: Any) -> Iterator[tuple[str, int]]:
    return zip(adapter.site.names, adapter.method.ranks(adapter.site), strict=True)
