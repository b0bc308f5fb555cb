# SPDX-License-Identifier: Apache-2.0
"""A mesh of devices, batches on it, and values back from it, on one process or many.

`data` splits the batch, `fsdp` the batch and the weights, `sequence` the tokens of a row, `tensor` the weights alone.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from ._stream import AXES, BATCH_AXES

#: In front of an axis: its part over slices, or over hosts that a slower network joins.
_DCN = "dcn."


def mesh(axes: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `sequence` and `tensor`, over all devices of all processes.

    An axis may have two parts: `dcn.data` runs over the slices of a pod, or the hosts of a cluster, which a slower
    network joins, and `data` within each. `"dcn.data=2,fsdp=4"` is `data=2,fsdp=4` with every `fsdp` inside a slice.

    Args:
      axes: `"data=2,fsdp=2,tensor=2"` or a mapping. An axis left out has size 1; one size may be -1, for what the
        others leave.
      devices: other devices than `jax.devices()`, which may be a described topology's.

    Raises:
      ValueError: an unknown axis, a size that is no number, a product that is not the number of devices, or one of
        `dcn` sizes that is not the number of slices.

    Example:
      >>> mesh = jpeft.mesh("fsdp=-1,tensor=2")
    """
    devices = jax.devices() if devices is None else list(devices)
    inner, outer = parts(axes, len(devices))
    if math.prod(outer) == 1:
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    else:
        grid = _hybrid(inner, outer, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _hybrid(inner: tuple[int, ...], outer: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices with the axes `inner` in each slice (or process, where there are no slices) and `outer` over them."""
    processes = getattr(devices[0], "slice_index", None) is None
    key = "process_index" if processes else "slice_index"
    counts = Counter(getattr(device, key) for device in devices)
    if len(counts) != math.prod(outer) or {*counts.values()} != {math.prod(inner)}:
        what = "processes" if processes else "slices"
        raise ValueError(
            f"the dcn axes of a mesh make up {math.prod(outer)} {what} of {math.prod(inner)} devices; there are "
            f"{len(counts)}, of {', '.join(map(str, sorted({*counts.values()})))}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=processes, allow_split_physical_axes=True
    )


def parts(axes: str | Mapping[str, int], num_devices: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of `AXES` within a slice, and over slices, of `mesh(axes, devices)`; its errors but for the slices'."""
    found = _filled(_given(axes), num_devices)
    return tuple(found[name] for name in AXES), tuple(found[_DCN + name] for name in AXES)


def sizes(axes: str | Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The size of every axis of `mesh(axes, devices)`, both of its parts together; its errors but for the slices'."""
    return {name: n * over for name, n, over in zip(AXES, *parts(axes, num_devices), strict=True)}


def written(sizes: Mapping[str, int]) -> str:
    """`"data=2,fsdp=2,tensor=2"`; `sequence` and parts over slices only where they split something."""
    shown = {name: n for name, n in sizes.items() if n != 1 or not (name == "sequence" or name.startswith(_DCN))}
    return ",".join(f"{name}={size}" for name, size in shown.items())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`; the devices along `tensor` share theirs."""
    return NamedSharding(mesh, P(BATCH_AXES))


def local_rows(mesh: Mesh, num_rows: int) -> Int[np.ndarray, " rows"]:
    """Which rows of a batch of `num_rows` this process feeds, ascending, for its data loader; all on one process.

    They need not be neighbours: the mesh follows the machine's wiring. Processes whose devices differ along `tensor`
    alone feed the same rows.

    Raises:
      ValueError: the rows do not divide by the devices along `data` and `fsdp`.
    """
    ways = _ways(mesh)
    if num_rows % ways:
        raise ValueError(
            f"a batch of {num_rows} rows does not divide by the {ways} devices along data and fsdp of a mesh of "
            f"{written(mesh.shape)}; pad it to a multiple, with rows whose labels are all ignored"
        )
    mine = np.zeros(num_rows, bool)
    for index in batch_sharding(mesh).addressable_devices_indices_map((num_rows,)).values():
        mine[index] = True
    return np.flatnonzero(mine)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh, its rows split over `data` and `fsdp`.

    On one process `batch` is the whole batch. On several it is this process's own part, `local_rows` of the whole,
    and the result stands for all of them: `{"input_ids": [rows of all processes, seq]}`.

    Args:
      batch: pytree of host arrays, rows first.
      mesh: as of `jpeft.mesh`.

    Raises:
      ValueError: as `local_rows`.

    Example:
      >>> batch = {name: rows[jpeft.local_rows(mesh, 64)] for name, rows in batch.items()}
      >>> loss = step(trainable, frozen, jpeft.shard_batch(batch, mesh))
    """
    sharding, ways = batch_sharding(mesh), _ways(mesh)
    shares = len(local_rows(mesh, ways))  # of the `ways`, how many are this process's

    def place(leaf: Any) -> jax.Array:
        part = np.asarray(leaf)
        num_rows = len(part) * ways // shares
        rows = local_rows(mesh, num_rows)

        def of_device(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(num_rows)
            return part[np.searchsorted(rows, first) :][: last - first]

        return jax.make_array_from_callback((num_rows, *part.shape[1:]), sharding, of_device)

    return jax.tree.map(place, batch)


def gather(leaves: Any) -> Any:
    """The pytree with every array whole in this process's own memory; every process must call it.

    For what one process then writes: `if jax.process_index() == 0: jpeft.export_peft(...)`.
    """
    memory = _memory()
    return jax.tree.map(lambda leaf: _whole(leaf, memory), leaves)


def _whole(leaf: Any, memory: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    elif isinstance(leaf, jax.Array) and memory in leaf.devices():
        leaf = jnp.copy(leaf)  # or device_put may share a buffer, which goes when `leaf` is donated
    return jax.device_put(leaf, memory)


def _memory() -> Any:
    """The device that is this process's memory; its first one where JAX_PLATFORMS leaves the CPU out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _ways(mesh: Mesh) -> int:
    """In how many parts a batch's rows are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _given(axes: str | Mapping[str, int]) -> dict[str, int]:
    """Size of every axis and of its part over slices, as given."""
    if isinstance(axes, str):
        parts = [part.partition("=") for part in axes.replace(" ", "").split(",") if part]
        pairs = [(name, size) for name, _, size in parts]
    else:
        pairs = [(name, str(size)) for name, size in axes.items()]
    for name, size in pairs:
        if name.removeprefix(_DCN) not in AXES:
            raise ValueError(f"unknown mesh axis {name!r}; the axes are {', '.join(AXES)}, as in 'data=2,fsdp=4'")
        if size != "-1" and not (size.isdecimal() and int(size)):
            raise ValueError(f"mesh axis {name} needs a size of at least 1, or -1 for the rest; got {size!r}")
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an axis stands twice in the mesh {axes!r}")
    return {name: int(found.get(name, 1)) for name in (*(_DCN + axis for axis in AXES), *AXES)}


def _filled(sizes: dict[str, int], num_devices: int) -> dict[str, int]:
    """The sizes with -1 worked out; they then make up all devices."""
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"one axis of a mesh may be -1; {written(sizes)} has {len(rest)}")
    if rest and num_devices % known:
        raise ValueError(
            f"{num_devices} devices do not divide by {known}, so {rest[0]} of {written(sizes)} has no size"
        )
    if not rest and known != num_devices:
        raise ValueError(f"a mesh of {written(sizes)} takes {known} devices; there are {num_devices}")
    return {name: num_devices // known if size == -1 else size for name, size in sizes.items()}
