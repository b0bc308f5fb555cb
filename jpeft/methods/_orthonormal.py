# SPDX-License-Identifier: Apache-2.0
"""Orthonormal columns of any matrix, as its Q factor."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def orthonormal(leaf: Float[Array, "*lead d_model rank"]) -> Float[Array, "*lead d_model rank"]:
    """Q of leaf = Q T, the diagonal of T positive. A leaf of zeros, which does nothing, stays one."""
    zeros = ~leaf.any((-2, -1), keepdims=True)
    some = jnp.broadcast_to(jnp.eye(*leaf.shape[-2:], dtype=leaf.dtype), leaf.shape)
    q, t = jnp.linalg.qr(jnp.where(zeros, some, leaf))
    return jnp.where(zeros, 0, q * jnp.sign(jnp.diagonal(t, axis1=-2, axis2=-1))[..., None, :])
