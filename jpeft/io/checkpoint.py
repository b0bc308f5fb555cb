# SPDX-License-Identifier: Apache-2.0
"""Steps of a training on disk: written beside the training, whole or not at all, and known to be what was written.

checkpoints/120/state/           the leaves, as orbax writes them
checkpoints/120/plain/           plain values, as JSON
checkpoints/120/MANIFEST.json    size and SHA-256 of every file in them

orbax writes a step into a folder of another name while the training goes on, and renames it when it is complete; the
manifest is written into it just before. So a step that can be seen is complete, and what became of it afterwards (a
flipped bit, a file cut short or gone) is found by its manifest, which orbax itself has none of. What orbax writes
beside the two folders (when a step was saved) is never read.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models import CheckpointError
from ..models._files import names

MANIFEST = "MANIFEST.json"
_CHUNK = 2**20
#: What a step takes beyond its leaves: metadata of each, and the folder's own files.
_BYTES_PER_LEAF, _BYTES_PER_STEP = 1024, 64 * 1024


class Checkpoints:
    """The steps of one training; every process of it makes one, and calls the same methods in the same order.

    Args:
      folder: where the steps lie, made with the first of them.
      keep: complete steps that are kept, the newest ones.

    Example:
      >>> checkpoints = Checkpoints("runs/sst2/checkpoints", keep=2)
      >>> checkpoints.save(120, state, {"losses": [0.7]})  # comes back at once
      >>> checkpoints.wait()
      >>> state, plain = checkpoints.restore(120, like=state)
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._keep, self._main = keep, jax.process_index() == 0
        self._manager: Any = None
        self._writing: tuple[int, int] | None = None  # step, bytes

    def newest(self) -> tuple[int | None, dict[int, list[str]]]:
        """The newest step that is what was written (None without any), and the faults of those that are newer.

        What an interrupted save left is removed. Every process is given what the first one found.

        Raises:
          CheckpointError: there are steps, and each of them has a fault.
        """
        faults: dict[int, list[str]] = {}
        good = None
        if self._main:
            _sweep(self.folder)
            for step in reversed(steps(self.folder)):
                found = verify(self.folder / str(step))
                if not found:
                    good = step
                    break
                faults[step] = found
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            code = -2 if good is None and faults else -1 if good is None else good
            code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
            good = code if code >= 0 else None
            if code == -2 and not faults:
                raise CheckpointError(f"no step in {self.folder} is what was written; the first process names faults")
        if good is None and faults:
            raise CheckpointError(f"no step in {self.folder} can be restored:\n{described(faults)}")
        return good, faults

    def drop_after(self, step: int) -> None:
        """Removes the steps that are newer than `step`: damaged ones, in whose place a new one will be written."""
        if self._main:
            for newer in steps(self.folder):
                if newer > step:
                    shutil.rmtree(self.folder / str(newer))

    def save(self, step: int, state: Any, plain: Mapping[str, Any]) -> None:
        """Begins to write a step; the arrays of `state` may be donated afterwards.

        Args:
          step: not yet there.
          state: pytree of arrays.
          plain: what JSON can hold.

        Raises:
          OSError: the disk has no room for it, or the step before this one could not be written. Older steps remain.
        """
        self.wait()
        leaves = _flat(state)
        needed = _size(leaves)
        self._check_room(step, needed)
        with self._explained(step, needed):
            self._writing = step, needed
            self._orbax().save(step, args=_arguments(leaves, {"leaves": _described(state), "plain": dict(plain)}))

    def wait(self) -> None:
        """Waits until the step that is being written is complete, and removes those beyond `keep`.

        Raises:
          OSError: it could not be written.
        """
        if self._writing is None:
            return
        step, needed = self._writing
        try:
            with self._explained(step, needed):
                self._orbax().wait_until_finished()
        finally:
            self._writing = None
        if self._main:
            for old in steps(self.folder)[: -self._keep]:
                shutil.rmtree(self.folder / str(old))

    def plain(self, step: int) -> dict[str, Any]:
        """The plain values of a step."""
        return self._described(step)["plain"]

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state of a step, placed as `like` is, and its plain values.

        Raises:
          CheckpointError: the step has other leaves than `like`.
        """
        import orbax.checkpoint as ocp

        place = self.folder / str(step)
        described = self._described(step)
        wrong = _differences(described["leaves"], _described(like))
        if wrong:
            raise CheckpointError(f"step {step} in {self.folder} is of another training:\n  " + "\n  ".join(wrong[:20]))
        wanted = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in _flat(like).items()}
        with ocp.StandardCheckpointer() as reader:
            found = reader.restore(place / "state", wanted)
        leaves, structure = jax.tree.flatten(like)
        return jax.tree.unflatten(structure, [found.get(_key(i), x) for i, x in enumerate(leaves)]), described["plain"]

    def _described(self, step: int) -> dict[str, Any]:
        return json.loads((self.folder / str(step) / "plain" / "metadata").read_bytes())

    def close(self) -> None:
        """Waits, and ends orbax's threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _orbax(self) -> Any:
        """orbax's own manager, imported and made when it is first needed."""
        if self._manager is None:
            import orbax.checkpoint as ocp

            callback = ocp.AsyncOptions(post_finalization_callback=self._seal)
            options = ocp.CheckpointManagerOptions(max_to_keep=None, create=True, async_options=callback)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def _seal(self) -> None:
        """Writes the manifest into the folder that is about to become a step."""
        assert self._writing is not None
        for unfinished in self.folder.glob(f"{self._writing[0]}.*tmp*"):
            seal(unfinished)

    def _check_room(self, step: int, needed: int) -> None:
        place = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            raise OSError(errno.ENOSPC, self._no_room(step, needed, free))

    def _no_room(self, step: int, needed: int, free: int) -> str:
        kept = steps(self.folder)
        older = f"step {kept[-1]} remains" if kept else "there is no older one"
        return (
            f"checkpoint {step} was not written: it needs {needed:,} bytes in {self.folder}, where {free:,} are free; "
            f"{older}. Make room and start again with --resume"
        )

    def _explained(self, step: int, needed: int) -> Any:
        return _Explained(lambda: self._no_room(step, needed, shutil.disk_usage(self.folder.parent).free))


class _Explained:
    """Says of an error in orbax's writing what was being written, and what it needs."""

    def __init__(self, said: Any):
        self._said = said

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception):
            code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
            first = str(error).strip().partition("\n")[0][:300]
            raise OSError(code, f"{self._said()} ({type(error).__name__}: {first})") from error


def steps(folder: Path) -> list[int]:
    """The steps that a folder shows, ascending, whether good or not."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal() and p.is_dir()) if folder.is_dir() else []


def seal(step: Path) -> None:
    """Writes a step's manifest, once all else of it is on the disk."""
    files = {str(f.relative_to(step)): _measure(f) for f in sorted(step.glob("*/**/*")) if f.is_file()}
    new = step / f".{MANIFEST}.new"
    with new.open("wb") as file:
        file.write(_manifest(files))
        file.flush()
        os.fsync(file.fileno())
    new.replace(step / MANIFEST)


def verify(step: Path) -> list[str]:
    """What is wrong with a step, a line for each file; nothing if it is what was written."""
    try:
        content = (step / MANIFEST).read_bytes()
    except FileNotFoundError:
        return [f"{step.name}: an interrupted or emptied step: no {MANIFEST}"]
    try:
        files = json.loads(content)["files"]
        if _manifest(files) != content:
            raise ValueError("it does not have the digest that it states")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{step.name}/{MANIFEST} is damaged: {error}"]
    wrong = []
    for name, [size, digest] in files.items():
        file = step / name
        if not file.is_file():
            wrong.append(f"{step.name}/{name} is missing")
        elif file.stat().st_size != size:
            wrong.append(f"{step.name}/{name} has {file.stat().st_size:,} bytes, was written with {size:,}")
        elif _measure(file)[1] != digest:
            wrong.append(f"{step.name}/{name} is not what was written: its SHA-256 is another")
    return wrong


def described(faults: Mapping[int, list[str]]) -> str:
    """Faults for a message: a line for each step."""
    return "\n".join(f"  {names(lines, 4)}" for _, lines in sorted(faults.items()))


def _manifest(files: Mapping[str, Any]) -> bytes:
    """The one way to write these entries, with a digest of themselves."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": own}, indent=1, sort_keys=True) + "\n").encode()


def _measure(file: Path) -> list[Any]:
    """Size and SHA-256, of what is on the disk."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return [size, digest.hexdigest()]


def _sweep(folder: Path) -> None:
    """Removes what interrupted saves left: folders without a step's name, and steps without a manifest."""
    if folder.is_dir():
        for left in folder.iterdir():
            unfinished = ".orbax-checkpoint-tmp" in left.name
            if left.is_dir() and (unfinished or (left.name.isdecimal() and not any(left.iterdir()))):
                shutil.rmtree(left)


def _key(index: int) -> str:
    return f"{index:05d}"


def _flat(state: Any) -> dict[str, Any]:
    """Copies of the leaves by number; orbax writes no empty ones."""
    return {_key(i): x for i, x in enumerate(jax.tree.leaves(state)) if x.size}


def _described(state: Any) -> dict[str, str]:
    """Type and shape of every leaf, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{[*leaf.shape]}" for path, leaf in leaves}


def _differences(saved: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    absent = "absent"
    paths = [path for path in {**saved, **here} if saved.get(path) != here.get(path)]
    return [f"{path}: {saved.get(path, absent)} in the checkpoint, {here.get(path, absent)} here" for path in paths]


def _size(leaves: Mapping[str, Any]) -> int:
    """About the bytes that a step of these leaves takes."""
    return sum(x.nbytes + _BYTES_PER_LEAF for x in leaves.values()) + _BYTES_PER_STEP


def _arguments(leaves: Mapping[str, Any], plain: Mapping[str, Any]) -> Any:
    import orbax.checkpoint as ocp

    own = jax.tree.map(jnp.copy, leaves)  # the next update may take the places of the originals
    return ocp.args.Composite(state=ocp.args.StandardSave(own), plain=ocp.args.JsonSave(plain))
