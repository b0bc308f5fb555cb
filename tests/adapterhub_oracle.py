# SPDX-License-Identifier: Apache-2.0
"""What AdapterHub's `adapters` saved and computed (tests/golden/make_adapterhub.py), and the same models in jpeft."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

import jpeft

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "t5")
#: Cases of which the library lets padding change the output.
UNPADDED = ("gate", "noreft of both stacks", "unipelt", "unipelt of a flat prefix", "gated pissa", "gated prefix")
#: transformers' attributes of a checkpoint's names in a model with a head.
_BASES = {"bert": "bert.", "roberta": "roberta.", "distilbert": "distilbert.", "gpt2": "transformer.",
          "llama": "model.", "t5": ""}  # fmt: skip


@functools.cache
def golden(family: str) -> dict[str, np.ndarray]:
    """All arrays of a family's file."""
    with np.load(GOLDEN / f"adapterhub_{family}.npz") as file:
        return {name: file[name] for name in file.files}


def cases(family: str) -> list[str]:
    """The names of a file's cases."""
    return [name.removesuffix("/output") for name in golden(family) if name.endswith("/output")]


CASES = [(family, case) for family in FAMILIES for case in cases(family)]


def unpacked(family: str, case: str, folder: Path) -> Path:
    """The case's folder, as the library wrote it."""
    start = f"{case}/file/"
    for name, content in golden(family).items():
        if name.startswith(start):
            file = folder / name.removeprefix(start)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.tobytes())
    return folder


def base_folder(family: str, case: str, folder: Path) -> Path:
    """The backbone of a case, as a checkpoint of transformers."""
    arrays = golden(family)
    weights = {n.removeprefix("base/"): value for n, value in arrays.items() if n.startswith("base/")}
    own = f"{case}/base/{_BASES[family]}"
    weights |= {n.removeprefix(own): value for n, value in arrays.items() if n.startswith(own)}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(str(arrays["config"]))
    return folder


@functools.cache
def base(family: str, case: str = "") -> Any:
    """The plain model in jpeft of a case, or of a backbone; a classifier's head is not the golden one."""
    with tempfile.TemporaryDirectory() as folder:
        base_folder(family, case, Path(folder))
        if case:
            return jpeft.models.load(folder, "SEQ_CLS", num_labels=3)
        return jpeft.models.load(folder, "FEATURE_EXTRACTION")


def classifies(family: str, case: str) -> bool:
    """Whether the case is of a classifier."""
    return f"{case}/file/head_config.json" in golden(family)


def model_of(family: str, case: str) -> Any:
    """The model that a case is put on."""
    return base(family, case if classifies(family, case) else "")


def imported(family: str, case: str, folder: Path) -> Any:
    """The case's model, from the library's folder; what only its user knows is told."""
    return jpeft.import_adapters(model_of(family, case), unpacked(family, case, folder), direft=case == "direft")


def padded(case: str) -> bool:
    """Whether a case's output is one with padding."""
    return case.removeprefix("own ") not in UNPADDED


def output(model: Any, family: str, case: str) -> np.ndarray:
    """Its last hidden states, or logits, on the golden rows."""
    arrays = golden(family)
    ids, mask = arrays["ids"], arrays["mask"] if padded(case) else None
    more = {"decoder_input_ids": ids[:, ::-1]} if family == "t5" else {}
    return np.asarray(model(ids, mask, **more))


def expected(family: str, case: str) -> np.ndarray:
    """The library's."""
    return golden(family)[f"{case}/output"]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by file and name; of a prefix without the copies that every layer has."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            held = safetensors.numpy.load_file(file)
        elif file.suffix == ".bin":
            held = {key: value.numpy() for key, value in torch.load(file, weights_only=True).items()}
        else:
            continue
        place = file.relative_to(folder).with_suffix("").as_posix().replace("pytorch_", "")
        found |= {f"{place}/{key}": value for key, value in held.items() if ".prefix_tuning.pool." not in key}
    return found


def configs(folder: Path) -> dict[str, Any]:
    """All configurations of a folder, by file."""
    return {str(file.relative_to(folder)): json.loads(file.read_text()) for file in sorted(folder.rglob("*.json"))}


def with_base(family: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors with what a model with a head puts before their names, which a backbone does not."""
    found = {}
    for key, value in tensors.items():
        place, name = key.rsplit("/", 1)
        head = place.endswith("model_head")
        start = "" if head or name.startswith(_BASES[family]) else _BASES[family]
        found[f"{place}/{start}{name}"] = value
    return found
