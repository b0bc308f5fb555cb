# SPDX-License-Identifier: Apache-2.0
"""Layer norm (https://arxiv.org/abs/1607.06450), of which the backward pass keeps the normalised input alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .._rows import sum_rows
from .._wide import widened


class LayerNorm(nnx.Module):
    """(x - mean) / √(variance + eps) · scale + bias over the last axis, in float32 or wider."""

    def __init__(self, features: int, eps: float, *, dtype: Any):
        self.scale = nnx.Param(jnp.ones(features, dtype))
        self.bias = nnx.Param(jnp.zeros(features, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        return _layer_norm(x, self.scale[...], self.bias[...], self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return _forward(x, scale, bias, eps)[0]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> tuple[jax.Array, Any]:
    centred = widened(x) - jnp.mean(widened(x), -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)
    unit = centred * inverse
    y = unit * _last_axis(scale, x.ndim) + _last_axis(bias, x.ndim)
    return y.astype(x.dtype), (unit.astype(x.dtype), inverse, scale)


def _backward(eps: float, residuals: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dx = (du - mean(du) - u mean(u du)) · inverse, with u the normalised input and du = g scale."""
    del eps
    unit, inverse, scale = residuals
    dtype, unit, g = unit.dtype, widened(unit), widened(g)
    du = g * _last_axis(scale, g.ndim)
    shift = jnp.mean(du, -1, keepdims=True) + unit * jnp.mean(unit * du, -1, keepdims=True)
    dscale, dbias = sum_rows(g * unit), sum_rows(g)
    return ((du - shift) * inverse).astype(dtype), dscale.astype(scale.dtype), dbias.astype(scale.dtype)


_layer_norm.defvjp(_forward, _backward)


def _last_axis(x: jax.Array, ndim: int) -> jax.Array:
    """A vector as the last of `ndim` axes."""
    return widened(x).reshape((1,) * (ndim - 1) + x.shape)
