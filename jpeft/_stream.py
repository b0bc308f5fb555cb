# SPDX-License-Identifier: Apache-2.0
"""The residual stream on a mesh: each device keeps its own rows of the batch, whatever the weights beside it do.

Left alone, the compiler lets the stream follow the weights: a table or a kernel split over `fsdp` spreads each vector
over those devices, which then all compute every row of the batch. The seams that the stream runs through say
otherwise here, so weights are gathered where they are used and rows stay put. The mesh is read off the arrays; off a
mesh, or where rows do not divide, nothing happens.

Along `sequence` each device keeps its own tokens of a row, and what works token by token works on those. Attention
alone needs more: the keys and values of all of a row's tokens are gathered, a layer at a time, and its queries stay.
The program is that of one device, so positions, masks, segments and virtual tokens are as they are there.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

#: The axes of a mesh, slowest first: devices next to each other, which talk most, differ in `tensor`.
AXES = ("data", "fsdp", "sequence", "tensor")

#: The axes that the rows of a batch are split over.
BATCH_AXES = ("data", "fsdp")

#: The axes over which an array in a program may be split unevenly: those of tokens and of heads.
_PADDED = ("sequence", "tensor")


def split_rows(x: jax.Array) -> jax.Array:
    """`x` `[batch, ...]` with its rows split over `data` and `fsdp`, and the tokens of a row over `sequence`."""
    return _laid(x, BATCH_AXES, "sequence") if x.ndim == 3 else _laid(x, BATCH_AXES)


def split_embedded(e: jax.Array) -> jax.Array:
    """`split_rows` of vectors just read from a table, `[batch, seq, d_model]`.

    They are read as the table lies, with d_model split over `fsdp`, and then turned by one all-to-all: the direct way
    would have each device read the rows of all.
    """
    return split_rows(_laid(e, "data", "sequence", "fsdp") if e.ndim == 3 else e)


def token_ways(x: jax.Array) -> int:
    """In how many parts the tokens of `x` `[batch, seq, ...]` are split over `sequence`."""
    mesh = _mesh_of(x)
    ways = 1 if mesh is None else mesh.shape["sequence"]
    return ways if x.shape[1] >= ways else 1


def split_tokens(x: jax.Array) -> jax.Array:
    """Queries, or what comes of them, `[batch, seq, heads, d_head]`: each device has its own tokens."""
    return _laid(x, BATCH_AXES, "sequence", P.UNCONSTRAINED, P.UNCONSTRAINED)


def whole_tokens(x: jax.Array) -> jax.Array:
    """Keys or values `[batch, keys, kv_heads, d_head]`: the devices along `sequence` have all tokens of their rows."""
    return _laid(x, BATCH_AXES, None, P.UNCONSTRAINED, P.UNCONSTRAINED)


def split_parts(x: jax.Array) -> jax.Array:
    """`[batch·ways, ...]`, of examples that are the parts of rows: each device has the part with its own tokens."""
    return _laid(x, (*BATCH_AXES, "sequence"), *(P.UNCONSTRAINED for _ in x.shape[1:]))


def split_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[batch, seq, heads, d_head]`, keys and values `[batch, keys, kv_heads, d_head]`, of whole heads each.

    Where `tensor` divides the key heads they lie so already. Else its cuts go through heads, and every score would be a
    sum over devices. So keys and values are gathered and repeated until `tensor` divides them, or else until there are
    as many as queries, of which the compiler pads the last devices' share.
    """
    mesh, heads, kv_heads = _mesh_of(q), q.shape[2], k.shape[2]
    if mesh is None or kv_heads % mesh.shape["tensor"] == 0:
        return q, k, v
    shares = range(1, heads // kv_heads)
    even = (n for n in shares if heads % (kv_heads * n) == 0 and kv_heads * n % mesh.shape["tensor"] == 0)
    times = next(even, heads // kv_heads)
    k, v = (jnp.repeat(_laid(x, BATCH_AXES, P.UNCONSTRAINED, None, None), times, axis=2) for x in (k, v))
    q, k, v = (_laid(x, BATCH_AXES, P.UNCONSTRAINED, "tensor", None) for x in (q, k, v))
    return q, k, v


def everywhere(x: jax.Array) -> jax.Array:
    """`x` whole on every device: what modules share, and each reads a part of.

    Left alone, the compiler splits it as the module that reads most of it would have it, and the parts that others then
    read have come out wrong (jax 0.10.2, slices of one matrix inside of a scan, over `data`, `fsdp` and `tensor`).
    """
    return _laid(x)


def split_cache(x: jax.Array) -> jax.Array:
    """Keys or values `[layers, batch, kv_heads, slots, d_head]`: rows as the stream's, heads over `tensor`.

    So a device keeps what its own rows and heads have read, in every step of a loop. Heads that `tensor` does not
    divide lie as the compiler has them.
    """
    mesh = _mesh_of(x)
    uneven = mesh is None or x.shape[2] % mesh.shape["tensor"]
    return _laid(x, None, BATCH_AXES, P.UNCONSTRAINED if uneven else "tensor")


def _laid(x: jax.Array, *spec: Any) -> jax.Array:
    """`x` with its axes split as the spec says, where rows and vectors divide.

    Tokens and heads need not: the compiler pads those, if there are as many as devices; fewer are whole.
    """
    mesh = _mesh_of(x)
    if mesh is None:
        return x
    own = [None if name in _PADDED and size < mesh.shape[name] else name for size, name in _pairs(x, spec)]
    for size, names in _pairs(x, own):
        axes = names if isinstance(names, tuple) else (names,) if isinstance(names, str) else ()
        if names not in _PADDED and size % math.prod(mesh.shape[name] for name in axes):
            return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*own)))


def _pairs(x: jax.Array, spec: Any) -> Any:
    return zip(x.shape, spec, strict=False)


def on_mesh(x: jax.Array) -> bool:
    """Whether `x` lies on several devices."""
    return _mesh_of(x) is not None


def _mesh_of(x: jax.Array) -> Any:
    """The mesh that `x` lies on, if it is one of these axes and the compiler's to use."""
    mesh = jax.typeof(x).sharding.mesh
    ours = {*AXES} <= {*mesh.axis_names} and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if ours and mesh.size > 1 else None
