# SPDX-License-Identifier: Apache-2.0
"""Adapters that no other library has a form for, as a folder of jpeft's own: hybrids, trained copies of weights, all.

jpeft_adapter.json           how the method was described in the configuration, the base, its task
jpeft_adapter.safetensors    every leaf that the base does not have, by its path: what is trained, and constants

A folder is read by putting the described method on the base and replacing every leaf; a leaf more or less, or one of
another shape or type, is an error that names it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.flax

from .._adapt import adapt, strip
from .._partition import Leaves, combine, partition
from .._summary import summary
from ..io._peft_folder import README, installing
from ..io.card import Card, render_own
from ..models import CheckpointError
from ..models._families import LABELLED
from ..models._files import about, is_file, names, read_json
from ..models._safetensors import header
from . import config as configuration

CONFIG = "jpeft_adapter.json"
WEIGHTS = "jpeft_adapter.safetensors"
#: Of the layout described above.
_VERSION = 1

Options = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def write(model: Any, method: Options, folder: str | Path, base: str | Path, card: Card | None = None) -> Path:
    """Writes the adapters of `model`, which `method` describes as the configuration does.

    Raises:
      ValueError: values that are not finite.
    """
    leaves = _own(model)
    broken = [path for path, leaf in leaves.items() if not _finite(leaf)]
    if broken:
        raise ValueError(f"{names(broken)}: values that are not finite; such an adapter is not written")
    described = {
        "version": _VERSION,
        "method": method if isinstance(method, Mapping) else list(method),
        "base_model_name_or_path": str(base),
        "task_type": model.task,
        "num_labels": getattr(model.config, "num_labels", None) if model.task in LABELLED else None,
    }
    with installing(Path(folder), CONFIG, (WEIGHTS,)) as new:
        safetensors.flax.save_file(leaves, new / WEIGHTS, {"format": "jpeft"})
        (new / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        text = render_own(card or Card(), summary(model), model.task, str(base))
        (new / README).write_text(text, encoding="utf-8")
    return Path(folder)


def is_own(folder: Path) -> bool:
    """Whether a folder is of this format."""
    return is_file(folder / CONFIG)


def read_config(folder: Path) -> dict[str, Any]:
    """What jpeft_adapter.json says.

    Raises:
      CheckpointError: it is damaged, or of a later version.
    """
    match found := read_json(folder / CONFIG):
        case {
            "version": int(version), "method": dict() | [dict(), *_], "base_model_name_or_path": str(),
            "task_type": str(), "num_labels": int() | None,
        } if version == _VERSION:  # fmt: skip
            return found
        case {"version": int(version)} if version != _VERSION:
            raise CheckpointError(f"{folder / CONFIG} is of version {version}; this jpeft reads version {_VERSION}")
    raise CheckpointError(
        f"{folder / CONFIG} must hold version, method, base_model_name_or_path, task_type and num_labels; it holds "
        f"{names(found)}"
    )


def read(model: Any, folder: Path) -> Any:
    """`model` with the adapters of a folder on it; `model` is untouched.

    Raises:
      CheckpointError: a damaged file, or leaves that are not those of the described method on this model.
    """
    file = folder / WEIGHTS
    with about(folder / CONFIG):
        adapted = adapt(model, configuration.method(read_config(folder)["method"]), key=jax.random.key(0))
    if not is_file(file):
        raise FileNotFoundError(f"no file {file}, which belongs to {folder / CONFIG}")
    header(file)  # which says what is wrong with a damaged file
    leaves, wanted = safetensors.flax.load_file(file), _own(adapted)
    wrong = [f"{path} is in the file, and the method has no such leaf" for path in leaves if path not in wanted]
    for path, leaf in wanted.items():
        if path not in leaves:
            wrong.append(f"{path} is not in the file")
        elif leaves[path].shape != leaf.shape or leaves[path].dtype != leaf.dtype:
            wrong.append(
                f"{path} is {leaves[path].dtype}{[*leaves[path].shape]} in the file, here {leaf.dtype}{[*leaf.shape]}"
            )
        elif not _finite(leaves[path]):
            wrong.append(f"{path} has values that are not finite")
    if wrong:
        raise CheckpointError(f"{file} does not fit the model\n  " + "\n  ".join(sorted(wrong)[:20]))
    graphdef, trainable, frozen = partition(adapted)
    return combine(graphdef, *({p: leaves.get(p, x) for p, x in part.items()} for part in (trainable, frozen)))


def _own(model: Any) -> Leaves:
    """The leaves that the base does not have."""
    _, trainable, frozen = partition(model)
    base = partition(strip(model))[2]
    return trainable | {path: leaf for path, leaf in frozen.items() if path not in base}


def _finite(leaf: jax.Array) -> bool:
    return not jnp.issubdtype(leaf.dtype, jnp.floating) or bool(jnp.isfinite(leaf).all())
