# SPDX-License-Identifier: Apache-2.0
"""The files of AdapterHub's `adapters`: their names, and how tensors are read from them."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..models import CheckpointError
from ..models import _safetensors as safetensors
from ._filling import Held, read_values


class Files(NamedTuple):
    """What the library calls the files of one thing: its configuration, and its tensors in either form."""

    config: str
    safe: str
    pickled: str


ADAPTER = Files("adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin")
HEAD = Files("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
FUSION = Files("adapter_fusion_config.json", "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
SETUP = "adapter_setup.json"

#: The first torch whose `weights_only` lets no code run.
_SAFE_TORCH = (2, 6)
_WORDS = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def stale(*kept: Files) -> list[str]:
    """Files of an older adapter in the same folder, where those `kept` are written anew as safetensors."""
    return [f.pickled for f in kept] + [name for f in (ADAPTER, HEAD, FUSION) if f not in kept for name in f]


def read_tensors(folder: Path, files: Files) -> dict[str, Held]:
    """The tensors of one thing, from its safetensors, else from what torch pickled.

    Raises:
      FileNotFoundError: neither is there.
      ImportError: the pickled form alone is there, and no torch that can open it safely.
      CheckpointError: the file is damaged, or pickles something else than tensors.
    """
    if (folder / files.safe).is_file():
        tensors = safetensors.header(folder / files.safe)
        odd = [f"{key} ({t.dtype})" for key, t in tensors.items() if t.dtype not in safetensors.FLOATS]
        _check_dtypes(folder / files.safe, odd)
        return {key: Held(t.dtype, t.shape, read_values(t)) for key, t in tensors.items()}
    if not (folder / files.pickled).is_file():
        raise FileNotFoundError(f"no {folder / files.safe}, and no {files.pickled}; adapters' save_adapter writes one")
    return _unpickled(folder / files.pickled)


def _unpickled(file: Path) -> dict[str, Held]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(
            f"{file} is torch's own format, which needs torch to be opened (pip install torch); or save the adapter "
            "again in adapters with use_safetensors=True"
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise ImportError(
            f"{file} is a pickle, and torch {torch.__version__} can be made to run code by one even with weights_only; "
            "install torch 2.6 or newer, or save the adapter again in adapters with use_safetensors=True"
        )
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what is wrong
        raise CheckpointError(f"{file} is no pickle of tensors alone, and no other is opened: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CheckpointError(f"{file} holds something else than tensors by their names")
    _check_dtypes(file, [f"{key} ({t.dtype})" for key, t in loaded.items() if str(t.dtype) not in _WORDS])
    return {
        key: Held(_WORDS[str(t.dtype)], tuple(t.shape), np.asarray(t.detach().to(torch.float32).numpy()))
        for key, t in loaded.items()
    }


def _check_dtypes(file: Path, odd: Iterable[str]) -> None:
    odd = [*odd]
    if odd:
        raise CheckpointError(f"{file} has tensors that are no floats: {safetensors.names(odd)}")
