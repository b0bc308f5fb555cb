# SPDX-License-Identifier: Apache-2.0
"""Matrices that stand side by side, of which each row of the input meets one: the experts of a mixture.

Rows come in one of two layouts, and leave in the same:

  [experts, n, d_in]   each expert has n rows of its own: a batched product
  [n, d_in]            sorted by expert, with `Scope.groups` telling how many each has: a ragged product
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from ._projections import Matmul
from ._scope import current


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
    return jax.lax.ragged_dot(x, matrices, groups)


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
