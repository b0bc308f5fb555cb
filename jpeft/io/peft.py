# SPDX-License-Identifier: Apache-2.0
"""Adapters in the format of Hugging Face's PEFT 0.21.2: adapter_config.json and adapter_model.safetensors.

Both directions go through one list of slots (a tensor and the part of a leaf that it is), and both are strict: what
the format cannot hold is refused on the way out; what is missing, unknown or ill-shaped is refused on the way in.
"""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from .._adapt import adapt
from .._fold import fold
from .._graft import grafts
from .._method import Adapter
from .._summary import added, summary
from .._walk import own_leaves
from ..models import CheckpointError
from ..models import _safetensors as safetensors
from ..models._families import FAMILIES
from ..models._files import about
from ..models._hub import adapter_folder
from ._adalora_codec import ADALORA
from ._dora_codec import DORA
from ._filling import adapters_of, chosen_name, fill, keyed, sources, tensors_of
from ._fourierft_codec import FOURIERFT
from ._ia3_codec import IA3
from ._loha_codec import LOHA
from ._lokr_codec import LOKR
from ._lora_codec import LORA
from ._names import HEADS, UNNAMED, Names, names_of
from ._norm_tuning_codec import NORM_TUNING
from ._oft_codec import OFT
from ._parameters import by_module, check_experts
from ._peft_folder import CONFIG, README, WEIGHTS, installing, read_config, weights_file
from ._slots import Codec, Slot, all_slots, base_slots, whole
from ._tokens_codec import TOKENS_BESIDE, TRAINABLE_TOKENS, apart, write_beside
from ._vera_codec import VERA
from ._virtual_codecs import P_TUNING, PREFIX_TUNING, PROMPT_TUNING
from .card import Card, render

#: Every method that PEFT has a format for, by its kind; a method joins with one entry.
CODECS: Mapping[str, Codec] = {
    codec.kind: codec
    for codec in (
        LORA,
        DORA,
        ADALORA,
        IA3,
        VERA,
        LOHA,
        LOKR,
        OFT,
        NORM_TUNING,
        FOURIERFT,
        PROMPT_TUNING,
        P_TUNING,
        PREFIX_TUNING,
        TRAINABLE_TOKENS,
    )
}

PEFT_VERSION = "0.21.2"

#: How much larger than its file an adapter may be: ranks are padded to the largest, and projections may be drawn anew.
_MOST_TIMES, _MOST_MORE = 100, 2**28


def export_peft(
    model: Any, folder: str | Path, *, name: str | None = None, base: str | None = None, card: Card | None = None
) -> Path:
    """Writes an adapter as PEFT does: `peft.PeftModel.from_pretrained(base, folder)` computes the same as `model`.

    The files are written beside their place and moved into it, so a save that is killed leaves no half adapter. PiSSA
    and OLoRA are written as plain LoRA of twice the rank, which is right on the base as it is; a prompt or prefix that
    a network computes is written as what it is (`jpeft.fold`), without the network. A LoRA with trained tokens beside
    it (`LoRA(trainable_token_indices=...)`, or `LoRA(...) | TrainableTokens(...)`) is one folder.

    Args:
      model: a model of the zoo with an adapter on it.
      folder: where adapter_config.json, adapter_model.safetensors and README.md go; what else it holds stays.
      name: which adapter, where the model has several; None takes a LoRA and the trained tokens beside it together.
      base: the base model's id on the Hub, or its folder; for adapter_config.json and the card.
      card: data, metrics and versions for README.md.

    Returns:
      The folder.

    Raises:
      ValueError: no adapter, or several and no `name`; a model without Hugging Face names; a method, or a choice of
        modules, that PEFT has no form for; values that are not finite.

    Example:
      >>> jpeft.export_peft(model, "out/adapter", base="meta-llama/Llama-3.2-1B")
    """
    chosen = _chosen(model, name)
    rows = [row for row in summary(model).rows if row.name in chosen]
    row = functools.reduce(added, sorted(rows, key=lambda row: row.method.kind == TRAINABLE_TOKENS.kind))
    codec, config, slots = _written(fold(model), chosen, base)
    tensors = tensors_of(keyed(slots, codec.name))
    with installing(Path(folder)) as new:
        safetensors.write(new / WEIGHTS, sources(tensors), {"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        reads = FAMILIES[model.config.model_type].reads
        (new / README).write_text(render(card or Card(), config, row, model.task, reads), encoding="utf-8")
    return Path(folder)


def check_export(model: Any, name: str | None = None) -> None:
    """Raises what `export_peft` would, as far as it does not depend on values: before a training, not after it."""
    _written(fold(model), _chosen(model, name), None)


def import_peft(
    model: Any,
    folder: str | Path,
    *,
    key: jax.Array | None = None,
    name: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Any:
    """`model` with the adapter that PEFT saved in `folder` on it, to be used or trained on; `model` is untouched.

    Tensors in float16 and bfloat16 become float32. A copy of the base, as PEFT puts beside an adapted embedding, must
    equal the model's own. Configurations of older and newer PEFT are read too: a key that is unknown, or stands for
    something unsupported, is accepted while its value is empty (null, false, [], {}) and else refused by name; keys
    that tell where an adapter came from or how it was started count for nothing. What a network computed (P-tuning, a
    projected prefix) is in the file without it, and is read as the plain prompt or prefix that it is.

    Args:
      model: the base, a model of the zoo.
      folder: with adapter_config.json and adapter_model.safetensors; or, where there is none of that name, an id on
        the hub, `"org/name"`.
      key: PRNG key for leaves that a method's file leaves out by its format. LoRA's leaves out none, so that with it
        no key changes anything; `jax.random.key(0)` by default.
      name: the adapter's name in leaf paths; by default the kind of method that it was trained as.
      revision, local_files_only: of the hub, as `jpeft.models.load` takes them.

    Raises:
      FileNotFoundError: no adapter there, or a pickled one.
      PermissionError, ConnectionError, ImportError: the hub refuses, cannot be reached, or has no package here.
      CheckpointError: a damaged file, or tensors that do not fit the model: all of them in one message.
      ValueError: the configuration asks for what is not supported, or for what the model does not have.

    Example:
      >>> model = jpeft.import_peft(jpeft.models.load("llama-3.2-1b"), "adapter")
    """
    folder, names = adapter_folder(folder, revision, local_files_only), names_of(model)
    config = read_config(folder)
    codec = _codec(config, folder / CONFIG)
    _check_task(config, model, folder / CONFIG)
    tensors: Mapping[str, Any] = safetensors.header(weights_file(folder))
    name = codec.kind if name is None else name
    with about(folder / CONFIG):
        config, tensors = by_module(config, tensors, names)
        put_on = functools.partial(
            adapt, method=codec.read(config, names), key=jax.random.key(0) if key is None else key, name=name
        )
        _check_size(nnx.eval_shape(put_on, model), name, tensors)
        adapted = put_on(model)
    adapters = _adapters(adapted, (name,))
    _check_copied(codec, adapters, names)
    found = keyed(_slots(codec, adapters, names), codec.name)
    slots = {key: slot for key, slot in found.items() if key not in codec.left_out(config)}
    problems = fill(slots, codec.counted(tensors, config), names, codec.prefix)
    if problems:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit the model\n  " + "\n  ".join(problems))
    return adapted


def _check_size(shapes: Any, name: str, tensors: Mapping[str, safetensors.Tensor]) -> None:
    """Before anything of it is made: what a configuration asks for must be of the order of what the file holds."""
    leaves = jax.tree.leaves([nnx.state(adapter) for adapter in adapters_of(shapes, name).values()])
    asked, held = sum(math.prod(leaf.shape) for leaf in leaves), sum(math.prod(t.shape) for t in tensors.values())
    if asked > _MOST_TIMES * held + _MOST_MORE:
        raise ValueError(f"it asks for an adapter of {asked:,} numbers, and {WEIGHTS} holds {held:,}")


def _adapters(model: Any, chosen: tuple[str, ...]) -> dict[str, Adapter]:
    """The parts of one adapter, by the path of their module; of several that one folder holds.

    Raises:
      ValueError: two of these have a part at one module.
    """
    found: dict[str, Adapter] = {}
    for path, module in grafts(model):
        for name in (name for name in chosen if name in module.adapters):
            if path in found:
                raise ValueError(f"{path} has parts of {' and '.join(chosen)}, and in PEFT's one folder it holds one")
            found[path] = module.adapters[name]
    return found


def _slots(codec: Codec, adapters: Mapping[str, Adapter], names: Names) -> list[Slot]:
    """Every tensor of an adapter, with those of the tokens beside it."""
    own, rows = apart(adapters)
    return all_slots(codec, own, names) + all_slots(TOKENS_BESIDE, rows, names)


def _check_copied(codec: Codec, adapters: Mapping[str, Adapter], names: Names) -> None:
    """An adapter on a table that transformers reads through copies alone means something here and nothing there."""
    for path, adapter in adapters.items():
        tokens = codec.on_copies or adapter.method.kind == TRAINABLE_TOKENS.kind
        safe = names.tied.keys() if tokens else ()  # PEFT looks for copies where the table is the head too
        for name in (names.copied.keys() & {*adapter.site.names}) - {*safe}:
            raise ValueError(
                f"{path} is read as {' and '.join(names.copied[name])} in transformers, which are modules of their own "
                f"there, so that PEFT's adapter on {name} does nothing: PEFT has no form for this adapter"
            )


# Writing ------------------------------------------------------------------------------------------------------------


def _chosen(model: Any, name: str | None) -> tuple[str, ...]:
    """The names of the adapters that go into a folder: one, or a LoRA and the trained tokens beside it."""
    kinds: dict[str, set[str]] = {}
    for _, module in grafts(model):
        for own, adapter in module.adapters.items():
            kinds.setdefault(own, set()).add(adapter.method.kind)
    others = [found - {TRAINABLE_TOKENS.kind} for found in kinds.values()]
    if name is None and [kind for kind in others if kind] == [{LORA.kind}]:
        return tuple(sorted(kinds))
    return (chosen_name(model, name, "a PEFT folder"),)


def _written(model: Any, chosen: tuple[str, ...], base: str | None) -> tuple[Codec, dict[str, Any], list[Slot]]:
    """How an adapter is written, its adapter_config.json and its tensors."""
    names, adapters = names_of(model), _adapters(model, chosen)
    own, rows = apart(adapters)
    kind = next(iter(own.values())).method.kind
    if kind not in CODECS:
        raise ValueError(
            f"PEFT has no format for the adapter {chosen[0]!r}, a {kind}; it has one for {', '.join(CODECS)}"
        )
    codec = CODECS[kind]
    _check_copied(codec, adapters, names)
    check_experts(kind, own, names)
    if model.task in UNNAMED and any(adapter.site.seam in ("input", "keys_values") for adapter in adapters.values()):
        raise ValueError(
            f"PEFT has no name for the task {model.task}, and uses a {kind} for tasks that it knows alone: it has no "
            "form for this adapter"
        )
    own = {path: codec.portable(adapter) for path, adapter in own.items()}
    slots = _slots(codec, own | rows, names)
    if codec.saves:
        slots += _untrained_heads(model, own, names)
    return codec, _config(model, codec, own, names, slots, base) | write_beside(rows), slots


def _untrained_heads(model: Any, adapters: Mapping[str, Adapter], names: Names) -> list[Slot]:
    """The leaves of the task's head that are not trained: PEFT keeps every such head with the adapter all the same."""
    slots = []
    for path in _head_layers(model, names):
        adapter = adapters.get(path)
        if adapter is not None and adapter.acts:
            raise ValueError(
                f"{path} carries {adapter.method.kind}, but PEFT puts no adapter on the head of a {model.task} model, "
                "which it saves whole; train it by modules_to_save"
            )
        saved = adapter.saved_layers if adapter is not None else {}
        slots += base_slots(path, own_leaves(names.found[path].module).keys() - saved.keys(), names)
    return slots


def _config(
    model: Any, codec: Codec, adapters: Mapping[str, Adapter], names: Names, slots: list[Slot], base: str | None
) -> dict[str, Any]:
    """adapter_config.json, with every key that PEFT writes."""
    method = next((a.method for a in adapters.values() if a.acts), next(iter(adapters.values())).method)
    config = {
        "auto_mapping": None if names.task_type else names.auto_mapping,  # by which PEFT finds the class of the base
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": codec.peft_type,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": names.task_type,
        **codec.write(method, list(adapters.values()), names),
    }
    saved = sorted(path for path, adapter in adapters.items() if adapter.saved_layers)
    if codec.saves:
        config["modules_to_save"] = _modules_to_save(model, codec, adapters, names)
    elif saved:
        raise ValueError(
            f"the adapter trains {', '.join(saved)} whole, and PEFT's {codec.peft_type} saves no module beside its own "
            "tensors; adapt with modules_to_save=()"
        )
    heads = tuple(f"{head}." for head in names.repeats)
    if "ensure_weight_tying" in config and any(slot.key.startswith(heads) for slot in slots):
        config["ensure_weight_tying"] = True
    return config


def _modules_to_save(model: Any, codec: Codec, adapters: Mapping[str, Adapter], names: Names) -> list[str] | None:
    """Names of the modules that are saved whole, a head's as PEFT has them for the task.

    Raises:
      ValueError: PEFT would read them as more than these.
    """
    saved = {path for path, adapter in adapters.items() if whole(adapter, names.found[path].module)}
    paths = {path for path in saved if not codec.copies(adapters[path], names.found[path])}
    paths |= {*_head_layers(model, names)}
    chosen = {_saved_as(name, path, names) for name, path in names.paths.items() if path in paths}
    chosen |= {head for name in chosen for head in names.tied.get(name, ())}
    more = {name for name in names.every if name.endswith(tuple(chosen))} - chosen if chosen else set()
    if more:
        raise ValueError(
            f"PEFT reads modules_to_save as endings of names, so {safetensors.names(chosen)} would take in "
            f"{safetensors.names(more)} as well: PEFT has no form for this adapter"
        )
    automatic = HEADS.get(model.task, ())
    return sorted({name for name in chosen if not name.endswith(automatic)}.union(automatic)) or None


def _head_layers(model: Any, names: Names) -> list[str]:
    """Paths of the layers of the task's head, where PEFT saves heads."""
    return [path for path in names.paths.values() if names.head_of(path)] if model.task in HEADS else []


def _saved_as(name: str, path: str, names: Names) -> str:
    """What PEFT calls the saved module `name`, at `path`: a head of several layers it saves as one."""
    head = names.head_of(path)
    return name if head is None else name.removesuffix(path.removeprefix(head).replace("/", "."))


# Reading ------------------------------------------------------------------------------------------------------------


def _codec(config: Mapping[str, Any], file: Path) -> Codec:
    found = [codec for codec in CODECS.values() if codec.peft_type == config.get("peft_type")]
    if not found:
        known = dict.fromkeys(codec.peft_type for codec in CODECS.values())
        raise ValueError(f"{file} has peft_type {config.get('peft_type')!r}; jpeft reads {', '.join(known)}")
    flagged = [codec for codec in found if codec.flag is not None and config.get(codec.flag)]
    return next(iter(flagged), found[0])


def _check_task(config: Mapping[str, Any], model: Any, file: Path) -> None:
    task = config.get("task_type")
    if task not in (None, model.task):
        raise ValueError(
            f"{file} is an adapter for {task}, the model is one for {model.task}; load it with task={task!r}"
        )
