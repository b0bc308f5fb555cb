# SPDX-License-Identifier: Apache-2.0
"""`jpeft train --dry-run`: what a run would be, with its step compiled by shape; no weights are read or allocated."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from .. import _mesh
from .._summary import summary
from ..models._hub import model_folder
from . import job, loop, utilization
from .buckets import Batch
from .config import Config
from .devices import num_groups, whole
from .objective import objective
from .planning.compiling import Program, program
from .planning.devices import Chip, Machine
from .planning.estimate import memory
from .planning.report import exchanged, table
from .planning.request import Request
from .planning.subject import Subject, subject
from .step import Compiled, Cost, make_step


def dry_run(config: Config) -> str:
    """The plan in lines. Raises what `train` would before training, but for what only the weights can tell."""
    dataset = job.read_data(config)
    mesh = job.make_mesh(config)
    found = _subject(config, dataset, mesh)
    counts = summary(found.model)
    lines = [job.describe(config, dataset), str(counts)]
    step = _compiled(config, found, mesh)
    sizes = [dataset.train.sizes(batch)[1] for batch in dataset.train.buckets.epoch(config.train.seed, 0)]
    padded = sum(sizes) * dataset.num_updates / dataset.train.buckets.num_batches
    rows = f"{padded / dataset.train.unit.tokens:,.0f} {dataset.train.unit.name} with padding"
    lines.append(f"compiled in {step.seconds:.1f} s, for the widest rows, mesh {found.request.axes}; {_memory(step)}")
    lines += [*table(memory(found), found.request.machine.chip.memory, step), *exchanged(step)]
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    peak = utilization.peak_flops(devices)
    if peak is None:
        return "\n".join([*lines, f"{rows}; no time is estimated, this device is not known"])
    width = sum(size**2 for size in sizes) / sum(sizes) / (config.train.batch_size * config.train.accumulation)
    keys = width / 2 if config.model.task == "CAUSAL_LM" else width
    seconds = utilization.flops_per_token(found.model, config.model.task, keys) * padded / peak
    lines.append(
        f"{rows}: {_time(seconds)} at the peak rate of {len(devices)} x "
        f"{devices[0].device_kind}, {peak / 1e12:.2f} TFLOP/s of matrix products. An estimate, and a lower bound: real "
        "steps reach a part of it"
    )
    return "\n".join(lines)


def cost(config: Config, dataset: job.Dataset) -> Cost | None:
    """Of the run's own step for its widest batch, compiled and not run; None where the backend does not tell."""
    mesh = job.make_mesh(config)
    found = _subject(config, dataset, mesh)
    update, key = _update(config, found, mesh)
    update.compiled(found.state, found.frozen, found.batch, key)
    return update.cost


def _subject(config: Config, dataset: job.Dataset, mesh: Mesh | None) -> Subject:
    """The run's own model, optimizer's state and widest batch as shapes in their places."""
    names = dataset.label_names
    request = Request(
        model=str(model_folder(config.model.path)),
        method=config.method,
        machine=_machine(config),
        mesh=config.mesh or "fsdp=1",
        uneven=config.uneven,
        task=config.model.task,
        batch=config.train.batch_size,
        seq=max(dataset.train.buckets.widths),
        accumulation=config.train.accumulation,
        dtype=job.dtype_of(config),
        remat=config.model.remat,
        quantize=config.model.quantize,
        optimizer=config.optimizer,
        ema=config.train.ema is not None,
        dropout=config.train.dropout,
        labels=None if names is None else len(names),
        arrays=tuple((name, x.shape[1:], x.dtype.name) for name, x in _widest(dataset).items()),
        sums=objective(config)[0],
    )
    return subject(request, jax.devices()[:1] if mesh is None else mesh, dataset.num_updates)


def _machine(config: Config) -> Machine:
    """The devices that the run would take."""
    devices = jax.devices()[:1] if config.mesh is None else jax.devices()
    slices = 1 if config.mesh is None else math.prod(_mesh.parts(config.mesh, len(devices))[1])
    one = devices[0]
    has = (one.memory_stats() or {}).get("bytes_limit") if one.process_index == jax.process_index() else None
    return Machine(Chip(one.device_kind, one.platform, has, None, None, "this machine"), len(devices), slices=slices)


def _compiled(config: Config, found: Subject, mesh: Mesh | None) -> Program:
    """The run's own step, compiled for its widest batch."""
    update, key = _update(config, found, mesh)
    return program(update.lower(found.state, found.frozen, found.batch, key), found)


def _update(config: Config, found: Subject, mesh: Mesh | None) -> tuple[Compiled, Any]:
    """The run's own step, and the shape of its key."""
    update = make_step(
        found.graphdef,
        objective(config)[0],
        found.tx,
        groups=num_groups(mesh),
        ema=config.train.ema,
        max_skips=loop.max_skips(config),
    )
    key: Any = job.dropout_key(config)
    if key is not None:
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole(mesh))
    return update, key


def _widest(dataset: job.Dataset) -> dict[str, Any]:
    """Shapes of the widest batch."""
    arrays = dataset.train.collate(Batch(max(dataset.train.buckets.widths), []))
    dtype = jax.dtypes.canonicalize_dtype
    return {name: jax.ShapeDtypeStruct(array.shape, dtype(array.dtype)) for name, array in arrays.items()}


def _memory(step: Program) -> str:
    unit = 2**20
    return (
        f"memory {(step.arguments + step.temporary) / unit:,.1f} MiB: base, adapter, optimizer and batch "
        f"{step.arguments / unit:,.1f}, on the way {step.temporary / unit:,.1f}"
    )


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
