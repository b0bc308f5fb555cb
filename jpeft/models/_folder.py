# SPDX-License-Identifier: Apache-2.0
"""A model folder that is written beside its place and renamed into it, so that a killed save leaves the old one."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_REPLACED = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which becomes `folder` when the block ends without an error.

    What else an older model folder of that name holds (a tokenizer, a model card) moves along; its weights and its
    config.json do not. Until the last moment the old folder is untouched; it is set aside by one rename and the new
    one put in its place by a second.

    Raises:
      FileExistsError: `folder` holds something, but no config.json: it is no model folder and is not replaced.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise FileExistsError(f"{folder} exists and is no model folder (it has no config.json); it is not replaced")
    folder = folder.resolve()  # what a link to a folder stands for is replaced, and the link stays
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        yield new
        new.chmod(0o777 & ~_umask())
        if folder.is_dir():
            _swap(folder, new)
        else:
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap(folder: Path, new: Path) -> None:
    shutil.copytree(
        folder, new, copy_function=_link, ignore=_replaced_in(folder, new), dirs_exist_ok=True, symlinks=True
    )
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(old)  # an empty folder gives way
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _replaced_in(folder: Path, new: Path) -> Callable[[str, list[str]], set[str]]:
    """For `copytree`: what the new folder has itself, and the old one's weights, both at the top only."""
    patterns = shutil.ignore_patterns(*_REPLACED)

    def ignore(directory: str, entries: list[str]) -> set[str]:
        return patterns(directory, entries) | {*os.listdir(new)} if Path(directory) == folder else set()

    return ignore


def _link(source: str, target: str) -> None:
    """A second name for the same file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
