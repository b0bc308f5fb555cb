# SPDX-License-Identifier: Apache-2.0
"""`jpeft train --dry-run`: what a run would be, with its step compiled by shape; no weights are read or allocated."""

from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from .._masks import optimizer
from .._partition import partition
from .._summary import summary
from . import job, utilization
from .config import Config
from .devices import num_groups
from .objective import objective
from .optim import make_optimizer
from .step import Compiled, begin_shapes, make_step


def dry_run(config: Config) -> str:
    """The plan in lines. Raises what `train` would before training, but for what only the weights can tell."""
    dataset = job.read_data(config)
    mesh = job.make_mesh(config)
    model = job.by_shape(config, dataset.label_names)
    counts = summary(model)
    lines = [job.describe(config, dataset), str(counts)]
    if mesh is not None:
        return "\n".join([*lines, "the step is not compiled here: its memory depends on the mesh"])
    step = _compiled(config, dataset, model)
    padded = _padded_tokens(config, dataset) * dataset.num_updates / dataset.train.buckets.num_batches
    lines.append(f"compiled in {step.compile_seconds:.1f} s, for the widest rows; {_memory(step)}")
    peak = utilization.peak_flops(jax.devices()[:1])
    if peak is None:
        return "\n".join([*lines, f"{padded:,.0f} tokens with padding; no time is estimated, this device is not known"])
    seconds = utilization.flops_per_token(model, counts, config.model.task) * padded / peak
    lines.append(
        f"{padded:,.0f} tokens with padding: {_time(seconds)} at the peak rate of {jax.devices()[0].device_kind}, "
        f"{peak / 1e12:.2f} TFLOP/s of matrix products. An estimate, and a lower bound: real steps reach a part of it"
    )
    return "\n".join(lines)


def _compiled(config: Config, dataset: job.Dataset, model: Any) -> Compiled:
    """The run's own step, compiled for its widest batch."""
    graphdef, *leaves = partition(model)
    trainable, frozen, batch = (_placed(shapes) for shapes in (*leaves, _widest(dataset)))
    tx = optimizer(make_optimizer(config.optimizer, dataset.num_updates), model=graphdef)
    update = make_step(graphdef, objective(config)[0], tx, groups=num_groups(None), ema=config.train.ema)
    state = begin_shapes(tx, trainable, average=config.train.ema is not None)
    update.compiled(state, frozen, batch, job.dropout_key(config))
    return update


def _placed(shapes: Any) -> Any:
    """The same shapes, on the first device."""
    place = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def _widest(dataset: job.Dataset) -> dict[str, Any]:
    """Shapes of the widest batch; arrays `[accumulation, rows, seq]` are those that have a width."""
    width = max(dataset.train.buckets.widths)
    arrays = next(iter(dataset.train.walk(0))).arrays

    def shape(array: Any) -> jax.ShapeDtypeStruct:
        sizes = array.shape if array.ndim < 3 else (*array.shape[:2], width, *array.shape[3:])
        return jax.ShapeDtypeStruct(sizes, jax.dtypes.canonicalize_dtype(array.dtype))

    return {name: shape(array) for name, array in arrays.items()}


def _padded_tokens(config: Config, dataset: job.Dataset) -> int:
    """Of one epoch."""
    return sum(dataset.train.sizes(batch)[1] for batch in dataset.train.buckets.epoch(config.train.seed, 0))


def _memory(step: Compiled) -> str:
    cost = step.cost
    if cost is None:
        return "this backend does not tell its memory"
    total, unit = cost.arguments + cost.temporaries, 2**20
    return (
        f"memory {total / unit:,.1f} MiB: base, adapter, optimizer and batch {cost.arguments / unit:,.1f}, on the way "
        f"{cost.temporaries / unit:,.1f}"
    )


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"
