# SPDX-License-Identifier: Apache-2.0
"""Adapters in the formats of AdapterHub's `adapters` 1.3.0: folders of adapters, heads, fusions and setups.

Both directions go through one list of slots (a tensor and the part of a leaf that it is), and both are strict: what
the library would not compute alike is refused on the way out; what is missing, unknown or ill-shaped on the way in.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from .._adapt import adapt
from .._fold import fold
from .._graft import grafts
from .._method import Adapter
from .._walk import own_leaves
from ..models import CheckpointError
from ..models import _safetensors as safetensors
from . import _hub_fusion as fusions
from ._filling import Held, adapters_of, chosen_name, fill, keyed, sources, tensors_of
from ._hub_bottleneck import BOTTLENECK
from ._hub_codec import VERSION, HubCodec, Parts
from ._hub_files import ADAPTER, FUSION, HEAD, SETUP, Files, read_tensors, stale
from ._hub_layout import Hub
from ._hub_lora import LORA
from ._hub_prefix import PREFIX, is_kept
from ._hub_reft import REFT
from ._names import HEADS
from ._peft_folder import installing, read_config
from ._slots import Slot, base_slots

#: Every kind of method that the library has a format for; a method joins with one entry.
HUB_CODECS: tuple[HubCodec, ...] = (BOTTLENECK, LORA, PREFIX, REFT)
_FUSION = "adapter_fusion"
_WRITER = "adapters' save_adapter"
#: What configurations without a version call activations.
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def export_adapters(model: Any, folder: str | Path, *, name: str | None = None) -> Path:
    """Writes an adapter as `adapters` does: `model.load_adapter(folder, use_safetensors=True)` there computes the same.

    Of an AdapterFusion the folder holds one folder for each adapter, one for the fusion, and adapter_setup.json, for
    `model.load_adapter_setup(folder, use_safetensors=True)`. The head of a classification model goes along.

    Args:
      model: a model of the zoo with an adapter on it, of a family that the library has.
      folder: where the files go; what else it holds stays.
      name: which adapter, where the model has several; its name in the library too.

    Returns:
      The folder.

    Raises:
      ValueError: no adapter, or several and no `name`; a family, a method or a choice of places that the library has no
        form for, or computes otherwise; values that are not finite.

    Example:
      >>> jpeft.export_adapters(model, "out/adapter")
    """
    folder, name = Path(folder), _meant(model, name)
    if _kind(adapters_of(model, name)) == _FUSION:
        return _export_fusion(model, folder, name)
    return _export_one(model, folder, name)


def check_adapters(model: Any, name: str | None = None) -> None:
    """Raises what `export_adapters` would, as far as it does not depend on values: before a training, not after it."""
    name = _meant(model, name)
    fused = _fused(model, name)
    if fused:
        _written_fusion(model, name)
    for part in fused or (name,):
        _written(model, part)


def import_adapters(
    model: Any,
    folder: str | Path,
    *,
    key: jax.Array | None = None,
    name: str | None = None,
    head: bool = True,
    direft: bool = False,
) -> Any:
    """`model` with the adapter that `adapters` saved in `folder` on it, to be used or trained on; `model` is untouched.

    A folder of a whole setup gives its adapters and their fusion; that of a fusion alone is put over the adapters that
    the model has already, by their names. Tensors are read from safetensors, or from what torch pickled (.bin), by
    torch and with weights alone.

    Args:
      model: the base, a model of the zoo.
      folder: with adapter_config.json, adapter_setup.json or adapter_fusion_config.json.
      key: PRNG key of first values, all of which the file replaces; `jax.random.key(0)` by default.
      name: the adapter's name in leaf paths; by default the library's, with _ for what no identifier has.
      head: whether to read the head that was saved along, where there is one.
      direft: read what says that it is NoReFT as DiReFT: the library writes the same configuration for both.

    Raises:
      FileNotFoundError: no adapter there.
      ImportError: tensors in torch's own format, and no torch.
      CheckpointError: a damaged file, or tensors that do not fit the model: all of them in one message.
      ValueError: the configuration asks for what is not supported, or for what the model does not have.

    Example:
      >>> model = jpeft.import_adapters(jpeft.models.load("bert-base-uncased"), "adapter")
    """
    folder, key = Path(folder), jax.random.key(0) if key is None else key
    if (folder / SETUP).is_file():
        names = fusions.read_setup(read_config(folder, SETUP, _WRITER))
        for part in names:
            model = import_adapters(model, folder / part, key=key, head=False)
        return import_adapters(model, folder / ",".join(names), key=key, name=name)
    if (folder / FUSION.config).is_file() and not (folder / ADAPTER.config).is_file():
        return _import_fusion(model, folder, key, name)
    return _import_one(model, folder, key, name, head, direft)


# Writing ------------------------------------------------------------------------------------------------------------


def _meant(model: Any, name: str | None) -> str:
    """The adapter to be written: `name`, or the only one, a fusion with its adapters counted as one."""
    there = sorted({own for _, module in grafts(model) for own in module.adapters})
    fused = {part for own in there for part in _fused(model, own)}
    if name is None and len({*there} - fused) == 1:
        (name,) = {*there} - fused
    return chosen_name(model, name, "a folder of adapters")


def _parts(model: Any, name: str) -> dict[str, Adapter]:
    """The parts of an adapter, also of one that a fusion took over."""
    found = adapters_of(model, name)
    for path, module in grafts(model):
        for adapter in module.adapters.values():
            if name in adapter.parts:
                found[path] = adapter.parts[name]
    return found


def _fused(model: Any, name: str) -> tuple[str, ...]:
    """Names of the adapters that the fusion `name` took over; () of anything else."""
    parts = adapters_of(model, name)
    method: Any = next((adapter.method for adapter in parts.values()), None)
    return method.adapters if method is not None and method.kind == _FUSION else ()


def _kind(parts: Parts) -> str:
    return next(iter(parts.values())).method.kind


def _codec(kind: str) -> HubCodec:
    for codec in HUB_CODECS:
        if kind in codec.kinds:
            return codec
    known = ", ".join([*(kind for codec in HUB_CODECS for kind in codec.kinds), _FUSION])
    raise ValueError(f"adapters 1.3.0 has no format that computes what a {kind} does; it has one for {known}")


def _written(model: Any, name: str) -> tuple[HubCodec, Hub, dict[str, Any], list[Slot]]:
    """How an adapter is written, its configuration and its tensors."""
    hub, parts = Hub(model, name), _parts(model, name)
    codec = _codec(_kind(parts))
    if codec is PREFIX and not is_kept(_method(parts), parts, hub):
        parts = _parts(fold(model), name)
    _check_saved(parts, hub)
    parts = {path: codec.portable(adapter, hub) for path, adapter in parts.items()}
    return codec, hub, codec.write(_method(parts), parts, hub), codec.slots(parts, hub)


def _written_fusion(model: Any, name: str) -> tuple[Hub, dict[str, Any], list[Slot]]:
    """How a fusion is written, without the adapters under it."""
    names, parts = _fused(model, name), adapters_of(model, name)
    hub = Hub(model, ",".join(names))
    fusions.check_parts({part: _method(_parts(model, part)) for part in names})
    _check_saved(parts, hub)
    return hub, fusions.write(_method(parts)), fusions.slots(parts, hub)


def _method(parts: Parts) -> Any:
    return next((a.method for a in parts.values() if a.acts), next(iter(parts.values())).method)


def _check_saved(parts: Parts, hub: Hub) -> None:
    """Of what is trained whole the library keeps the head alone."""
    odd = [path for path, part in parts.items() if part.saved_layers and hub.names.head_of(path) is None]
    if odd:
        raise ValueError(
            f"the adapter trains {', '.join(odd)} whole, and adapters keeps the head alone beside an adapter; adapt "
            "with modules_to_save=()"
        )


def _export_one(model: Any, folder: Path, name: str) -> Path:
    codec, hub, config, slots = _written(model, name)
    tensors = codec.encode(tensors_of(keyed(slots, lambda slot: slot.key)), config)
    head = tensors_of(_head(model, _parts(model, name), hub))
    kept = (ADAPTER, HEAD) if head else (ADAPTER,)
    with installing(folder, ADAPTER.config, stale(*kept)) as new:
        _write(new, ADAPTER, tensors, {"config": config, **_origin(hub, name)})
        if head:
            labels = {f"LABEL_{i}": i for i in range(hub.model.config.num_labels)}
            _write(
                new, HEAD, head, {"config": None, **_origin(hub, None), "label2id": labels, "num_labels": len(labels)}
            )
    return folder


def _export_fusion(model: Any, folder: Path, name: str) -> Path:
    names = _fused(model, name)
    hub, config, slots = _written_fusion(model, name)
    tensors = tensors_of(keyed(slots, lambda slot: slot.key))
    for part in names:
        _export_one(model, folder / part, part)
    config = {"adapter_names": [*names], "config": config, **_origin(hub, hub.name)}
    with installing(folder / hub.name, FUSION.config, stale(FUSION)) as new:
        _write(new, FUSION, tensors, config)
    (folder / SETUP).write_text(_text(fusions.write_setup(names)))
    return folder


def _write(folder: Path, files: Files, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    safetensors.write(folder / files.safe, sources(tensors), {"format": "pt"})
    (folder / files.config).write_text(_text(config))


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True)


def _origin(hub: Hub, name: str | None) -> dict[str, Any]:
    """What every configuration says beside its own."""
    kind = {"hidden_size": hub.width, "model_class": hub.model_class, "model_name": "", "name": name}
    return {**kind, "model_type": hub.model.config.model_type, "version": VERSION}


def _labels(count: int) -> dict[str, Any]:
    return {"label2id": {f"LABEL_{i}": i for i in range(count)}, "num_labels": count}


def _head(model: Any, parts: Parts, hub: Hub) -> dict[str, Slot]:
    """The tensors of a classification model's head: those that the adapter trains, else the base's."""
    found = {}
    for path in dict.fromkeys(hub.names.paths.values()) if model.task in HEADS else ():
        if hub.names.head_of(path) is None:
            continue
        saved = parts[path].saved if path in parts else {}
        for leaf in own_leaves(hub.names.found[path].module):
            for slot in base_slots(path, [leaf], hub.names):
                held = Slot(slot.key, saved[leaf], slot.index, slot.axes, prefix="") if leaf in saved else slot
                found[slot.key] = held
    return found


# Reading ------------------------------------------------------------------------------------------------------------


def _import_one(model: Any, folder: Path, key: jax.Array, name: str | None, head: bool, direft: bool) -> Any:
    whole = read_config(folder, ADAPTER.config, _WRITER)
    theirs, config = _named(whole, folder / ADAPTER.config)
    config = _of_old_versions(config, whole.get("version")) | ({"subtract_projection": False} if direft else {})
    hub = Hub(model, theirs)
    codec = next((codec for codec in HUB_CODECS if codec.matches(config)), None)
    if codec is None:
        raise ValueError(f"{folder / ADAPTER.config} is of the architecture {config['architecture']!r}, which jpeft "
                         "does not read")  # fmt: skip
    has_head = head and model.task in HEADS and (folder / HEAD.config).is_file()
    own = re.sub(r"\W", "_", theirs) if name is None else name
    try:
        method = codec.read(config, hub, None if has_head else ())
        adapted = adapt(model, method, key=key, name=own)
        parts = adapters_of(adapted, own)
        slots = keyed(codec.slots(parts, Hub(adapted, theirs)), lambda slot: slot.key)
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER.config}: {error}") from error
    arrays = {key: held.values for key, held in _based(read_tensors(folder, ADAPTER), hub).items()}
    problems = _filled(slots, codec.decode(arrays, config, hub), hub)
    _refuse(folder, ADAPTER, problems)
    if has_head:
        problems = _filled(_head(adapted, parts, hub), _values(read_tensors(folder, HEAD)), hub)
        _refuse(folder, HEAD, problems)
    return adapted


def _import_fusion(model: Any, folder: Path, key: jax.Array, name: str | None) -> Any:
    whole = read_config(folder, FUSION.config, _WRITER)
    theirs, config = _named(whole, folder / FUSION.config)
    parts = [re.sub(r"\W", "_", part) for part in whole.get("adapter_names") or theirs.split(",")]
    if absent := [part for part in parts if not _parts(model, part)]:
        raise ValueError(f"{folder} fuses {', '.join(parts)}, and the model has no {absent[0]}; import these first")
    fusions.check_parts({part: _method(_parts(model, part)) for part in parts})
    own = _FUSION if name is None else name
    adapted = adapt(model, fusions.read(config, parts, _layers(_parts(model, parts[0]))), key=key, name=own)
    slots = keyed(fusions.slots(adapters_of(adapted, own), Hub(adapted, theirs)), lambda slot: slot.key)
    hub = Hub(model, theirs)
    _refuse(folder, FUSION, _filled(slots, _values(_based(read_tensors(folder, FUSION), hub)), hub))
    return adapted


def _layers(parts: Parts) -> list[int]:
    """Indices of the layers in which a bottleneck adapter acts."""
    active = next(part.site.active for part in parts.values() if part.site.seam == "residual")
    return [i for i, acts in enumerate(active) if acts]


def _named(whole: Mapping[str, Any], file: Path) -> tuple[str, dict[str, Any]]:
    """The name and the configuration proper of a file."""
    name, config = whole.get("name"), whole.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError(f"{file} is no configuration of adapters: it has name {name!r} and config {config!r}")
    return name, config


def _of_old_versions(config: dict[str, Any], version: Any) -> dict[str, Any]:
    """The configuration as 1.3.0 understands one of an older version."""
    config = dict(config)
    if version is None and "non_linearity" in config:
        config["non_linearity"] = _RENAMED.get(config["non_linearity"], config["non_linearity"])
    found = re.match(r"adapters\.(\d+)\.(\d+)", str(version))
    if found and (int(found[1]), int(found[2])) < (1, 1) and config.get("architecture") == "lora":
        config["alpha"] = config["r"]  # all were trained so
    return config


def _based(tensors: Mapping[str, Held], hub: Hub) -> dict[str, Held]:
    """The tensors with what a model with a head puts before their names."""
    return {hub.whole_name(key): tensor for key, tensor in tensors.items()}


def _values(tensors: Mapping[str, Held]) -> dict[str, Any]:
    return {key: tensor.values for key, tensor in tensors.items()}


def _filled(slots: Mapping[str, Slot], arrays: Mapping[str, Any], hub: Hub) -> list[str]:
    return fill(slots, {key: Held("F32", value.shape, value) for key, value in arrays.items()}, hub.names, "")


def _refuse(folder: Path, files: Files, problems: list[str]) -> None:
    if problems:
        file = folder / (files.safe if (folder / files.safe).is_file() else files.pickled)
        raise CheckpointError(f"{file} does not fit the model\n  " + "\n  ".join(problems))
