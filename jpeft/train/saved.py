# SPDX-License-Identifier: Apache-2.0
"""A trained model on disk and back: adapter folders, merged folders, and what their outputs are called."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from .. import models
from ..io import Drift, Sample, export_merged, export_peft, import_peft
from ..io.card import Card
from . import tokenizer
from .job import read_hf_config

#: Beside PEFT's files: what they have no place for.
INFO = "jpeft.json"

#: Lines of a text file that a drift is measured on.
SAMPLED = 64


@dataclasses.dataclass(frozen=True)
class Info:
    """What a model's user needs to know beyond its weights.

    Attributes:
      label_names: in the order of the head's outputs; None for a language model.
      max_length: tokens that a text was cut to in training.
      quantize: the scheme of the codes that an adapter was trained beside; None for floats.
    """

    label_names: tuple[str, ...] | None
    max_length: int | None
    quantize: str | None = None


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model ready for use.

    Attributes:
      model: adapted, or plain where no adapter was given.
      tokenizer, info: of its folder.
      base: the base's folder.
    """

    model: Any
    tokenizer: tokenizer.Tokenizer
    info: Info
    base: Path


def save_adapter(model: Any, folder: str | Path, base: str | Path, info: Info, card: Card) -> None:
    """Writes an adapter in PEFT's format, with the base's tokenizer and `info` beside it."""
    folder = export_peft(model, folder, base=str(base), card=card)
    models.copy_tokenizer(base, folder)
    (folder / INFO).write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n", encoding="utf-8")


def save_merged(opened: Opened, folder: str | Path, text: str | Path | None = None) -> Drift:
    """Writes the merged model as a Hugging Face folder whose config.json names the labels; returns the drift.

    Args:
      text: a file on whose first lines the drift is measured; None for random tokens.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or no text in it.
    """
    sample = None if text is None else _sample(opened, Path(text))
    drift = export_merged(opened.model, folder, tokenizer_from=opened.base, sample=sample, base=str(opened.base))
    if opened.info.label_names is not None:
        file = Path(folder) / "config.json"
        names = dict(enumerate(opened.info.label_names))
        labels = {"id2label": {str(i): name for i, name in names.items()}, "label2id": {v: k for k, v in names.items()}}
        file.write_text(json.dumps(read_hf_config(folder) | labels, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return drift


def _sample(opened: Opened, file: Path) -> Sample:
    """The first lines of a file that hold text, as tokens."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][:SAMPLED]
    length = opened.info.max_length or 128
    rows = [ids for ids in opened.tokenizer.cut(lines, length)[0] if ids]
    if not rows:
        raise ValueError(f"{file} holds no text to measure the drift on")
    ids = np.full((len(rows), max(map(len, rows))), opened.tokenizer.pad_id, np.int32)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = row, 1
    return Sample(ids, mask, f"{len(rows)} lines of {file.name}, {int(mask.sum()):,} tokens")


def open_model(model: str | Path | None, adapter: str | Path | None) -> Opened:
    """Loads a base or merged model, and an adapter on it.

    Args:
      model: a Hugging Face folder; None is the base that the adapter names.
      adapter: a PEFT folder; None is the model as it is.

    Raises:
      FileNotFoundError, CheckpointError, ValueError: a folder is not there, or not right.
    """
    if adapter is None:
        if model is None:
            raise ValueError("name a model folder, an adapter folder, or both")
        loaded = models.load(model)
        return Opened(loaded, tokenizer.load(model), _hf_info(model, loaded.task), Path(model))
    folder = Path(adapter)
    config = _adapter_config(folder)
    base = model or config.get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise FileNotFoundError(f"{folder} was trained on {base!r}, which is no folder here; name it by --model")
    info = _info(folder)
    num_labels = len(info.label_names) if info.label_names else _num_labels(folder)
    with _without_warnings():  # of a head without weights: the adapter brings it
        loaded = models.load(base, config.get("task_type"), num_labels=num_labels, quantize=info.quantize)
    adapted = import_peft(loaded, folder)
    if loaded.task == "SEQ_CLS" and info.label_names is None:
        info = dataclasses.replace(info, label_names=tuple(f"LABEL_{i}" for i in range(loaded.config.num_labels)))
    return Opened(adapted, tokenizer.load(base), info, Path(base))


def label_names(opened: Opened) -> Sequence[str]:
    """The labels of a classifier.

    Raises:
      ValueError: the model is none.
    """
    if opened.info.label_names is None:
        raise ValueError(f"this model is for {opened.model.task}, not SEQ_CLS, so it has no labels to choose from")
    return opened.info.label_names


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    log = logging.getLogger("jpeft")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    if not file.is_file():
        below = folder / "adapter" / "adapter_config.json"
        hint = f"; did you mean {below.parent}?" if below.is_file() else ""
        raise FileNotFoundError(f"no {file}; an adapter folder holds it{hint}")
    return json.loads(file.read_text(encoding="utf-8"))


def _info(folder: Path) -> Info:
    """What jpeft wrote beside the adapter; nothing is known of one that it did not write."""
    file = folder / INFO
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = values.get("label_names")
    return Info(names and tuple(names), values.get("max_length"), values.get("quantize"))


def _hf_info(folder: str | Path, task: str) -> Info:
    labels = read_hf_config(folder).get("id2label")
    if task != "SEQ_CLS":
        return Info(None, None)
    names = [labels[key] for key in sorted(labels, key=int)] if labels else ["LABEL_0", "LABEL_1"]
    return Info(tuple(names), None)


def _num_labels(folder: Path) -> int | None:
    """Size of the classification head that an adapter brings along; None where it brings none."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, "numpy") as tensors:
        heads = [key for key in tensors.keys() if key.endswith((".classifier.weight", ".score.weight"))]  # noqa: SIM118 (no mapping)
        return tensors.get_slice(heads[0]).get_shape()[0] if heads else None
