# SPDX-License-Identifier: Apache-2.0
"""What an adapter's or a model's folder holds, and what is wrong with it, by its own files alone.

Files are there, headers and sizes agree, values are finite, tensors have the ranks and widths of the configuration and
none is missing from its group. Whether it fits a base, loading it on that base says.
"""

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._matching import pattern_value
from ..models import CheckpointError
from ..models import _safetensors as safetensors
from ..models._checkpoint import open_checkpoint
from ._filling import Given, read_values
from ._hub_files import ADAPTER, FUSION, HEAD, SETUP, Files, read_tensors
from ._hub_fusion import read_setup
from ._hub_union import parts_of
from ._peft_folder import CONFIG, read_config, weights_file
from ._selection import selected


@dataclasses.dataclass
class Contents:
    """What a folder holds.

    Attributes:
      kind: `"PEFT adapter"`, `"AdapterHub adapter"`, `"AdapterHub fusion"`, `"AdapterHub setup"`, `"model"` or
        `"jpeft run"`.
      facts: what its configuration and its tensors say, by name.
      faults: all that is wrong, one line each.
      base: the base that it names, if it names one.
    """

    kind: str
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)
    base: str | None = None

    def __str__(self) -> str:
        lines = [self.kind, *(f"  {name}: {value}" for name, value in self.facts.items())]
        verdict = [f"  fault: {fault}" for fault in self.faults] or ["  no fault found"]
        return "\n".join(lines + verdict)


def verify(folder: str | Path) -> Contents:
    """What `folder` holds, and every fault that its own files show.

    Raises:
      FileNotFoundError: it holds nothing of these kinds.

    Example:
      >>> print(jpeft.io.verify("runs/sst2/adapter"))
    """
    folder = Path(folder)
    for file, (kind, look) in _KINDS.items():
        if (folder / file).is_file():
            contents = Contents(kind)
            _guarded(contents, lambda look=look, contents=contents: look(folder, contents))
            return contents
    raise FileNotFoundError(f"{folder} holds none of {', '.join(_KINDS)}, so it is no adapter, no model and no run")


def _guarded(contents: Contents, look: Callable[[], Any]) -> Any:
    """What `look` gives; an error of a file is a fault."""
    try:
        return look()
    except (OSError, CheckpointError, ImportError, ValueError) as error:
        contents.faults.append(str(error))
        return None


# Tensors ------------------------------------------------------------------------------------------------------------


def _count(contents: Contents, tensors: Mapping[str, Given], what: str = "tensors") -> None:
    """Says how many there are and of which dtypes, and looks for values that are not finite."""
    dtypes = sorted({tensor.dtype for tensor in tensors.values()})
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    contents.facts[what] = f"{len(tensors)}, {numbers:,} numbers, {', '.join(dtypes)}"
    if not tensors:
        contents.faults.append(f"there are no {what}")
    for key, tensor in sorted(tensors.items()):
        if tensor.dtype not in safetensors.FLOATS:
            contents.faults.append(f"{key} is {tensor.dtype}, not one of {', '.join(safetensors.FLOATS)}")
        elif not np.isfinite(read_values(tensor)).all():
            contents.faults.append(f"{key} has values that are not finite")


def _groups(keys: Iterable[str], endings: Iterable[str]) -> dict[str, set[str]]:
    """The endings that each beginning of a key has."""
    found: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        for ending in endings:
            if key.endswith(ending):
                found[key.removesuffix(ending)].add(ending)
    return found


def _complete(contents: Contents, keys: Iterable[str], endings: tuple[str, ...]) -> dict[str, set[str]]:
    """Groups of tensors that belong together; of one that lacks some, a fault."""
    groups = _groups(keys, endings)
    for start, there in sorted(groups.items()):
        contents.faults += [f"{start}{ending} is missing" for ending in endings if ending not in there]
    return groups


def _size(contents: Contents, key: str, tensors: Mapping[str, Given], axis: int, wanted: int, why: str) -> None:
    tensor = tensors.get(key)
    if tensor is not None and (axis >= len(tensor.shape) or tensor.shape[axis] != wanted):
        contents.faults.append(f"{key} is {list(tensor.shape)}, and {why} asks for {wanted} at axis {axis}")


# PEFT ---------------------------------------------------------------------------------------------------------------


def _adapter(folder: Path, contents: Contents) -> None:
    """adapter_config.json is PEFT's or AdapterHub's, by what it says."""
    config = read_config(folder)
    if "peft_type" not in config:
        contents.kind = "AdapterHub adapter"
        return _hub_adapter(folder, config, contents)
    contents.base = config.get("base_model_name_or_path")
    keys = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "modules_to_save")
    contents.facts |= {key: str(config[key]) for key in keys if config.get(key) is not None}
    tensors = _guarded(contents, lambda: safetensors.header(weights_file(folder)))
    if tensors is None:
        return None
    _count(contents, tensors)
    if config["peft_type"] == "LORA":
        _peft_lora(config, tensors, contents)
    return None


def _peft_lora(config: Mapping[str, Any], tensors: Mapping[str, Given], contents: Contents) -> None:
    start, seen = "base_model.model.", set()
    for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        for module in sorted(_complete(contents, tensors, (f".{a}", f".{b}"))):
            name = module.removeprefix(start)
            seen.add(name)
            rank = pattern_value(config.get("rank_pattern") or {}, name, config.get("r"))
            _size(contents, f"{module}.{a}", tensors, 0, rank, "r")
            _size(contents, f"{module}.{b}", tensors, 1, rank, "r")
            if config.get("target_modules") and not _meant(config, name):
                contents.faults.append(f"{name} has tensors, and target_modules does not mean it")
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in seen):
            contents.faults.append(f"target_modules names {target!r}, of which there are no tensors")
    contents.facts["modules"] = str(len(seen))


def _meant(config: Mapping[str, Any], name: str) -> bool:
    targets = config["target_modules"]
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    tied = bool(config.get("ensure_weight_tying"))
    return everything or tied or selected({**config, "modules_to_save": ()}, name)


# AdapterHub ---------------------------------------------------------------------------------------------------------


#: The keys of a configuration that are told.
_SAID = ("reduction_factor", "r", "alpha", "prefix_length", "non_linearity", "leave_out", "layers")


def _hub_adapter(folder: Path, whole: Mapping[str, Any], contents: Contents) -> None:
    config = whole.get("config")
    contents.facts |= {k: str(whole[k]) for k in ("name", "model_type", "model_class", "version") if whole.get(k)}
    if not isinstance(config, dict) or not isinstance(whole.get("name"), str):
        contents.faults.append(f"{folder / CONFIG} is neither PEFT's (peft_type) nor AdapterHub's (name and config)")
        return
    contents.facts["architecture"] = _architecture(config)
    parts = [config] if config.get("architecture") != "union" else _guarded(contents, lambda: parts_of(config)) or []
    for part in parts:
        said = {key: str(part[key]) for key in _SAID if part.get(key) not in (None, [])}
        where = "" if part is config else f"{_architecture(part)}: "
        contents.facts |= {where + key: value for key, value in said.items()}
    tensors = _guarded(contents, lambda: read_tensors(folder, ADAPTER))
    if tensors is not None:
        _count(contents, tensors)
        stray = sorted(key for key in tensors if f".{whole['name']}." not in key)
        contents.faults += [f"{key} is not of the adapter {whole['name']!r}" for key in stray]
        for part in parts:
            if [_architecture(other) for other in parts].count(_architecture(part)) == 1:  # else whose are the tensors?
                _HUB_RULES.get(str(part.get("architecture")), lambda *args: None)(whole, part, tensors, contents)
    if (folder / HEAD.config).is_file():
        _hub_part(folder, HEAD, "tensors of the head", contents)


def _architecture(config: Mapping[str, Any]) -> str:
    return str(config.get("architecture") or "bottleneck")


def _hub_part(folder: Path, files: Files, what: str, contents: Contents) -> None:
    tensors = _guarded(contents, lambda: read_tensors(folder, files))
    if tensors is not None:
        _count(contents, tensors, what)


def _hub_bottleneck(whole: Any, config: Any, tensors: Mapping[str, Given], contents: Contents) -> None:
    kernels = ("W_left", "W_right", "b") if config.get("phm_layer") else ("weight", "bias")
    down = f"adapter_down.{int(bool(config.get('ln_before')))}."
    places = _complete(contents, tensors, tuple(f"{part}{k}" for part in (down, "adapter_up.") for k in kernels))
    factor, width = config.get("reduction_factor"), whole.get("hidden_size")
    for place in sorted(places) if width and not config.get("phm_layer") else ():
        _size(contents, f"{place}{down}weight", tensors, 1, width, "hidden_size")
        _size(contents, f"{place}adapter_up.weight", tensors, 0, width, "hidden_size")
        if isinstance(factor, (int, float)):
            inner = max(1, int(width // factor))
            _size(contents, f"{place}{down}weight", tensors, 0, inner, "reduction_factor")
            _size(contents, f"{place}adapter_up.weight", tensors, 1, inner, "reduction_factor")
    if config.get("phm_layer") and not any(key.endswith("phm_rule") for key in tensors):
        contents.faults.append(
            "shared_parameters' phm_rule is missing: the library does not save it off a backbone without a head"
        )
    contents.facts["places"] = str(len(places))


def _hub_lora(whole: Any, config: Any, tensors: Mapping[str, Given], contents: Contents) -> None:
    scaled = config.get("composition_mode") == "scale"
    places = _complete(contents, tensors, ("lora_B",) if scaled else ("lora_A", "lora_B"))
    for place in sorted(places):
        _size(contents, f"{place}lora_B", tensors, 1, config["r"], "r")
        if ".c_attn." not in place:  # where the queries', keys' and values' stand below each other
            _size(contents, f"{place}lora_A", tensors, 0, config["r"], "r")
    contents.facts["matrices"] = str(len(places))


def _hub_reft(whole: Any, config: Any, tensors: Mapping[str, Given], contents: Contents) -> None:
    kernel = "projection.parametrizations.weight."
    projection = (f"{kernel}0.base", f"{kernel}original") if config.get("orthogonality") else ("projection.weight",)
    units = _complete(contents, tensors, ("learned_source.weight", "learned_source.bias", *projection))
    for unit in sorted(units):
        _size(contents, f"{unit}learned_source.weight", tensors, 0, config["r"], "r")
        _size(contents, f"{unit}{projection[-1]}", tensors, 0, config["r"], "r")
    contents.facts["units"] = str(len(units))


def _hub_prefix(whole: Any, config: Any, tensors: Mapping[str, Given], contents: Contents) -> None:
    for key, tensor in tensors.items():
        if key.endswith(".wte.weight"):
            _size(contents, key, tensors, 0, config["prefix_length"], "prefix_length")
        if key.endswith(".control_trans") and tensor.shape[0] % config["prefix_length"]:
            contents.faults.append(f"{key} is {list(tensor.shape)}, no multiple of prefix_length")


_HUB_RULES: Mapping[str, Callable[[Any, Any, Mapping[str, Given], Contents], None]] = {
    "None": _hub_bottleneck,
    "lora": _hub_lora,
    "reft": _hub_reft,
    "prefix_tuning": _hub_prefix,
}


def _fusion(folder: Path, contents: Contents) -> None:
    whole = read_config(folder, FUSION.config)
    contents.facts["name"] = str(whole.get("name"))
    _hub_part(folder, FUSION, "tensors", contents)


def _setup(folder: Path, contents: Contents) -> None:
    names = read_setup(read_config(folder, SETUP))
    contents.facts["fuses"] = ", ".join(names)
    for part in [*names, ",".join(names)]:
        _below(folder / part, contents)


def _below(folder: Path, contents: Contents) -> Contents | None:
    """A folder within, whose faults are the whole's."""
    inner = _guarded(contents, lambda: verify(folder))
    if inner is not None:
        contents.facts[folder.name] = f"{inner.kind}, {inner.facts.get('tensors', 'unread')}"
        contents.faults += [f"{folder.name}: {fault}" for fault in inner.faults]
    return inner


# Models and runs ----------------------------------------------------------------------------------------------------


def _model(folder: Path, contents: Contents) -> None:
    config = read_config(folder, "config.json", "save_pretrained")
    contents.facts |= {key: str(config[key]) for key in ("model_type", "architectures") if config.get(key)}
    _count(contents, open_checkpoint(folder))


def _run(folder: Path, contents: Contents) -> None:
    for name in ("config.yaml", "run.json"):
        if not (folder / name).is_file():
            contents.faults.append(f"{name} is missing")
    if (folder / "run.json").is_file():
        record = read_config(folder, "run.json", "jpeft train")
        keys = ("started", "updates", "trainable", "base")
        contents.facts |= {key: str(record[key]) for key in keys if key in record}
    entries = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    broken = [str(n) for n, line in enumerate(entries, 1) if not re.match(r"\{.*\}$", line) or not _is_json(line)]
    contents.facts["lines of metrics.jsonl"] = str(len(entries))
    if broken:
        contents.faults.append(f"metrics.jsonl has lines that are no JSON: {', '.join(broken[:9])}")
    inner = _below(folder / "adapter", contents)
    contents.base = inner.base if inner is not None else None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


#: The file that tells a folder's kind.
_KINDS: Mapping[str, tuple[str, Callable[[Path, Contents], None]]] = {
    "metrics.jsonl": ("jpeft run", _run),
    SETUP: ("AdapterHub setup", _setup),
    CONFIG: ("PEFT adapter", _adapter),
    FUSION.config: ("AdapterHub fusion", _fusion),
    "config.json": ("model", _model),
}
