# SPDX-License-Identifier: Apache-2.0
"""The residual stream on a mesh: each device keeps its own rows of the batch, whatever the weights beside it do.

Left alone, the compiler lets the stream follow the weights: a table or a kernel split over `fsdp` spreads each vector
over those devices, which then all compute every row of the batch. The seams that the stream runs through say
otherwise here, so weights are gathered where they are used and rows stay put. The mesh is read off the arrays; off a
mesh, or where rows do not divide, nothing happens.
"""

import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

#: The axes of a mesh, slowest first: devices next to each other, which talk most, differ in `tensor`.
AXES = ("data", "fsdp", "tensor")

#: The axes that the rows of a batch are split over.
BATCH_AXES = ("data", "fsdp")


def split_rows(x: jax.Array) -> jax.Array:
    """`x` `[batch, ...]` with its rows split over `data` and `fsdp`."""
    return _laid(x, BATCH_AXES)


def split_embedded(e: jax.Array) -> jax.Array:
    """`split_rows` of vectors just read from a table, `[batch, seq, d_model]`.

    They are read as the table lies, with d_model split over `fsdp`, and then turned by one all-to-all: the direct way
    would have each device read the rows of all.
    """
    return split_rows(_laid(e, "data", None, "fsdp") if e.ndim == 3 else e)


def _laid(x: jax.Array, *spec: Any) -> jax.Array:
    mesh = jax.typeof(x).sharding.mesh
    if not {*AXES} <= {*mesh.axis_names} or any(kind != AxisType.Auto for kind in mesh.axis_types) or mesh.size == 1:
        return x
    for size, names in zip(x.shape, spec, strict=False):
        axes = names if isinstance(names, tuple) else (names,) if names else ()
        if size % math.prod(mesh.shape[name] for name in axes):
            return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))
