# SPDX-License-Identifier: Apache-2.0
"""The files of a PEFT adapter: found, opened, and put in place together."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..models._files import about, is_file, read_json
from ._values import check_values

CONFIG, WEIGHTS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"
#: What jpeft keeps beside PEFT's files.
INFO = "jpeft.json"
_PICKLE = "adapter_model.bin"


def read_config(folder: Path, name: str = CONFIG, writer: str = "PEFT's save_pretrained") -> dict[str, Any]:
    """adapter_config.json, or another configuration, which `writer` writes.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it is no JSON object.
      ValueError: it has values of another type than PEFT's.
    """
    file = folder / name
    if not is_file(file):
        below = sorted(str(path.parent) for path in folder.glob(f"*/{name}"))
        hint = f"; did you mean {' or '.join(below)}?" if below else f"; {writer} writes it"
        raise FileNotFoundError(f"no {file}{hint}")
    config = read_json(file)
    with about(file):
        check_values(config)
    return config


def weights_file(folder: Path) -> Path:
    """The safetensors file; a FileNotFoundError where there is none, or only a pickle."""
    file = folder / WEIGHTS
    if is_file(file):
        return file
    if (folder / _PICKLE).is_file():
        raise FileNotFoundError(
            f"{folder} has only {_PICKLE}, a pickle, which can run code when opened and is not read; load it with PEFT "
            "and save it again, which writes safetensors"
        )
    raise FileNotFoundError(f"no {file}, which PEFT's save_pretrained writes beside {CONFIG}")


@contextlib.contextmanager
def installing(folder: Path, config: str = CONFIG, stale: Sequence[str] = (_PICKLE,)) -> Iterator[Path]:
    """Gives an empty folder to write an adapter into, whose files come to lie in `folder` when the block ends well.

    A new folder appears by one rename. In an existing one the old configuration goes first and the new one comes last,
    so that at no time an adapter can be loaded that is half old; what else lies there stays.

    Args:
      config: the file without which there is no adapter.
      stale: what an adapter that is replaced may have had beside the files of the new one.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.parent / f".{folder.name}.new-{uuid.uuid4().hex}"
    new.mkdir()
    try:
        yield new
        if folder.is_dir() and any(folder.iterdir()):
            _move(new, folder, config, stale)
        else:
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _move(new: Path, folder: Path, config: str, stale: Sequence[str]) -> None:
    ours = (folder / config).exists()
    (folder / config).unlink(missing_ok=True)
    for name in stale if ours else ():
        (folder / name).unlink(missing_ok=True)
    if not ours and (folder / README).exists():  # one that came with something else is not ours to replace
        (new / README).unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == config):
        os.replace(file, folder / file.name)
