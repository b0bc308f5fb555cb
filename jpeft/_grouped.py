# SPDX-License-Identifier: Apache-2.0
"""Matrices that stand side by side, of which each row of the input meets one: the experts of a mixture.

Rows come in one of two layouts, and leave in the same:

  [experts, n, d_in]   each expert has n rows of its own: a batched product
  [n, d_in]            sorted by expert, with `Scope.groups` telling how many each has: a ragged product

A CPU has no ragged product of its own: XLA computes every row with every matrix. There it is made of blocks of rows of
one expert each, whose number only the running program knows.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from ._projections import Matmul
from ._scope import current, platform


class Grouped(Matmul):
    """A kernel `[experts, d_in, d_out]`, as methods see it: its experts are the last of its leading axes.

    Only methods that say so (`Method.grouped`) act on one.
    """

    beside = 1

    def __init__(self, kernel: str = "kernel"):
        super().__init__(kernel, None)

    def contract(self, module: Any, x: jax.Array, matrix: jax.Array) -> jax.Array:
        return by_expert(x, matrix)

    def expand(self, module: Any, y: jax.Array, matrix: jax.Array) -> jax.Array:
        return by_expert(y, matrix)


def by_expert(x: Float[Array, "*rows d_in"], matrices: Float[Array, "experts d_in d_out"]) -> Float[Array, "..."]:
    """Each row times its expert's matrix, in the layout in which the rows came."""
    if x.ndim == 3:
        return jnp.einsum("eni,eio->eno", x, matrices)
    return ragged_dot(x, matrices, current().groups)


@jax.custom_vjp
def ragged_dot(
    x: Float[Array, "n d_in"], matrices: Float[Array, "experts d_in d_out"], groups: Int[Array, " experts"]
) -> Float[Array, "n d_out"]:
    """`jax.lax.ragged_dot` for groups that make up all rows, under any `jax.vmap`, which that has no rule for."""
    return _dot(x, matrices, groups)


def _forward(x: jax.Array, matrices: jax.Array, groups: jax.Array) -> tuple[jax.Array, Any]:
    return _dot(x, matrices, groups), (x, matrices, groups)


def _backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, matrices, groups = kept
    return _turned_dot(dy, matrices, groups), _outer(x, dy, groups), None


ragged_dot.defvjp(_forward, _backward)


@custom_vmap
def _dot(x: jax.Array, matrices: jax.Array, groups: jax.Array) -> jax.Array:
    return _dot_by_blocks(x, matrices, groups) if platform() == "cpu" else jax.lax.ragged_dot(x, matrices, groups)


@custom_vmap
def _turned_dot(x: jax.Array, matrices: jax.Array, groups: jax.Array) -> jax.Array:
    """`_dot` with every matrix turned."""
    if platform() == "cpu":
        return _dot_by_blocks(x, matrices, groups, turned=True)
    return jax.lax.ragged_dot(x, jnp.swapaxes(matrices, 1, 2), groups)


def _dot_of_many(
    dot: Any, size: int, batched: list[bool], x: Any, matrices: Any, groups: Any
) -> tuple[jax.Array, bool]:
    """One product for all: by their own matrices, or sorted again by those that they share."""
    x, groups = (_repeated(value, size, many) for value, many in zip((x, groups), batched[::2], strict=True))
    rows = x.reshape(-1, x.shape[-1])
    if batched[1]:
        y = dot(rows, matrices.reshape(-1, *matrices.shape[2:]), groups.reshape(-1))
    else:
        order = jnp.argsort(jax.vmap(lambda counts: _experts_of(counts, x.shape[1]))(groups).reshape(-1), stable=True)
        y = dot(rows[order], matrices, groups.sum(0))[jnp.argsort(order)]
    return y.reshape(*x.shape[:2], -1), True


_dot.def_vmap(functools.partial(_dot_of_many, _dot))
_turned_dot.def_vmap(functools.partial(_dot_of_many, _turned_dot))


@custom_vmap
def _outer(x: jax.Array, dy: jax.Array, groups: jax.Array) -> jax.Array:
    """For every group, its rows of `x`, transposed, times those of `dy`: `[groups, d_in, d_out]`."""
    if platform() == "cpu":
        return _outer_by_blocks(x, dy, groups)
    dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(x, dy, groups, dims)


@_outer.def_vmap
def _outer_of_many(size: int, batched: list[bool], *values: Any) -> tuple[jax.Array, bool]:
    x, dy, groups = (_repeated(value, size, many) for value, many in zip(values, batched, strict=True))
    y = _outer(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), groups.reshape(-1))
    return y.reshape(size, -1, *y.shape[1:]), True


def _repeated(value: jax.Array, size: int, many: bool) -> jax.Array:
    return value if many else jnp.broadcast_to(value, (size, *value.shape))


def _experts_of(groups: jax.Array, n: int) -> jax.Array:
    """The expert of each of `n` sorted rows."""
    return jnp.repeat(jnp.arange(len(groups)), groups, total_repeat_length=n)


# On a CPU ------------------------------------------------------------------------------------------------------------

#: Functions here whose loops are as long as the rows need: `train.planning.trace` counts their products by shape.
BY_BLOCKS = ("_dot", "_turned_dot", "_outer")
#: Rows of a block, at least and at most: what a matrix product needs to be worth its start, and what may be too many.
_LEAST, _MOST = 8, 128


def _size(n: int, experts: int) -> int:
    """Rows of a block: about a quarter of an expert's share of `n`, so that little of its last one is of others."""
    return min(_MOST, max(_LEAST, 2 ** math.ceil(math.log2(max(1, n / experts / 4)))))


def _dot_by_blocks(x: jax.Array, matrices: jax.Array, groups: jax.Array, turned: bool = False) -> jax.Array:
    """`_dot`, or `_turned_dot`: one expert after another, its rows by blocks.

    What a block writes into rows behind its expert's is written again by theirs.
    """
    n, size, ends = len(x), _size(len(x), len(matrices)), jnp.cumsum(groups)
    x = jnp.pad(x, ((0, size), (0, 0)))

    def of_expert(expert: Any, y: jax.Array) -> jax.Array:
        matrix = jax.lax.dynamic_index_in_dim(matrices, expert, keepdims=False)
        matrix = jax.lax.optimization_barrier(matrix.T) if turned else matrix  # or XLA turns it for every block
        first = ends[expert] - groups[expert]

        def write(number: Any, y: jax.Array) -> jax.Array:
            rows = jax.lax.dynamic_slice_in_dim(x, first + number * size, size)
            return jax.lax.dynamic_update_slice_in_dim(y, rows @ matrix, first + number * size, 0)

        return jax.lax.fori_loop(0, -(-groups[expert] // size), write, y)

    start = jnp.zeros((n + size, matrices.shape[1 if turned else 2]), jnp.result_type(x, matrices))
    return jax.lax.fori_loop(0, len(matrices), of_expert, start)[:n]


def _outer_by_blocks(x: jax.Array, dy: jax.Array, groups: jax.Array) -> jax.Array:
    """`_outer`, of whose rows those of other experts are left out."""
    size, ends = _size(len(x), len(groups)), jnp.cumsum(groups)
    x, dy = (jnp.pad(rows, ((0, size), (0, 0))) for rows in (x, dy))

    def of_expert(expert: Any, out: jax.Array) -> jax.Array:
        first = ends[expert] - groups[expert]

        def add(number: Any, total: jax.Array) -> jax.Array:
            at = first + number * size
            left, right = (jax.lax.dynamic_slice_in_dim(rows, at, size) for rows in (x, dy))
            right = jnp.where((at + jnp.arange(size) < ends[expert])[:, None], right, 0)
            return total + left.T @ right

        own = jax.lax.fori_loop(0, -(-groups[expert] // size), add, jnp.zeros(out.shape[1:], out.dtype))
        return jax.lax.dynamic_update_index_in_dim(out, own, expert, 0)

    start = jnp.zeros((len(groups), x.shape[-1], dy.shape[-1]), x.dtype)
    return jax.lax.fori_loop(0, len(groups), of_expert, start)
