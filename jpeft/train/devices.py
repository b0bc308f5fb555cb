# SPDX-License-Identifier: Apache-2.0
"""Batches on one device or on a mesh, and processes that work together."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .._mesh import BATCH_AXES, local_rows


def start_processes(spec: str | None) -> None:
    """Joins the other processes of a run; None is one process alone.

    Args:
      spec: `"coordinator:port,num_processes,process_id"`, or `"auto"` where the environment (a TPU pod, Slurm) says.

    Raises:
      ValueError: `spec` has another form.
    """
    if spec is None:
        return
    if spec == "auto":
        jax.distributed.initialize()
        return
    address, *numbers = spec.split(",")
    if ":" not in address or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--distributed takes 'host:port,num_processes,process_id' or 'auto', got {spec!r}")
    jax.distributed.initialize(address, int(numbers[0]), int(numbers[1]))


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def num_groups(mesh: Mesh | None) -> int:
    """Over how many devices a batch's rows are split."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def whole(mesh: Mesh | None) -> NamedSharding | None:
    """Where a value lies that every process reads."""
    return None if mesh is None else NamedSharding(mesh, P())


def own_rows(mesh: Mesh | None, num_rows: int) -> frozenset[int] | None:
    """Which rows of a batch this process has to make; None is all of them."""
    return None if mesh is None or jax.process_count() == 1 else frozenset(local_rows(mesh, num_rows).tolist())


def place(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """A batch of arrays `[accumulation, rows, ...]` on its devices, rows split over `data` and `fsdp`.

    Every process has the whole batch, or at least its own devices' rows of it (`own_rows`), which it gives.
    """
    if mesh is None:
        return jax.device_put(dict(batch))
    split = NamedSharding(mesh, P(None, BATCH_AXES))
    return {name: jax.make_array_from_callback(array.shape, split, array.__getitem__) for name, array in batch.items()}
