# SPDX-License-Identifier: Apache-2.0
"""A trained model on disk and back: adapter folders, merged folders, and what their outputs are called."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import models
from .._schemes import SCHEMES
from ..io import Drift, Sample, export_adapters, export_merged, export_peft, import_adapters, import_peft
from ..io import _peft_folder as peft
from ..io._peft_folder import INFO
from ..io.card import Card
from ..io.peft import check_export
from ..models import CheckpointError
from ..models import _safetensors as safetensors
from ..models._checkpoint import TOKENIZER_FILES, read_config
from ..models._families import LABELLED
from ..models._files import is_file, read_json, write_text
from ..models._hub import adapter_folder, is_id, model_folder
from . import own, readers, templates
from .images import Processor
from .tokenizer import Tokenizer

_LOG = logging.getLogger("jpeft")
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
      info: of its folder.
      base: the base's folder.
      name: what the base was named by: the folder, or an id on the hub.
      template: file of the chat template that the adapter was trained with; None is the tokenizer's own.
    """

    model: Any
    info: Info
    base: Path
    name: str
    template: str | None = None

    @functools.cached_property
    def reader(self) -> readers.Reader:
        """What makes texts, or images, ready for the model, of its folder; read when it is first needed.

        Raises:
          FileNotFoundError, CheckpointError: as `readers.load`.
        """
        return readers.load(self.base)

    @property
    def tokenizer(self) -> Tokenizer:
        """The reader of texts.

        Raises:
          ValueError: the model reads images.
        """
        return readers.of_texts(self.reader, self.model.task)

    @property
    def processor(self) -> Processor:
        """What makes images ready.

        Raises:
          ValueError: the model reads texts.
        """
        return readers.of_images(self.reader, self.model.task).processor


def save_adapter(
    model: Any, folder: str | Path, base: str | Path, info: Info, card: Card,
    method: own.Options | None = None, template: str | None = None,
) -> Path:  # fmt: skip
    """Writes an adapter with `info` and the tokenizer of the base, a folder or an id, beside it.

    In PEFT's format where that has a form for it; else in jpeft's own, given the `method` as its configuration
    describes it. A chat `template`, in jinja, stands beside it as well; transformers takes it for the tokenizer's.

    Raises:
      ValueError: PEFT has no form for it, and no `method` was given.
    """
    if method is None or no_form_in_peft(model) is None:
        folder = export_peft(model, folder, base=str(base), card=card)
    else:
        folder = own.write(model, method, folder, base, card)
    _copy_reader(model_folder(base), folder)
    if template is not None:
        write_text(folder / templates.FILE, template)
    write_text(folder / INFO, json.dumps(dataclasses.asdict(info), indent=2) + "\n")
    return folder


def no_form_in_peft(model: Any) -> str | None:
    """Why PEFT's format cannot hold the adapters of `model`; None where it can."""
    try:
        check_export(model)
    except ValueError as error:
        return str(error)
    return None


def save_for_adapters(opened: Opened, folder: str | Path) -> None:
    """Writes an adapter in AdapterHub's format, with the base's tokenizer beside it."""
    _copy_reader(opened.base, export_adapters(opened.model, folder))
    _copy_template(opened, folder)


def save_merged(opened: Opened, folder: str | Path, text: str | Path | None = None) -> Drift:
    """Writes the merged model as a Hugging Face folder whose config.json names the labels; returns the drift.

    Args:
      text: a file on whose first lines the drift is measured; None for random tokens.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or no text in it.
    """
    sample = None if text is None else _sample(opened, Path(text))
    drift = export_merged(opened.model, folder, sample=sample, base=str(opened.base))
    _copy_reader(opened.base, folder)
    _copy_template(opened, folder)
    if opened.info.label_names is not None:
        file = Path(folder) / "config.json"
        names = dict(enumerate(opened.info.label_names))
        labels = {"id2label": {str(i): name for i, name in names.items()}, "label2id": {v: k for k, v in names.items()}}
        write_text(file, json.dumps(read_config(folder) | labels, indent=2, sort_keys=True) + "\n")
    return drift


def _copy_reader(base: str | Path, folder: str | Path) -> None:
    """Puts the base's tokenizer, or processor, beside what was written; a base of `models.save` alone has none."""
    if any(is_file(Path(base) / name) for name in TOKENIZER_FILES):
        models.copy_tokenizer(base, folder)
    else:
        _LOG.warning("%s has no tokenizer, so %s gets none", base, folder)


def _copy_template(opened: Opened, folder: str | Path) -> None:
    source = template_source(opened)
    if source is not None:
        write_text(Path(folder) / templates.FILE, source)


def template_source(opened: Opened) -> str | None:
    """The chat template that an adapter was trained with, in jinja; None is the tokenizer's own."""
    return None if opened.template is None else Path(opened.template).read_text(encoding="utf-8")


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
      model: a Hugging Face folder, or an id on the hub; None is the base that the adapter names.
      adapter: a folder of PEFT, of jpeft's own, or of AdapterHub, which names no base, or an id; None is the model as
        it is.

    Raises:
      FileNotFoundError, CheckpointError, ValueError: a folder is not there, or not right.
    """
    if adapter is None:
        if model is None:
            raise ValueError("name a model, an adapter, or both")
        base = model_folder(model)
        loaded = models.load(base)
        return Opened(loaded, _hf_info(base, loaded.task), base, str(model))
    folder = adapter_folder(adapter)
    if _is_hubs(folder):
        return _open_hubs(model, folder)
    ours = own.is_own(folder)
    config = own.read_config(folder) if ours else peft.read_config(folder)
    name = model or config.get("base_model_name_or_path")
    if not name or not (Path(name).is_dir() or is_id(name)):
        raise FileNotFoundError(f"{folder} was trained on {name!r}, which is no folder here; name it by --model")
    base = model_folder(name, config.get("revision") if model is None and not Path(name).exists() else None)
    info = _info(folder)
    found = config["num_labels"] if ours else _num_labels(folder)
    num_labels = len(info.label_names) if info.label_names else found
    with _without_warnings():  # of a head without weights: the adapter brings it
        loaded = models.load(base, _task(config, base), num_labels=num_labels, quantize=info.quantize)
    adapted = own.read(loaded, folder) if ours else import_peft(loaded, folder)
    info = _with_labels(info, loaded)
    return Opened(adapted, info, base, str(name), templates.beside(folder))


def _task(config: Mapping[str, Any], base: Path) -> str | None:
    """What an adapter is for: PEFT writes the model's class where it has no name for the task."""
    match config:
        case {"task_type": str(task)}:
            return task
        case {"auto_mapping": {"base_model_class": str(architecture)}}:
            return models.task_of(read_config(base), architecture)
    return None


def _is_hubs(folder: Path) -> bool:
    """Whether a folder holds what AdapterHub's library saved."""
    if any(is_file(folder / name) for name in ("adapter_setup.json", "adapter_fusion_config.json")):
        return True
    return is_file(folder / "adapter_config.json") and "peft_type" not in read_json(folder / "adapter_config.json")


def _open_hubs(model: str | Path | None, folder: Path) -> Opened:
    """A base with what AdapterHub's library saved on it, and its head where that was saved along."""
    if model is None:
        raise ValueError(f"{folder} is an adapter of AdapterHub's library, which names no base; name it by --model")
    base = model_folder(model)
    head = folder / "head_config.json"
    said = read_json(head) if is_file(head) else {}
    task = models.task_of(read_config(base), said["model_class"]) if said.get("model_class") else None
    with _without_warnings():
        loaded = models.load(base, task, num_labels=said.get("num_labels") if task in LABELLED else None)
    labels = said.get("label2id")
    names = tuple(sorted(labels, key=lambda name: labels[name])) if labels and loaded.task in LABELLED else None
    info = _with_labels(Info(names, None), loaded)
    adapted = import_adapters(loaded, folder)
    return Opened(adapted, info, base, str(model), templates.beside(folder))


def _with_labels(info: Info, loaded: Any) -> Info:
    """`info` with names for a classifier's labels, where nothing names them."""
    if loaded.task not in LABELLED or info.label_names is not None:
        return info
    return dataclasses.replace(info, label_names=tuple(f"LABEL_{i}" for i in range(loaded.config.num_labels)))


def label_names(opened: Opened) -> Sequence[str]:
    """The labels of a classifier.

    Raises:
      ValueError: the model is none.
    """
    if opened.info.label_names is None:
        raise ValueError(
            f"this model is for {opened.model.task}, not {' or '.join(LABELLED)}, so it has no labels to choose from"
        )
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


def _info(folder: Path) -> Info:
    """What jpeft wrote beside the adapter; nothing is known of one that it did not write."""
    file = folder / INFO
    if not is_file(file):
        return Info(None, None)
    match values := read_json(file):
        case {"label_names": None | [str(), str(), *_], "max_length": None | int(), **rest} if (
            {*rest} <= {"quantize"}
            and all(isinstance(name, str) for name in values["label_names"] or ())
            and (values["max_length"] is None or values["max_length"] > 0)
            and values.get("quantize") in (None, *SCHEMES)
        ):
            names = values["label_names"]
            return Info(names and tuple(names), values["max_length"], values.get("quantize"))
    raise CheckpointError(
        f"{file} must hold label_names (a list of names, or null), max_length (a whole number, or null) and quantize "
        f"(one of {', '.join(SCHEMES)}, or null), and holds {values!r:.200}"
    )


def _hf_info(folder: str | Path, task: str) -> Info:
    labels = read_config(folder).get("id2label")
    if task not in LABELLED:
        return Info(None, None)
    names = [str(labels[key]) for key in sorted(labels, key=int)] if labels else ["LABEL_0", "LABEL_1"]
    return Info(tuple(names), None)


def _num_labels(folder: Path) -> int | None:
    """Size of the classification head that an adapter brings along; None where it brings none."""
    tensors = safetensors.header(peft.weights_file(folder))
    heads = [t for key, t in tensors.items() if key.endswith((".classifier.weight", ".score.weight")) and t.shape]
    return heads[0].shape[0] if heads else None
