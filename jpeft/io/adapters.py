# SPDX-License-Identifier: Apache-2.0
"""Adapters in the formats of AdapterHub's `adapters` 1.3.0: folders of adapters, heads, fusions and setups.

Both directions go through one list of slots (a tensor and the part of a leaf that it is), and both are strict: what
the library would not compute alike is refused on the way out; what is missing, unknown or ill-shaped on the way in.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from .._adapt import adapt
from .._fold import fold
from .._graft import grafts
from .._method import Adapter, Hybrid
from .._walk import own_leaves
from ..models import CheckpointError
from ..models import _safetensors as safetensors
from . import _hub_fusion as fusions
from . import _hub_union as unions
from ._filling import Held, adapters_of, chosen_name, fill, keyed, sources, tensors_of
from ._hub_bottleneck import BOTTLENECK
from ._hub_codec import VERSION, HubCodec, Parts
from ._hub_config import is_union, named, split
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


def export_adapters(model: Any, folder: str | Path, *, name: str | None = None) -> Path:
    """Writes an adapter as `adapters` does: `model.load_adapter(folder, use_safetensors=True)` there computes the same.

    Of an AdapterFusion the folder holds one folder for each adapter, one for the fusion, and adapter_setup.json, for
    `model.load_adapter_setup(folder, use_safetensors=True)`. The parts of a hybrid (MAM, UniPELT, `LoRA() | Houlsby()`)
    are one adapter there, a union. The head of a classification model goes along.

    Args:
      model: a model of the zoo with an adapter on it, of a family that the library has.
      folder: where the files go; what else it holds stays.
      name: which adapter, or hybrid, where the model has several; its name in the library too.

    Returns:
      The folder.

    Raises:
      ValueError: no adapter, or several and no `name`; a family, a method or a choice of places that the library has no
        form for, or computes otherwise; values that are not finite.

    Example:
      >>> jpeft.export_adapters(model, "out/adapter")
    """
    folder, (name, members) = Path(folder), _meant(model, name)
    if _fused(model, name):
        return _export_fusion(model, folder, name)
    return _export_one(model, folder, name, members)


def check_adapters(model: Any, name: str | None = None) -> None:
    """Raises what `export_adapters` would, as far as it does not depend on values: before a training, not after it."""
    name, members = _meant(model, name)
    fused = _fused(model, name)
    if not fused:
        _written(model, name, members)
        return
    _written_fusion(model, name)
    for part in fused:
        _written(model, part, (part,))


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
      name: the adapter's name in leaf paths; by default the library's, with _ for what no identifier has. A union's
        parts have their kinds behind it.
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


class _Written(NamedTuple):
    """How one adapter is written: by which codec, its configuration and its tensors."""

    codec: HubCodec
    config: dict[str, Any]
    slots: list[Slot]


def _meant(model: Any, name: str | None) -> tuple[str, tuple[str, ...]]:
    """What is to be written: its name in the library, and its adapters, of which a hybrid has several.

    It is `name`, or the only one, a fusion with its adapters counted as one.
    """
    there = sorted({own for _, module in grafts(model) for own in module.adapters})
    fused = {part for own in there for part in _fused(model, own)}
    if name is None and len({*there} - fused) == 1:
        (name,) = {*there} - fused
    whole, members = ("", ()) if name in there else unions.members(model, name)
    if not members:
        whole = chosen_name(model, name, "a folder of adapters")
    return whole, members or (whole,)


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


def _codec(kind: str) -> HubCodec:
    for codec in HUB_CODECS:
        if kind in codec.kinds:
            return codec
    known = ", ".join([*(kind for codec in HUB_CODECS for kind in codec.kinds), _FUSION])
    raise ValueError(f"adapters 1.3.0 has no format that computes what a {kind} does; it has one for {known}")


def _written(model: Any, name: str, members: Iterable[str]) -> tuple[Hub, dict[str, Any], list[_Written]]:
    """The names and the configuration of an adapter or a union, and how its members are written."""
    hub = Hub(model, name)
    written = [_member(model, own, hub) for own in members]
    if len(written) == 1:
        return hub, written[0].config, written
    unions.check_order(model, members)
    unions.check_apart([part.config for part in written], hub)
    unions.check_tensors(slot for part in written for slot in part.slots)
    return hub, unions.joined([part.config for part in written]), written


def _member(model: Any, own: str, hub: Hub) -> _Written:
    """How the adapter `own` is written, under the name of `hub`."""
    parts = _parts(model, own)
    codec = _codec(_method(parts).kind)
    if codec is PREFIX and not is_kept(_method(parts), parts, hub):
        parts = _parts(fold(model), own)
    _check_saved(parts, hub)
    parts = {path: codec.portable(adapter, hub) for path, adapter in parts.items()}
    return _Written(codec, codec.write(_method(parts), parts, hub), codec.slots(parts, hub))


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


def _export_one(model: Any, folder: Path, name: str, members: tuple[str, ...]) -> Path:
    hub, config, written = _written(model, name, members)
    tensors: dict[str, Any] = {}
    for codec, own, slots in written:
        tensors |= codec.encode(tensors_of(keyed(slots, lambda slot: slot.key)), own)
    head = tensors_of(_head(model, [_parts(model, own) for own in members], hub))
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
        _export_one(model, folder / part, part, (part,))
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


def _head(model: Any, adapters: Iterable[Parts], hub: Hub) -> dict[str, Slot]:
    """The tensors of a classification model's head: those that one of the adapters trains, else the base's."""
    trained = {path: part.saved for parts in adapters for path, part in parts.items() if part.saved}
    found = {}
    for path in dict.fromkeys(hub.names.paths.values()) if model.task in HEADS else ():
        if hub.names.head_of(path) is None:
            continue
        saved = trained.get(path, {})
        for leaf in own_leaves(hub.names.found[path].module):
            for slot in base_slots(path, [leaf], hub.names):
                held = Slot(slot.key, saved[leaf], slot.index, slot.axes, prefix="") if leaf in saved else slot
                found[slot.key] = held
    return found


# Reading ------------------------------------------------------------------------------------------------------------


def _import_one(model: Any, folder: Path, key: jax.Array, name: str | None, head: bool, direft: bool) -> Any:
    whole = read_config(folder, ADAPTER.config, _WRITER)
    theirs, config = named(whole, folder / ADAPTER.config)
    hub, own = Hub(model, theirs), re.sub(r"\W", "_", theirs) if name is None else name
    has_head = head and model.task in HEADS and (folder / HEAD.config).is_file()
    try:
        configs = split(config, whole.get("version"), hub, direft)
        codecs = [_reader(part) for part in configs]
        heads = [None if has_head else (), *((),) * (len(configs) - 1)]
        methods = [codec.read(part, hub, saves) for codec, part, saves in zip(codecs, configs, heads, strict=True)]
        method = Hybrid(tuple(methods)) if is_union(config) else methods[0]
        adapted = adapt(model, method, key=key, name=own)
        members = [part for part, _ in method.named(own)] if isinstance(method, Hybrid) else [own]
        parts = [adapters_of(adapted, part) for part in members]
        there = Hub(adapted, theirs)
        slots = [slot for codec, part in zip(codecs, parts, strict=True) for slot in codec.slots(part, there)]
        unions.check_tensors(slots)
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER.config}: {error}") from error
    arrays = _values(_based(read_tensors(folder, ADAPTER), hub))
    for codec, part in zip(codecs, configs, strict=True):
        arrays = codec.decode(arrays, part, hub)
    _refuse(folder, ADAPTER, _filled(keyed(slots, lambda slot: slot.key), arrays, hub))
    if has_head:
        _refuse(folder, HEAD, _filled(_head(adapted, parts, hub), _values(read_tensors(folder, HEAD)), hub))
    return adapted


def _reader(config: Mapping[str, Any]) -> HubCodec:
    codec = next((codec for codec in HUB_CODECS if codec.matches(config)), None)
    if codec is None:
        raise ValueError(f"it is of the architecture {config['architecture']!r}, which jpeft does not read")
    return codec


def _import_fusion(model: Any, folder: Path, key: jax.Array, name: str | None) -> Any:
    whole = read_config(folder, FUSION.config, _WRITER)
    theirs, config = named(whole, folder / FUSION.config)
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
