# SPDX-License-Identifier: Apache-2.0
"""Tokenised rows on disk, under a name that stands for all that made them: data, tokenizer, template, options, code.

A file is written beside its place and moved there whole, so two processes that make the same one both succeed, and it
holds a hash of its arrays: one that was changed or cut is made anew, and that is said.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .encoding import Encoder
from .examples import Examples
from .formats import Reader
from .sections import Data
from .sources import Opened

#: The files whose code makes tokens of rows.
_CODE = (
    *("encoding", "examples", "formats", "items", "marked", "masking", "placing", "records", "store", "templates"),
    *("tokenizer", "sources"),
)
#: Options that change what is made.
_OPTIONS = ("loss_on", "max_length", "max_target", "stride", "longer", "txt", "on_bad_row", "max_bad_rows")
_COUNTS = ("rows", "truncated", "lost", "dropped", "skipped", "unended", "per_example", "labels_of")


def key_of(opened: Opened, reader: Reader, data: Data, encoder: Encoder, names: Sequence[str] | None) -> str:
    """SHA-256 of all that the examples of a source follow from."""
    said = {
        "data": opened.digest,
        "split": opened.source.split,
        "form": reader.form.name,
        "columns": sorted(reader.columns.items()),
        "names": None if names is None else list(names),
        "options": {name: getattr(data, name) for name in _OPTIONS},
        "code": code_digest(),
        **encoder.identity(reader),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=list).encode()).hexdigest()


def kept(folder: str | None, key: str, make: Callable[[], Examples]) -> Examples:
    """The examples that are kept under a key; made, and kept, where there are none.

    Args:
      folder: None keeps nothing.
      key: of `key_of`.
      make: what makes them.
    """
    if folder is None:
        return make()
    file = Path(folder) / f"{key}.safetensors"
    examples = _read(file) if file.is_file() else None
    if examples is None:
        examples = make()
        if len(examples):
            _write(file, examples)
    return examples


@functools.cache
def code_digest() -> str:
    """SHA-256 of the code that makes tokens of rows, and of what it stands on."""
    here = Path(__file__).parent
    digest = hashlib.sha256(" ".join(version(name) for name in ("tokenizers", "jinja2")).encode())
    for name in _CODE:
        place = here / name
        for file in sorted(place.glob("*.py")) if place.is_dir() else [here / f"{name}.py"]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _arrays(examples: Examples) -> dict[str, np.ndarray]:
    """Rows one behind the other, and their lengths."""
    arrays = {
        "lengths": np.array([len(tokens) for tokens in examples.tokens], np.int64),
        "tokens": np.concatenate(examples.tokens),
        "labels": np.concatenate([np.atleast_1d(labels) for labels in examples.labels]),
        "label_lengths": np.array([labels.size for labels in examples.labels], np.int64),
    }
    return arrays if examples.types is None else arrays | {"types": np.concatenate(examples.types)}


def _digest(arrays: dict[str, Any], counts: str) -> str:
    digest = hashlib.sha256(counts.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _write(file: Path, examples: Examples) -> None:
    from safetensors.numpy import save_file

    arrays = _arrays(examples)
    counts = json.dumps({name: getattr(examples, name) for name in _COUNTS}, sort_keys=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".part", prefix=f"{file.stem[:16]}.", dir=file.parent)
    os.close(handle)
    try:
        save_file(arrays, name, {"counts": counts, "sha256": _digest(arrays, counts)})
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(file: Path) -> Examples | None:
    """The examples of a file, or None where they are not what was written."""
    from safetensors import SafetensorError, safe_open

    from .progress import say

    try:
        with safe_open(file, "np") as stored:
            said = stored.metadata() or {}
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        sound = said.get("sha256") == _digest(arrays, said.get("counts", ""))
    except (SafetensorError, OSError, ValueError) as error:
        sound, said, arrays = False, {}, {"error": str(error)}
    if not sound:
        say(f"the kept rows in {file} are damaged; they are made anew")
        return None
    cuts = np.cumsum(arrays["lengths"])[:-1]
    counts = json.loads(said["counts"])
    labels = np.split(arrays["labels"], np.cumsum(arrays["label_lengths"])[:-1])
    if counts["labels_of"] == "row":
        labels = [label.reshape(()) for label in labels]
    types = np.split(arrays["types"], cuts) if "types" in arrays else None
    return Examples(np.split(arrays["tokens"], cuts), labels, digests={}, types=types, **counts)
