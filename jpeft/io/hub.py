# SPDX-License-Identifier: Apache-2.0
"""Adapters and models put on the hub, in one commit that holds what belongs to them and nothing else."""

import logging
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..models import _safetensors as safetensors
from ..models._checkpoint import INDEX, SINGLE, TOKENIZER_FILES, open_checkpoint
from ..models._checkpoint import read_config as read_model_config
from ..models._files import is_file, names
from ..models._hub import explained, is_id, library
from ._peft_folder import CONFIG, INFO, README, WEIGHTS, read_config, weights_file

_LOG = logging.getLogger("jpeft")

#: Weights that a repository may hold from before; a commit takes away those that it does not replace.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads an adapter or a model to the hub, in one commit: others see all of it or nothing.

    Uploaded are the configuration, the weights, the tokenizer, README.md and what jpeft keeps beside an adapter. What
    else the folder holds (the state of an optimizer, logs, caches) stays here. The files are read before, so that
    nothing damaged is uploaded. Weights that the repository held are replaced; its other files stay.

    Args:
      folder: of an adapter (`adapter_config.json`) or a model (`config.json`).
      name: `org/name`; the repository is made if need be.
      private: a new repository is one that others do not see; one that is there must be so already.
      revision: the branch, made if need be; main by default.
      message: of the commit.

    Returns:
      The commit's address.

    Raises:
      FileNotFoundError: no such folder, or files of it are missing.
      ValueError: it holds no adapter and no model, or one that is damaged; links; a name that is none; a repository
        that is public where `private` is asked for.
      ImportError: huggingface_hub is not installed.
      PermissionError, ConnectionError: the hub refuses, or cannot be reached.

    Example:
      >>> jpeft.push("runs/sst2/adapter", "my-name/sst2-lora", private=True)
    """
    if not is_id(name):
        raise ValueError(f"a repository is called org/name, with letters, digits, '-', '_' and '.'; got {name!r}")
    folder = Path(folder)
    files = belonging(folder)
    hub = library()
    api = hub.HfApi()
    with explained(name, revision):
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = api.repo_info(name, revision=revision)
        if private and not there.private:
            raise ValueError(
                f"{name} is there already, and is public; make it private on its page, or take another name"
            )
        stale = _stale(api.list_repo_files(name, revision=there.sha), files)
        commit = api.create_commit(
            name,
            [hub.CommitOperationAdd(file, str(folder / file)) for file in files]
            + [hub.CommitOperationDelete(file) for file in stale],
            commit_message=message or f"Upload {'adapter' if CONFIG in files else 'model'} with jpeft",
            revision=revision,
            parent_commit=there.sha,
        )
        missing = {*files} - {*api.list_repo_files(name, revision=commit.oid)}
    if missing:
        raise ValueError(f"the hub left {names(missing)} out of {name}; its .gitignore may name them")
    return commit.commit_url


def belonging(folder: Path) -> list[str]:
    """The names of the files of a folder that make up its adapter or its model, which must be right.

    Raises:
      FileNotFoundError, ValueError: as `push`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if is_file(folder / CONFIG):
        needed, others = _adapter(folder), (INFO,)
    elif is_file(folder / "config.json"):
        needed, others = _model(folder), ("generation_config.json",)
    else:
        below = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG}"))
        hint = f"; did you mean {' or '.join(below)}?" if below else ""
        raise ValueError(f"{folder} holds no adapter ({CONFIG}) and no model (config.json){hint}")
    found = [*needed, *(file for file in (*others, README, *TOKENIZER_FILES) if is_file(folder / file))]
    links = [file for file in found if (folder / file).is_symlink()]
    if links:
        raise ValueError(f"{folder} has links in it, which may lead to what is not yours to give: {names(links)}")
    return found


def _adapter(folder: Path) -> list[str]:
    base: Any = read_config(folder).get("base_model_name_or_path")
    if not is_id(base or "") or Path(base).exists():
        _LOG.warning("%s names the base %r, which others cannot load; export_peft takes its id as base=", CONFIG, base)
    safetensors.header(weights_file(folder))
    return [CONFIG, WEIGHTS]


def _model(folder: Path) -> list[str]:
    read_model_config(folder)
    files = {tensor.file.name for tensor in open_checkpoint(folder).values()}
    return ["config.json", *sorted(files), *([] if SINGLE in files else [INDEX])]


def _stale(there: Iterable[str], files: Iterable[str]) -> list[str]:
    weights = (file for file in there if "/" not in file and any(fnmatch(file, pattern) for pattern in _WEIGHTS))
    return sorted({*weights} - {*files})
