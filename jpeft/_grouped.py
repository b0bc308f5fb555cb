# SPDX-License-Identifier: Apache-2.0
"""Matrices that stand side by side, of which each row of the input meets one: the experts of a mixture.

Rows come in one of two layouts, and leave in the same:

  [experts, n, d_in]   each expert has n rows of its own: a batched product
  [n, d_in]            sorted by expert, with `Scope.groups` telling how many each has: a ragged product

A CPU has no ragged product of its own: XLA computes every row with every matrix. There it is made of blocks of rows of
one expert each, one after another.
"""

import math
from typing import Any, NamedTuple

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
    return _dot(dy, jnp.swapaxes(matrices, 1, 2), groups), _outer(x, dy, groups), None


ragged_dot.defvjp(_forward, _backward)


@custom_vmap
def _dot(x: jax.Array, matrices: jax.Array, groups: jax.Array) -> jax.Array:
    return _dot_by_blocks(x, matrices, groups) if platform() == "cpu" else jax.lax.ragged_dot(x, matrices, groups)


@_dot.def_vmap
def _dot_of_many(size: int, batched: list[bool], x: Any, matrices: Any, groups: Any) -> tuple[jax.Array, bool]:
    """One product for all: by their own matrices, or sorted again by those that they share."""
    x, groups = (_repeated(value, size, many) for value, many in zip((x, groups), batched[::2], strict=True))
    rows = x.reshape(-1, x.shape[-1])
    if batched[1]:
        y = _dot(rows, matrices.reshape(-1, *matrices.shape[2:]), groups.reshape(-1))
    else:
        order = jnp.argsort(jax.vmap(lambda counts: _experts_of(counts, x.shape[1]))(groups).reshape(-1), stable=True)
        y = _dot(rows[order], matrices, groups.sum(0))[jnp.argsort(order)]
    return y.reshape(*x.shape[:2], -1), True


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

#: Rows of a block, at least and at most: what a matrix product needs to be worth its start, and what may be too many.
_LEAST, _MOST = 8, 256


class _Block(NamedTuple):
    """Some rows of one expert; behind the last expert's rows a block holds none.

    Attributes:
      expert: whose.
      at: the first of them.
      stop: behind the expert's last one, which may lie within the block.
    """

    expert: jax.Array
    at: jax.Array
    stop: jax.Array


def _block(number: Any, size: int, n: int, groups: jax.Array) -> _Block:
    """Block `number`, of `size` rows, of `n` rows in all."""
    ends, blocks = jnp.cumsum(groups), -(-groups // size)
    last = jnp.cumsum(blocks)
    expert = jnp.minimum(jnp.searchsorted(last, number, side="right"), len(groups) - 1)
    at = ends[expert] - groups[expert] + (number - last[expert] + blocks[expert]) * size
    there = number < last[-1]
    return _Block(expert, jnp.where(there, at, n), jnp.where(there, ends[expert], n))


def _sizes(n: int, experts: int) -> tuple[int, int]:
    """Rows of a block, about an expert's share of `n`; and how many blocks there are at most."""
    size = min(_MOST, max(_LEAST, 2 ** math.ceil(math.log2(max(1, n / experts)))))
    return size, -(-n // size) + experts - 1


def _dot_by_blocks(x: jax.Array, matrices: jax.Array, groups: jax.Array) -> jax.Array:
    """`_dot`. Blocks go in order, so that what one writes into rows behind its expert's is written again by theirs."""
    n, (size, count) = len(x), _sizes(len(x), len(matrices))
    x = jnp.pad(x, ((0, size), (0, 0)))

    def write(number: Any, y: jax.Array) -> jax.Array:
        expert, at, _ = _block(number, size, n, groups)
        rows = jax.lax.dynamic_slice_in_dim(x, at, size)
        matrix = jax.lax.dynamic_index_in_dim(matrices, expert, keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(y, rows @ matrix, at, 0)

    dtype = jnp.result_type(x, matrices)
    return jax.lax.fori_loop(0, count, write, jnp.zeros((n + size, matrices.shape[-1]), dtype))[:n]


def _outer_by_blocks(x: jax.Array, dy: jax.Array, groups: jax.Array) -> jax.Array:
    """`_outer`, of whose rows those of other experts are left out."""
    n, (size, count) = len(x), _sizes(len(x), len(groups))
    x, dy = (jnp.pad(rows, ((0, size), (0, 0))) for rows in (x, dy))

    def add(number: Any, total: jax.Array) -> jax.Array:
        expert, at, stop = _block(number, size, n, groups)
        left, right = (jax.lax.dynamic_slice_in_dim(rows, at, size) for rows in (x, dy))
        right = jnp.where((at + jnp.arange(size) < stop)[:, None], right, 0)
        return total.at[expert].add(left.T @ right)

    return jax.lax.fori_loop(0, count, add, jnp.zeros((len(groups), x.shape[-1], dy.shape[-1]), x.dtype))
