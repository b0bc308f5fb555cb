# SPDX-License-Identifier: Apache-2.0
"""What every row of an array shares, a matrix or a vector, with a gradient that a CPU computes fast.

The gradient of a vector that every row is added to or multiplied with (a bias, a norm's scale, an (IA)³ vector) is a
sum over rows. XLA fuses such a sum on a CPU with what makes the rows, into one loop down the columns on one core: 11 ms
for 1,024 rows of 1,536 numbers, which take 0.5 ms to make. A product with a row of ones is not fused. And the gradient
of a matrix is a product over rows, of which XLA transposes one side in memory unless they lie in one axis. What has no
gradient keeps nothing for the backward pass. For a product of few rows with the rows of a long table XLA turns the
table, which takes longer than the product: there the table is multiplied with the rows. Of more rows than a row has
numbers the product is the larger of the two, and a loss that reads it turned takes twice as long.

Elsewhere these are the plain operations.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from ._scope import platform
from ._stream import token_ways


def add_to_rows(rows: Float[Array, "*lead_and_row"], vector: Float[Array, "*row"]) -> Float[Array, "*lead_and_row"]:
    """`rows + vector`; a row has the vector's own axes."""
    return _added(rows, vector) if platform() == "cpu" else rows + _in_front(vector, rows)


def scale_rows(rows: Float[Array, "..."], vector: Float[Array, "*row"]) -> Float[Array, "..."]:
    """`rows * vector`; a row has the vector's own axes."""
    return _scaled(rows, vector) if platform() == "cpu" else rows * _in_front(vector, rows)


def product(rows: Float[Array, "*lead d_in"], kernel: Float[Array, "d_in d_out"]) -> Float[Array, "*lead d_out"]:
    """`rows @ kernel`."""
    return _product(rows, kernel) if platform() == "cpu" else rows @ kernel


def against_table(rows: Float[Array, "*lead d"], table: Float[Array, "count d"]) -> Float[Array, "*lead count"]:
    """`rows @ table.T`, such as a head's logits that is tied to the token table."""
    return _against(rows, table) if platform() == "cpu" else rows @ table.T


def sum_rows(rows: Float[Array, "*lead d"]) -> Float[Array, "d"]:
    """The sum over all axes but the last, in the rows' dtype."""
    if platform() != "cpu" or _split(rows):
        return rows.sum(tuple(range(rows.ndim - 1)))
    flat = _flat(rows)
    return (jnp.ones((1, len(flat)), rows.dtype) @ flat)[0]


@jax.custom_vjp
def _added(rows: jax.Array, vector: jax.Array) -> jax.Array:
    return rows + _in_front(vector, rows)


def _added_forward(rows: Any, vector: Any) -> tuple[jax.Array, Any]:
    like = jnp.zeros(vector.value.shape, vector.value.dtype) if vector.perturbed else None
    return rows.value + _in_front(vector.value, rows.value), like


def _added_backward(like: Any, g: Any) -> tuple[Any, Any]:
    return g, None if like is None else _summed(g, like)


@jax.custom_vjp
def _scaled(rows: jax.Array, vector: jax.Array) -> jax.Array:
    return rows * _in_front(vector, rows)


def _scaled_forward(rows: Any, vector: Any) -> tuple[jax.Array, Any]:
    return rows.value * _in_front(vector.value, rows.value), (rows.value if vector.perturbed else None, vector.value)


def _scaled_backward(residuals: Any, g: Any) -> tuple[Any, Any]:
    rows, vector = residuals
    return g * _in_front(vector, g), None if rows is None else _summed(g * rows, vector)


@jax.custom_vjp
def _product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    return rows @ kernel


def _product_forward(rows: Any, kernel: Any) -> tuple[jax.Array, Any]:
    kept = rows.value if kernel.perturbed else None, kernel.value if rows.perturbed else None
    return rows.value @ kernel.value, kept  # a plain product, which remat's policies know by its name


def _product_backward(kept: Any, g: Any) -> tuple[Any, Any]:
    rows, kernel = kept
    return None if kernel is None else g @ kernel.T, None if rows is None else _of_matrix(rows, g)


@jax.custom_vjp
def _against(rows: jax.Array, table: jax.Array) -> jax.Array:
    if _split(rows):
        return rows @ table.T
    flat, held = _flat(rows), jax.lax.optimization_barrier  # which keeps XLA from turning a product round again
    few = len(flat) <= table.shape[1]  # the product is smaller than the table
    y = held(table @ flat.T).T if few else flat @ held(table.T)
    return y.reshape(*rows.shape[:-1], len(table))


def _against_forward(rows: Any, table: Any) -> tuple[jax.Array, Any]:
    kept = rows.value if table.perturbed else None, table.value if rows.perturbed else None
    return _against(rows.value, table.value), kept


def _against_backward(kept: Any, g: Any) -> tuple[Any, Any]:
    rows, table = kept
    return None if table is None else g @ table, None if rows is None else _of_matrix(g, rows)


_added.defvjp(_added_forward, lambda like, g: _added_backward(like, _whole(g)), symbolic_zeros=True)
_scaled.defvjp(_scaled_forward, lambda kept, g: _scaled_backward(kept, _whole(g)), symbolic_zeros=True)
_product.defvjp(_product_forward, lambda kept, g: _product_backward(kept, _whole(g)), symbolic_zeros=True)
_against.defvjp(_against_forward, lambda kept, g: _against_backward(kept, _whole(g)), symbolic_zeros=True)


def _whole(g: Any) -> jax.Array:
    return g.instantiate() if isinstance(g, SymbolicZero) else g


def _in_front(vector: jax.Array, rows: jax.Array) -> jax.Array:
    """The vector as one row, `[1, ..., *row]`."""
    return vector.reshape((1,) * (rows.ndim - vector.ndim) + vector.shape)


def _summed(g: jax.Array, vector: jax.Array) -> jax.Array:
    lead = g.shape[: g.ndim - vector.ndim]
    return sum_rows(g.reshape(*lead, math.prod(vector.shape))).reshape(vector.shape).astype(vector.dtype)


def _of_matrix(left: jax.Array, right: jax.Array) -> jax.Array:
    """The sum over all rows of the outer products of two rows: a matrix's gradient."""
    if _split(right):
        axes = tuple(range(right.ndim - 1))
        return jnp.tensordot(left, right, (axes, axes))
    return _flat(left).T @ _flat(right)


def _flat(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, rows.shape[-1])


def _split(rows: jax.Array) -> bool:
    """Whether tokens are split over devices; laid end to end with other rows they would be gathered."""
    return rows.ndim > 2 and token_ways(rows) > 1
