# SPDX-License-Identifier: Apache-2.0
"""Batches on one device or on a mesh, and processes that work together."""

import contextlib
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .._mesh import BATCH_AXES, local_rows
from .roll import Roll, name_on_abort


@contextlib.contextmanager
def together(
    spec: str | None, arrival: float = 300.0, stall: float = 1800.0, *, traced: bool = False
) -> Iterator[None]:
    """Joins the other processes of a run, which watch each other until its end; None is one process alone.

    Args:
      spec: `"coordinator:port,num_processes,process_id"`, or `"auto"` where the environment (a TPU pod, Slurm) says.
      arrival, stall, traced: of `roll.Roll`.

    Raises:
      ValueError: `spec` has another form.
      Lost: a process did not arrive.
    """
    if spec is None:
        yield
        return
    address, count, own, local = _place(spec, arrival)
    with Roll(address, count, own, arrival=arrival, stall=stall, traced=traced) as roll:
        kept = name_on_abort(roll)
        jax.distributed.initialize(address, count, own, local, initialization_timeout=max(int(arrival), 1))
        try:
            yield
        except SystemExit:  # of all processes together, as where a run is interrupted
            jax.distributed.shutdown()
            raise
        jax.distributed.shutdown()
        del kept


def _place(spec: str, arrival: float) -> tuple[str, int, int, Any]:
    """Address of process 0, number of processes, own number, own devices' numbers where they are known."""
    if spec == "auto":
        from jax._src import clusters  # what `initialize()` itself asks

        ask = clusters.ClusterEnv.auto_detect_unset_distributed_params
        address, count, own, local = ask(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, int(arrival)
        )
        if address is None or count is None or own is None:
            raise ValueError("--distributed auto: this environment (no TPU pod, no Slurm) does not say who takes part")
        return address, count, own, local
    address, *numbers = spec.split(",")
    if ":" not in address or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--distributed takes 'host:port,num_processes,process_id' or 'auto', got {spec!r}")
    return address, int(numbers[0]), int(numbers[1]), None


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def meet(what: str) -> None:
    """Waits until every process is here, which all say by the same words."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


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


def described() -> str:
    """What this process computes on: of a CPU the cores that it may use, and the processor's own name if it tells."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", told.read_text(), re.MULTILINE) if told.is_file() else None
    return f"{cores} core{'s' * (cores != 1)} of {found[1] if found else platform.processor() or platform.machine()}"
