# SPDX-License-Identifier: Apache-2.0
"""The update that stopped a run, once more: from the batch and the state that its folder kept.

jpeft replay runs/sst2/failure
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._masks import optimizer
from ..models import CheckpointError
from ..models._files import is_file, read_json
from . import config as configuration
from . import devices, job
from .objective import objective
from .optim import make_optimizer
from .step import Metrics, State, begin, make_step


def replay(folder: str | Path, overrides: Sequence[str] = ()) -> Metrics:
    """What the update measured, computed again on one device.

    Args:
      folder: a run's failure/, beside the run's config.yaml and run.json.
      overrides: other values, such as `model.dtype=float32`, to see what they would change.

    Raises:
      FileNotFoundError, CheckpointError, ConfigError: the folder holds no failure, or overrides change the adapter.
    """
    folder = Path(folder)
    run = folder.absolute().parent
    if not is_file(folder / "state.npz"):
        raise FileNotFoundError(f"{folder} holds no state.npz; name the failure/ of a run that stopped")
    config = configuration.load(run / "config.yaml", [*overrides, "mesh=null"])
    record = read_json(run / "run.json")
    parts = job.build(config, None if record["label_names"] is None else tuple(record["label_names"]), None)
    tx = optimizer(make_optimizer(config.optimizer, record["updates"]), model=parts.graphdef)
    state = _state(folder / "state.npz", begin(tx, parts.trainable, average=config.train.ema is not None))
    with np.load(folder / "batch.npz") as arrays:
        batch = devices.place(dict(arrays), None)
    update = make_step(parts.graphdef, objective(config)[0], tx, ema=config.train.ema)
    _, metrics = update(state._replace(failed=jnp.bool(False)), parts.frozen, batch, job.dropout_key(config))
    return metrics


def described(metrics: Metrics) -> str:
    """The figures as JSON, NaN among them."""
    loss, labels, norm, _ = jax.device_get(metrics)
    return json.dumps({"loss": float(loss), "labels": float(labels), "grad_norm": float(norm)})


def _state(file: Path, like: State) -> State:
    """The state that a file holds, in the form of `like`."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    with np.load(file) as arrays:
        return jax.tree.unflatten(structure, [_leaf(arrays, jax.tree_util.keystr(path), x, file) for path, x in leaves])


def _leaf(arrays: Any, path: str, like: jax.Array, file: Path) -> jax.Array:
    if path not in arrays or arrays[path].shape != like.shape:
        raise CheckpointError(
            f"{file} has no {path} of {like.dtype}{[*like.shape]}, which this configuration's state has"
        )
    found = arrays[path]
    return jnp.asarray(found.view(like.dtype) if found.dtype.kind == "V" else found)  # NumPy has no name for bfloat16
