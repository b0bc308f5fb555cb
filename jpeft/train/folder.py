# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: all that is needed to see, repeat and use it.

config.yaml     the configuration, every key written out
run.json        command, versions, device, data and tokenizer hashes, counts
metrics.jsonl   one line per log interval and per evaluation
adapter/        in PEFT's format, or jpeft's own where PEFT has none for it; tokenizer, label names, a model card
best/           the same after the best evaluation so far, where `train.best` follows one; at the end also adapter/
failure/        only where the loss was not finite: the batch, and the state before it
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..models._files import write_text
from . import config as configuration
from .config import Config
from .job import Dataset, Parts

_VERSIONS = ("jpeft", "jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "datasets")


class RunFolder:
    """Where one run writes; on a process that is not the main one, nothing.

    Args:
      path: the folder, made if need be.
      writes: whether this process writes.

    Raises:
      FileExistsError: it holds a run already.
    """

    def __init__(self, path: str | Path, writes: bool = True):
        self.path = Path(path)
        self._writes = writes
        self._start = time.time()
        if writes and os.path.lexists(self.path / "metrics.jsonl"):
            raise FileExistsError(f"{self.path} holds a run already; give another out=, or --overwrite to replace it")

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def best(self) -> Path:
        return self.path / "best"

    def adopt_best(self) -> None:
        """Copies best/ to adapter/."""
        if self._writes:
            with replaced(self.adapter) as fresh:
                shutil.copytree(self.best, fresh)

    def begin(self, config: Config, dataset: Dataset, parts: Parts) -> None:
        """Writes config.yaml and run.json."""
        if not self._writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", configuration.dump(config))
        (self.path / "metrics.jsonl").touch()
        record = {
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._start)),
            "versions": {"python": platform.python_version(), **{v: importlib.metadata.version(v) for v in _VERSIONS}},
            "devices": [str(device) for device in jax.devices()],
            "processes": jax.process_count(),
            "data_sha256": dataset.digests,
            "tokenizer_sha256": dataset.tokenizer.digest,
            "label_names": dataset.label_names,
            "updates": dataset.num_updates,
            "widths": dataset.train.buckets.widths,
            "trainable": parts.summary.trainable,
            "base": parts.summary.base,
        }
        write_text(self.path / "run.json", json.dumps(record, indent=2) + "\n")

    def log(self, entry: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl, with the seconds since the run began."""
        if self._writes:
            line = json.dumps({**entry, "seconds": round(time.time() - self._start, 3)}, allow_nan=False)
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def save_failure(self, state: Any, batch: Mapping[str, np.ndarray]) -> Path:
        """Writes the batch whose loss was not finite, and the state before it, as arrays; returns the folder."""
        folder = self.path / "failure"
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)
            leaves = jax.tree_util.tree_flatten_with_path(state)[0]
            arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
            for name, content in (("batch", dict(batch)), ("state", arrays)):
                np.savez(folder / f"{name}.npz", allow_pickle=False, **content)
        return folder


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A path to write a folder's new content to; once that is whole, it takes the place of the old."""
    fresh, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    yield fresh
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def remove_run(path: str | Path) -> None:
    """Deletes what a run wrote into a folder, and the folder if nothing else is in it.

    Raises:
      FileExistsError: the folder is no run's.
    """
    folder = Path(path)
    if not folder.exists():
        return
    if not (folder / "metrics.jsonl").is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something that is no run; it is not replaced")
    for name in ("adapter", "best", "failure", "plots"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
