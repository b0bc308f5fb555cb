# SPDX-License-Identifier: Apache-2.0
"""Models and adapters on the hub: ids told from folders, and the files that are needed fetched into its cache."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ._checkpoint import INDEX, SINGLE, TOKENIZER_FILES, shard_files
from ._files import is_file

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"


def is_id(path: str | Path) -> bool:
    """Whether a string has the form of an id, `org/name`."""
    return isinstance(path, str) and _ID.fullmatch(path) is not None


def model_folder(path: str | Path, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a model: `path`, where it is one, else that of the cache with what the hub has by this id.

    Fetched are config.json, the safetensors (of shards those that the index names), the tokenizer and
    the processor of images or sounds; never a pickle.

    Raises:
      ImportError: huggingface_hub is not installed.
      FileNotFoundError: the hub has no such id, or no such revision of it, or no safetensors; or the cache has it not,
        and the hub is not to be asked.
      PermissionError: it is gated, or private.
      ConnectionError: the hub cannot be reached, and the cache has it not.
      ValueError: a revision of a folder.
    """
    if not _is_remote(path, revision):
        return Path(path)
    names = ["config.json", "generation_config.json", INDEX, *TOKENIZER_FILES]
    folder = _fetched(str(path), revision, names, local_files_only)
    weights = shard_files(folder) if is_file(folder / INDEX) else [SINGLE]
    folder = _fetched(str(path), folder.name, weights, local_files_only)
    if not all(is_file(folder / name) for name in weights):
        raise FileNotFoundError(
            f"{path} has no {' or '.join(weights)} on the hub; of weights only safetensors are read, which "
            "transformers' save_pretrained writes"
        )
    return folder


def adapter_folder(path: str | Path, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of an adapter, in the same way.

    Raises:
      ImportError, FileNotFoundError, PermissionError, ConnectionError, ValueError: as `model_folder`.
    """
    if not _is_remote(path, revision):
        return Path(path)
    names = ["adapter_config.json", "adapter_model.safetensors", "jpeft.json"]
    return _fetched(str(path), revision, names, local_files_only)


def library() -> Any:
    """The package huggingface_hub, which is needed where an id is named and nowhere else.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError("models on the hub need the package huggingface_hub: pip install 'jpeft[hub]'") from error
    return huggingface_hub


@contextlib.contextmanager
def explained(name: str, revision: str | None, local_files_only: bool = False) -> Iterator[None]:
    """Says of what the hub refuses in the block what it was about, and what to do."""
    errors = library().errors
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(f"{name} is gated on the hub: ask for access on its page there, and {_LOG_IN}") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no folder {name} is here, and the hub has no {name} that it would show; if it is private, {_LOG_IN}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if local_files_only or library().constants.is_offline_mode():
            raise FileNotFoundError(
                f"no folder {name} is here, the cache of the hub does not hold all of it at revision "
                f"{revision or 'main'}, and the hub is not asked (local_files_only, or HF_HUB_OFFLINE)"
            ) from error
        raise ConnectionError(
            f"no folder {name} is here, the cache of the hub does not hold all of it at revision {revision or 'main'}, "
            f"and the hub cannot be reached ({_cause(error)})"
        ) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(f"the hub refuses this of {name} ({_cause(error)}): {_LOG_IN}") from error
        raise ConnectionError(f"the hub failed over {name}: {_cause(error)}") from error
    except (errors.HTTPError, RuntimeError) as error:  # an upload's threads wrap theirs
        if not isinstance(error, errors.HTTPError) and not isinstance(error.__cause__, (errors.HTTPError, OSError)):
            raise
        raise ConnectionError(f"the hub cannot be reached for {name}: {_cause(error)}") from error


def _is_remote(path: str | Path, revision: str | None) -> bool:
    local = Path(path).exists()
    if local and revision is not None:
        raise ValueError(f"revision={revision!r} is of what lies on the hub, and {path} is a folder here")
    return not local and is_id(path)


def _fetched(name: str, revision: str | None, files: Iterable[str], local_files_only: bool) -> Path:
    """The folder of the cache that holds `files` of a repository, as far as it has them."""
    with explained(name, revision, local_files_only):
        return Path(
            library().snapshot_download(
                name, revision=revision, allow_patterns=[*files], local_files_only=local_files_only
            )
        )


def _cause(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())[:500]
