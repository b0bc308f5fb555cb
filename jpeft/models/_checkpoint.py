# SPDX-License-Identifier: Apache-2.0
"""A model folder: config.json, and safetensors in one file, or in shards with the index that says what is where."""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import _safetensors as safetensors
from ._files import CheckpointError, is_file, names, read_json
from ._safetensors import Source, Tensor

_LOG = logging.getLogger("jpeft")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: What a tokenizer may lie in, and how images and sounds are made ready.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
)


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it is damaged.
    """
    file = Path(folder) / "config.json"
    if not is_file(file):
        raise FileNotFoundError(f"no {file}; a model folder holds config.json and model.safetensors")
    return read_json(file)


def open_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors file or shards, by name; only headers are read.

    Raises:
      FileNotFoundError: no such folder, no safetensors, or a shard that the index names is missing.
      CheckpointError: a file is cut short, or the index names a file outside of the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; a model folder holds config.json and {SINGLE}")
    if is_file(folder / SINGLE):
        return safetensors.header(folder / SINGLE)
    if is_file(folder / INDEX):
        return _open_shards(folder)
    pickled = names(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        raise FileNotFoundError(
            f"{folder} has only pickled weights ({pickled}), which can run code when opened and are not read; "
            "convert them to safetensors with transformers' save_pretrained"
        )
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")


def shard_files(folder: Path) -> list[str]:
    """The names of the files that a folder's index names.

    Raises:
      CheckpointError: it has no weight_map, or names what is no safetensors file in its folder.
    """
    return sorted({*_weight_map(folder / INDEX).values()})


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} must be JSON with a weight_map from tensor to file")
    outside = [file for file in weight_map.values() if Path(file).name != file or file in ("", ".", "..")]
    if outside:
        raise CheckpointError(f"{index} names files outside of its folder: {names(outside)}")
    strange = [file for file in weight_map.values() if not re.fullmatch(r"[\w.-]+\.safetensors", file)]
    if strange:
        raise CheckpointError(f"{index} names files that are no safetensors: {names({*strange})}")
    return weight_map


def _open_shards(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX
    weight_map = _weight_map(index)
    files = sorted({*weight_map.values()})
    missing = [file for file in files if not is_file(folder / file)]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the shards {names(missing)} that {INDEX} names")
    tensors = [item for file in files for item in safetensors.header(folder / file).items()]
    differing = {(name, tensor.file.name) for name, tensor in tensors} ^ {*weight_map.items()}
    if differing:
        raise CheckpointError(f"{index} and its shards disagree about {names({name for name, _ in differing})}")
    return dict(tensors)


def common_dtype(tensors: Mapping[str, Tensor]) -> np.dtype:
    """The floating dtype that most of a checkpoint's parameters have."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.dtype in safetensors.FLOATS:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    if not sizes:
        raise CheckpointError("the checkpoint holds no floating-point tensor; quantized files are not read here")
    common = max(sizes, key=lambda word: sizes[word])
    if len(sizes) > 1:
        _LOG.warning("the checkpoint mixes %s; everything is read as %s", names(sizes), common)
    return safetensors.FLOATS[common]


def write_checkpoint(folder: Path, sources: Mapping[str, Source], shard_bytes: int) -> None:
    """Writes tensors into one file, or into shards of at most `shard_bytes` (or one tensor) with their index."""
    shards = _split(sources, shard_bytes)
    if len(shards) == 1:
        return safetensors.write(folder / SINGLE, sources, {"format": "pt"})
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        safetensors.write(folder / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(safetensors.nbytes(source) for source in sources.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _split(sources: Mapping[str, Source], most: int) -> list[dict[str, Source]]:
    shards: list[dict[str, Source]] = [{}]
    size = 0
    for key, source in sources.items():
        size += safetensors.nbytes(source)
        if shards[-1] and size > most:
            shards.append({})
            size = safetensors.nbytes(source)
        shards[-1][key] = source
    return shards
