# SPDX-License-Identifier: Apache-2.0
"""The zoo: models that load and save Hugging Face folders, made of the seams where methods act.

  model = jpeft.models.load("path/to/folder")                       # what its config.json says it is
  model = jpeft.models.load("path/to/folder", task="SEQ_CLS", num_labels=4)
  model = jpeft.models.build(hf_config, "CAUSAL_LM", key=key)       # from scratch; or "llama-2-7b", one of presets()
  jpeft.models.save(model, "path/to/other")                         # transformers loads it
  ids = jpeft.models.generate(model, prompt, max_new_tokens=32)     # what it writes

Each family is one file: its Config, PRESETS, modules and WEIGHTS. To add one, write the file and add its model types
to the table of `_families.py`.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .._stack import REMAT_POLICIES
from ._checkpoint import TOKENIZER_FILES, common_dtype, open_checkpoint, read_config
from ._families import FAMILIES, LABELLED, Family, family_of, preset, presets, saved_task, task_of
from ._files import CheckpointError, about, copy_file, is_file, names
from ._folder import replacing
from ._hub import model_folder
from ._quantizing import reading
from ._safetensors import Tensor
from ._stored import Codes
from ._stored_config import stored
from ._stored_writing import described, kernels, written
from ._table import Entry
from ._weights import Sharding, load_leaves, save_leaves
from .generate import Options, generate, stream

__all__ = [
    "CheckpointError",
    "Options",
    "build",
    "copy_tokenizer",
    "generate",
    "load",
    "num_parameters",
    "presets",
    "save",
    "stream",
    "task_of",
    "weights",
]

_LOG = logging.getLogger("jpeft")


def load(
    path: str | Path,
    task: str | None = None,
    dtype: Any = None,
    *,
    key: jax.Array | None = None,
    num_labels: int | None = None,
    remat: str = "none",
    unroll: bool = False,
    sharding: Sharding | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Any:
    """A model from a Hugging Face folder: config.json and model.safetensors, or its shards.

    Weights that a folder keeps as codes (bitsandbytes in 4 and 8 bits, GPTQ, AWQ) stay the codes that they are.

    Args:
      path: the folder; or, where there is no folder of that name, an id on the hub, `"org/name"`.
      task: `CAUSAL_LM`, `SEQ_2_SEQ_LM`, `SEQ_CLS`, `TOKEN_CLS`, `QUESTION_ANS`, `MULTIPLE_CHOICE`, `IMAGE_CLS` or
        `FEATURE_EXTRACTION` (hidden states); None keeps what the config's architecture says. Asked for another one than
        was saved, the backbone is loaded, the saved head is dropped and the new one initialised; warnings name the
        weights of both.
      dtype: of storage and computation; None keeps the checkpoint's.
      key: for a new head's first values; `jax.random.key(0)` by default.
      num_labels: size of a classification head; None keeps the config's. Another size means a new head.
      remat: what a layer keeps for the backward pass: `none`, `dots`, `full`, `names` or `offload`.
      unroll: compile a loop over the layers in the scan's place.
      sharding: (path, shape) -> `jax.sharding.Sharding`; each device's slice is read straight to its place. None
        puts all on the default device.
      quantize: a scheme of `jpeft.quantize`, for all linear layers but the head; each leaf is quantized as it is read,
        so that the whole model is never there in floats.
      revision: a branch, a tag or a commit on the hub; main by default.
      local_files_only: take from the hub's cache what is there, and ask the hub for nothing.

    Raises:
      FileNotFoundError: no folder and no id on the hub, no config.json, no safetensors, or a missing shard.
      PermissionError, ConnectionError, ImportError: the hub refuses, cannot be reached, or has no package here.
      CheckpointError: a damaged file, weights that are not finite, or tensors that do not fit the model; the message
        names every one.
      ValueError: a model type, task or config attribute that is not supported.

    Example:
      >>> model = load("all-MiniLM-L6-v2", task="SEQ_CLS", num_labels=4)
      >>> logits = model(input_ids, attention_mask)  # [batch, 4]
    """
    folder, asked = model_folder(path, revision, local_files_only), task
    hf = read_config(folder)
    with about(folder / "config.json"):
        kept, hf = stored(hf)
        if kept is not None and quantize is not None:
            raise ValueError(f"it says that its weights are codes already ({kept.method}); load it without quantize=")
        family, saved = family_of(hf), saved_task(hf)
        config, task = _configure(family, hf, task, num_labels)
    options = _options(jnp.float32 if dtype is None else dtype, remat, unroll)
    with about(folder):
        codes = Codes(open_checkpoint(folder), kept, sharding)
        tensors = codes.tensors
        if dtype is None:
            options["dtype"] = common_dtype(codes.plain)
        abstract = family.abstract(config, task, options)
        _, shapes = _flatten(abstract)
        changed = asked not in (None, saved) or num_labels not in (None, family.config(hf).num_labels)
        heads = family.module.HEADS if changed else ()
        model, quantized, convert = reading(abstract, quantize, sharding)
        leaves = load_leaves(
            _without(tensors, abstract.head) if changed and saved else tensors,
            family.module.WEIGHTS(config, task),
            shapes,
            sharding,
            prefixes=family.module.PREFIXES,
            droppable=[f"{head}." for head in heads],
            fresh=[f"{head}/" for head in heads or getattr(family.module, "OPTIONAL", ())],
            convert=convert,
            codes=codes.leaves,
        )
        model = codes.model(model, leaves)
    fresh = sorted({*shapes} - {*leaves} - {*quantized} - {*codes.schemes})
    if fresh:
        _LOG.warning("initialised anew, to be trained: %s", ", ".join(fresh))
        leaves |= _first_values(
            family, config, task, options, jax.random.key(0) if key is None else key, fresh, sharding
        )
    graphdef, shapes = _flatten(model)
    return nnx.graph.unflatten(graphdef, [leaves[path] for path in shapes])


def build(
    hf_config: Mapping[str, Any] | str | Any,
    task: str | None = None,
    *,
    key: jax.Array,
    dtype: Any = jnp.float32,
    num_labels: int | None = None,
    remat: str = "none",
    unroll: bool = False,
) -> Any:
    """A model from scratch, initialised as transformers does; under `jax.eval_shape` it costs nothing.

    Args:
      hf_config: config.json as a mapping, a Config of the zoo, or a preset's name (`jpeft.models.presets`).
      task: as in `load`; None keeps what `architectures` says, and means FEATURE_EXTRACTION where it says nothing.
      key: of the first values.
      dtype, num_labels, remat, unroll: as in `load`.

    Raises:
      ValueError: a model type, task or config attribute that is not supported; a name that is no preset's.

    Example:
      >>> shapes = jax.eval_shape(lambda: nnx.state(build("llama-2-7b", "CAUSAL_LM", key=jax.random.key(0))))
    """
    hf = _as_hf(hf_config)
    family = family_of(hf)
    config, task = _configure(family, hf, task, num_labels)
    options = _options(dtype, remat, unroll)
    graphdef, shapes = _flatten(family.abstract(config, task, options))
    leaves = _first_values(family, config, task, options, key, [*shapes])
    return nnx.graph.unflatten(graphdef, [leaves[path] for path in shapes])


def num_parameters(hf_config: Mapping[str, Any] | str | Any, task: str | None = None) -> int:
    """How many parameters a model has, by shape alone; tied ones count once. Arguments as of `build`.

    Example:
      >>> num_parameters("bert-base-uncased")
      109482240
    """
    hf = _as_hf(hf_config)
    config, task = _configure(family_of(hf), hf, task, None)
    _, shapes = _flatten(family_of(hf).abstract(config, task, {}))
    return sum(math.prod(shape.shape) for shape in shapes.values())


def save(model: Any, path: str | Path) -> None:
    """Writes config.json and safetensors (in shards from 5 GB on) that transformers loads without a missing key.

    The folder is written beside its place and renamed, so a save that is killed leaves an older one as it was. What
    else an older folder holds, such as a tokenizer, stays. Adapters are not saved here: merge or strip them first.
    Kernels in codes are written as codes: those in NF4, FP4 and int8 as bitsandbytes writes them, so that transformers
    loads the same codes; those of other schemes, of several at once, or of weights that are no torch Linear's, in a
    layout of jpeft's own (`_stored_own.py`).

    Raises:
      CheckpointError: the model has leaves that its table does not know.
      FileExistsError: `path` holds something that is no model folder.
    """
    family, codes = FAMILIES[model.config.model_type], kernels(model)
    inside = tuple(f"{path}/" for path in codes)
    leaves = {path: leaf for path, leaf in _flatten(model)[1].items() if not path.startswith(inside)}
    dtype = max(leaves.values(), key=lambda leaf: leaf.size).dtype.name
    hf = model.config.to_hf() | {"architectures": [family.architecture(model.task)], "dtype": dtype}
    hf.pop("torch_dtype", None)
    if codes:
        hf["quantization_config"] = described(weights(model), codes)
    entries = tuple(entry for entry in weights(model) if getattr(entry, "path", None) not in codes)
    with replacing(Path(path)) as folder:
        save_leaves(folder, entries, leaves, codes=written(weights(model), codes))
        (folder / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weights(model: Any) -> tuple[Entry, ...]:
    """The table of `model`: which Hugging Face tensor is which of its leaves.

    Raises:
      ValueError: the model is none of the zoo's.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES or not hasattr(model, "module_names"):
        raise ValueError(
            f"{type(model).__name__} has no table of Hugging Face names; the models of jpeft.models have one"
        )
    return FAMILIES[model_type].module.WEIGHTS(config, model.task)


def copy_tokenizer(source: str | Path, target: str | Path) -> list[str]:
    """Copies a folder's tokenizer, or processor of images or sounds, into another; returns the names of the files."""
    copied = [name for name in TOKENIZER_FILES if is_file(Path(source) / name)]
    if not copied:
        raise FileNotFoundError(
            f"{source} holds none of a tokenizer's or processor's files: {', '.join(TOKENIZER_FILES)}"
        )
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in copied:
        copy_file(Path(source) / name, Path(target) / name)
    return copied


def _options(dtype: Any, remat: str, unroll: bool) -> dict[str, Any]:
    """What a model takes beside its config and task."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point type such as jnp.bfloat16; got {dtype!r}")
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}; got {remat!r}")
    return {"dtype": jnp.dtype(dtype), "remat": remat, "unroll": unroll}


def _flatten(model: Any) -> tuple[Any, dict[str, Any]]:
    """NNX's graphdef, and the leaves by path, in its order."""
    graphdef, flat = nnx.graph.flatten(model)
    return graphdef, {
        "/".join(map(str, path)): leaf.get_value() for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    }


def _first_values(
    family: Family,
    config: Any,
    task: str,
    options: Mapping[str, Any],
    key: jax.Array,
    paths: Sequence[str],
    sharding: Sharding | None = None,
) -> dict[str, jax.Array]:
    """Initialises the leaves at `paths`; the others are never made."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        leaves = _flatten(family.make(config, task, key, options))[1]
        return {path: leaves[path] for path in paths}

    if sharding is None:
        return jax.jit(init)(key)
    places = {path: sharding(path, shape) for path, shape in jax.eval_shape(init, key).items()}
    return jax.jit(init, out_shardings=places)(key)


def _without(tensors: Mapping[str, Tensor], heads: Sequence[str]) -> dict[str, Tensor]:
    """A checkpoint without its own head, which has the new one's name and another meaning or size."""
    kept = {key: tensor for key, tensor in tensors.items() if key.partition(".")[0] not in heads}
    if len(kept) < len(tensors):
        _LOG.warning("dropped the saved head: %s", names({*tensors} - {*kept}))
    return kept


def _as_hf(config: Any) -> dict[str, Any]:
    """config.json of what `build` takes."""
    config = preset(config) if isinstance(config, str) else config
    return dict(config) if isinstance(config, Mapping) else config.to_hf()


def _configure(family: Family, hf: Mapping[str, Any], task: str | None, num_labels: int | None) -> tuple[Any, str]:
    """The config and the task asked for, both checked."""
    config, tasks = family.config(hf), family.tasks
    task = task or saved_task(hf) or (None if hf.get("architectures") else "FEATURE_EXTRACTION")
    if task is None:
        raise ValueError(f"no task of the zoo is {hf['architectures'][0]}; pass task=, one of {', '.join(tasks)}")
    if task not in tasks:
        raise ValueError(f"{hf['model_type']} has the tasks {', '.join(tasks)}; got {task!r}")
    if num_labels is not None and (task not in LABELLED or num_labels < 1):
        raise ValueError(f"num_labels is 1 or more and belongs to {', '.join(LABELLED)}; got {num_labels} with {task}")
    wanted = 2 if task == "QUESTION_ANS" else num_labels  # the start and the end of an answer
    return (config if wanted is None else dataclasses.replace(config, num_labels=wanted)), task
