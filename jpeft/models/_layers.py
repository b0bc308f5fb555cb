# SPDX-License-Identifier: Apache-2.0
"""Parts that several models are made of: activations, RMS norm, gated MLP, rotary embedding, positions.

What is cheap to compute and large to keep is recomputed in the backward pass (`_recomputed`), so that a stack of
layers stores the inputs of its matrix products and little more.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_python": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


def _recomputed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, of which the backward pass keeps the inputs alone; for elementwise mathematics inside a scanned layer."""
    return jax.checkpoint(fn, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)


#: Activations by transformers' names (ACT2FN).
ACTIVATIONS = {name: _recomputed(fn) for name, fn in _ACTIVATIONS.items()}


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + eps) · scale, over the last axis, in float32."""

    def __init__(self, features: int, eps: float, *, dtype: Any):
        self.scale = nnx.Param(jnp.ones(features, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        @_recomputed
        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            y = x.astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
            return (y * _last_axis(scale, y.ndim)).astype(x.dtype)

        return norm(x, self.scale[...])


def gated(activation: str, gate: Float[Array, "*batch d_ff"], up: Float[Array, "*batch d_ff"]) -> Any:
    """activation(gate) · up, the middle of a gated MLP."""
    return _recomputed(lambda gate, up: _ACTIVATIONS[activation](gate) * up)(gate, up)


def segment_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Positions that count from 0 in each run of equal segment ids."""
    index = jnp.arange(segment_ids.shape[1])[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _last_axis(x: jax.Array, ndim: int) -> jax.Array:
    """A vector as the last of `ndim` axes."""
    return x.reshape((1,) * (ndim - 1) + x.shape)


# Rotary embedding ---------------------------------------------------------------------------------------------------

#: What each type of rotary embedding needs beside its base, and what it may have.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


def rope_tables(
    positions: Int[Array, "batch seq"],
    d_head: int,
    *,
    theta: float,
    max_position: int,
    scaling: Mapping[str, Any],
) -> tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]:
    """cos and sin of position · frequency in float32, made once for all layers.

    frequency_i = theta^(-2i / d_head), i < d_head / 2, then stretched as `scaling["rope_type"]` (one of
    `ROPE_TYPES`) says, by transformers' formulas.

    Args:
      positions: of the tokens.
      d_head: size of a head, even.
      theta: the base.
      max_position: the model's context length, from which on `dynamic` stretches.
      scaling: `rope_scaling` of config.json; empty means `default`.
    """
    kind = scaling.get("rope_type", "default")
    exponents = np.arange(0, d_head, 2) / d_head
    amplitude = 1.0
    if kind == "dynamic":
        frequencies = _dynamic(positions, exponents, theta, max_position, scaling["factor"])
    else:
        inverse = theta**-exponents
        if kind == "linear":
            inverse = inverse / scaling["factor"]
        elif kind == "llama3":
            inverse = _llama3(inverse, scaling, max_position)
        elif kind == "yarn":
            inverse, amplitude = _yarn(inverse, theta, scaling, max_position)
        frequencies = jnp.asarray(inverse, jnp.float32)[None, None]
    angles = (positions[..., None].astype(jnp.float32) * frequencies)[:, :, None]
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate(
    x: Float[Array, "batch seq heads d_head"], tables: tuple[jax.Array, jax.Array]
) -> Float[Array, "batch seq heads d_head"]:
    """Turns each pair (x_i, x_{i + d_head/2}) by its angle."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def _dynamic(
    positions: jax.Array, exponents: np.ndarray, theta: float, max_position: int, factor: float
) -> Float[Array, "batch 1 half"]:
    """Frequencies for a base that grows with the row's length, once that exceeds the context length."""
    length = jnp.maximum(positions.max(-1, keepdims=True) + 1, max_position).astype(jnp.float32)
    d_head = 2 * len(exponents)
    base = theta * (factor * length / max_position - (factor - 1)) ** (d_head / (d_head - 2))
    return base[..., None] ** -jnp.asarray(exponents, jnp.float32)[None, None]


def _llama3(inverse: np.ndarray, scaling: Mapping[str, Any], max_position: int) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling.get("original_max_position_embeddings") or max_position
    turns = original * inverse / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - share) * inverse / scaling["factor"] + share * inverse


def _yarn(inverse: np.ndarray, theta: float, scaling: Mapping[str, Any], max_position: int) -> tuple[np.ndarray, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp over dimensions from kept to stretched, and a temperature."""
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or max_position
    d_head = 2 * len(inverse)

    def dim(turns: float) -> float:
        return d_head * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim(scaling.get("beta_fast") or 32), dim(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_head - 1)
    ramp = np.clip((np.arange(len(inverse)) - low) / (high - low or 0.001), 0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp), _yarn_amplitude(factor, scaling)


def _yarn_amplitude(factor: float, scaling: Mapping[str, Any]) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)
