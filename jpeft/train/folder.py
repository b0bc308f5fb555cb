# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: all that is needed to see, repeat and use it.

config.yaml     the configuration, every key written out
run.json        command, versions, device, hashes of the data and of the tokenizer or processor, counts
chat_template.jinja   what made conversations text, where there are any
images.sha256   of a model that reads images, the hash of every file, as `sha256sum --check` takes it
metrics.jsonl   one line per log interval and per evaluation
samples.jsonl   what the model wrote after every evaluation, where `train.samples` wants any
plots/          the figures as pictures
profile/        a trace, where `logging.profile` wants one
tensorboard/, wandb/   of the loggers that `logging.to` names; loggers.json: what they call the run
adapter/        in PEFT's format, or jpeft's own where PEFT has none for it; tokenizer, label names, a model card
best/           the same after the best evaluation so far, where `train.best` follows one; at the end also adapter/
checkpoints/    the newest states, from which `--resume` goes on
failure/        only where the loss was not finite: the batch, and the state before it
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..models import CheckpointError
from ..models._files import is_file, read_json, write_text
from . import config as configuration
from . import templates
from .config import Config
from .job import Dataset, Parts
from .provenance import git_states
from .readers import called
from .samples import Sample

_VERSIONS = ("jpeft", "jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "datasets", "pillow")

#: Files that grow with the run.
_LOGS = ("metrics.jsonl", "samples.jsonl")


class RunFolder:
    """Where one run writes; on a process that is not the main one, nothing.

    Args:
      path: the folder, made if need be.
      writes: whether this process writes.
      resumes: whether a run in it is gone on with.
      replaces: whether a run in it gives way, by `clear`.

    Raises:
      FileExistsError: it holds a run already, which neither goes on nor gives way; or something else that would.
    """

    def __init__(self, path: str | Path, writes: bool = True, resumes: bool = False, replaces: bool = False):
        self.path = Path(path)
        self._writes = writes
        self._start = time.time()
        if writes and replaces:
            _check_run(self.path)
        elif writes and not resumes and os.path.lexists(self.path / "metrics.jsonl"):
            raise FileExistsError(
                f"{self.path} holds a run already; --resume goes on with it, --overwrite replaces it, and out= names "
                "another"
            )

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether a run has come to its end here."""
        file = self.path / "run.json"
        return is_file(file) and "finished" in read_json(file)

    @property
    def best(self) -> Path:
        return self.path / "best"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While the folder is this process's: no other one trains in it, and a killed one holds it no longer.

        Where a file system has no such locks nothing is held.

        Raises:
          FileExistsError: another process trains in it.
        """
        if not self._writes:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FileExistsError(
                f"another process is training in {self.path}; wait for its end, stop it, or name another folder by out="
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            os.close(handle)

    def clear(self) -> None:
        """Deletes what an earlier run wrote."""
        if self._writes:
            _clear(self.path)

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
        (self.path / "metrics.jsonl").write_bytes(b"")
        (self.path / "samples.jsonl").unlink(missing_ok=True)
        if dataset.files:
            listed = "".join(f"{digest}  {file}\n" for file, digest in dataset.files.items())
            write_text(self.path / "images.sha256", listed)
        if dataset.template is not None:
            write_text(self.path / templates.FILE, dataset.template)
        record = {
            "command": sys.argv,
            "started": _now(),
            "versions": {"python": platform.python_version(), **{v: importlib.metadata.version(v) for v in _VERSIONS}},
            "git": git_states(),
            "seed": config.train.seed,
            "template": config.data.template,
            **dataset.known_by,
            "devices": [str(device) for device in jax.devices()],
            "processes": jax.process_count(),
            "data_sha256": dataset.digests,
            f"{called(dataset.reader)}_sha256": dataset.reader.digest,
            "label_names": dataset.label_names,
            "updates": dataset.num_updates,
            "widths": dataset.train.buckets.widths,
            "trainable": parts.summary.trainable,
            "changed": parts.summary.changed,
            "base": parts.summary.base,
        }
        self._write_record(record)

    def mark(self) -> dict[str, Any]:
        """Where the run stands in its own files: plain values for a checkpoint."""
        sizes = {}
        for file in (self.path / name for name in _LOGS if self._writes):
            if is_file(file):
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                    sizes[file.name] = os.fstat(stream.fileno()).st_size
        return {"sizes": sizes, "seconds": time.time() - self._start}

    def go_on(self, mark: Mapping[str, Any], update: int, stated: Sequence[str]) -> None:
        """Cuts metrics.jsonl and samples.jsonl back to a mark, and notes in run.json that the run was resumed.

        Raises:
          CheckpointError: a file has lost lines that it had when the mark was made.
        """
        self._start = time.time() - mark["seconds"]
        if not self._writes:
            return
        for file in (self.path / name for name in _LOGS):
            size, kept = file.stat().st_size if is_file(file) else 0, mark["sizes"].get(file.name, 0)
            if size < kept:
                raise CheckpointError(
                    f"{file} has {size:,} bytes and had {kept:,} at update {update}: lines are lost, and the run's "
                    "record could not be whole. Put the file back, or begin a new run with another out="
                )
            if size > kept:
                os.truncate(file, kept)
        note = {"update": update, "at": _now(), "command": sys.argv, "changed": list(stated)}
        record = read_json(self.path / "run.json")
        self._write_record(record | {"resumed": [*record.get("resumed", []), note]})

    def finish(self) -> None:
        """Notes in run.json that the run has come to its end."""
        if self._writes:
            self._write_record(read_json(self.path / "run.json") | {"finished": _now()})

    def _write_record(self, record: Mapping[str, Any]) -> None:
        write_text(self.path / "run.json", json.dumps(record, indent=2) + "\n")

    def log(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Appends a line to metrics.jsonl: `entry` with the seconds since the run began, which is given back."""
        whole = {**entry, "seconds": round(time.time() - self._start, 3)}
        if self._writes:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(whole, allow_nan=False) + "\n")
        return whole

    def log_samples(self, number: int, samples: Sequence[Sample]) -> None:
        """Appends what the model wrote after update `number` to samples.jsonl."""
        if self._writes:
            with (self.path / "samples.jsonl").open("a", encoding="utf-8") as file:
                for sample in samples:
                    file.write(json.dumps({"update": number, **sample._asdict()}, ensure_ascii=False) + "\n")

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
def replaced(folder: Path, needed: int | None = None) -> Iterator[Path]:
    """A path to write a folder's new content to; once that is whole, it takes the place of the old.

    Args:
      folder: to be replaced; it need not be there.
      needed: about the bytes of the new content, for the message where they do not fit.

    Raises:
      OSError: the new content could not be written; the old one remains.
    """
    fresh, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        yield fresh
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        needs = "" if needed is None else f"it needs about {needed:,} bytes, "
        kept = "the one before remains" if folder.exists() else "there is no older one"
        raise OSError(
            error.errno or errno.EIO,
            f"{folder} was not written: {needs}{free:,} are free ({error}); {kept}. Make room and start again with "
            "--resume, which goes on from the newest checkpoint",
        ) from error
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def remove_run(path: str | Path) -> None:
    """Deletes what a run wrote into a folder, and the folder if nothing else is in it.

    Raises:
      FileExistsError: the folder is no run's.
    """
    folder = Path(path)
    _check_run(folder)
    if folder.exists():
        _clear(folder)
        if not any(folder.iterdir()):
            folder.rmdir()


def _check_run(folder: Path) -> None:
    if folder.exists() and not (folder / "metrics.jsonl").is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something that is no run; it is not replaced")


def _clear(folder: Path) -> None:
    for name in ("adapter", "best", "checkpoints", "failure", "plots", "profile", "tensorboard", "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (*_LOGS, "config.yaml", "run.json", "loggers.json", "images.sha256", templates.FILE):
        (folder / name).unlink(missing_ok=True)
