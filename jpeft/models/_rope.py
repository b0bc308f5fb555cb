# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding (https://arxiv.org/abs/2104.09864) and the ways to stretch it to longer contexts.

The formulas are transformers' (`modeling_rope_utils`); everything that does not depend on the input is NumPy, float64.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._given import Given
from .._wide import widened
from ._config import Pairs

#: What each type of rotary embedding needs beside its base, and what it may have.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor", "original_max_position_embeddings")),
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


def rope_scaling(scaling: Mapping[str, Any] | Pairs | None) -> Pairs | None:
    """`rope_scaling` of config.json, checked and hashable; None for the default rotary embedding."""
    given = {name: value for name, value in dict(scaling or ()).items() if value is not None}
    old_name = given.pop("type", "default")
    kind = given.pop("rope_type", old_name)
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ValueError(f"rope_scaling's rope_type must be one of {', '.join(ROPE_TYPES)}; got {kind!r}")
    needed, optional = ROPE_TYPES[kind]
    missing, unknown = {*needed} - {*given}, {*given} - {*needed, *optional}
    if missing or unknown:
        raise ValueError(
            f"rope_scaling of rope_type {kind!r} takes {', '.join(needed + optional) or 'nothing more'}; "
            f"missing: {sorted(missing)}, unknown: {sorted(unknown)}"
        )
    wrong = [f"{name}={value!r:.100}" for name, value in given.items() if not _is_factor(value)]
    if wrong:
        raise ValueError(f"rope_scaling has values that are no positive numbers: {', '.join(wrong)}")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return None if kind == "default" else Pairs(sorted((plain | {"rope_type": kind}).items()))


def _is_factor(value: Any) -> bool:
    """Whether it is a positive number, a list of such, or says yes or no."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(map(_is_factor, value))
    return isinstance(value, bool) or (isinstance(value, (int, float)) and 0 < value <= 1e30)


def rope_tables(
    positions: Int[Given, "batch seq"],
    d_head: int,
    *,
    theta: float,
    max_position: int,
    scaling: Mapping[str, Any] | Pairs | None = None,
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]:
    """cos and sin of position · frequency, made once for all layers.

    frequency_i = theta^(-2i / d_head), i < d_head / 2, then stretched as `scaling["rope_type"]` (one of
    `ROPE_TYPES`) says, by transformers' formulas.

    Args:
      positions: of the tokens.
      d_head: size of a head, even.
      theta: the base.
      max_position: the model's context length, from which on `dynamic` and (by default) `longrope` stretch.
      scaling: what `rope_scaling` gave.
      dtype: of the tables; narrower than float32, positions would be rounded.
    """
    scaling = dict(scaling or ())
    kind = scaling.get("rope_type", "default")
    exponents = np.arange(0, d_head, 2) / d_head
    amplitude = 1.0
    if kind == "dynamic":
        frequencies = _dynamic(positions.astype(dtype), exponents, theta, max_position, scaling["factor"])
    elif kind == "longrope":
        frequencies, amplitude = _longrope(positions, theta**-exponents, scaling, max_position, dtype)
    else:
        inverse = theta**-exponents
        if kind == "linear":
            inverse = inverse / scaling["factor"]
        elif kind == "llama3":
            inverse = _llama3(inverse, scaling, max_position)
        elif kind == "yarn":
            inverse, amplitude = _yarn(inverse, theta, scaling, max_position)
        frequencies = jnp.asarray(inverse, dtype)[None, None]
    angles = (positions[..., None].astype(dtype) * frequencies)[:, :, None]
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate(
    x: Float[Array, "batch seq heads d_head"], tables: tuple[jax.Array, jax.Array]
) -> Float[Array, "batch seq heads d_head"]:
    """Turns each pair (x_i, x_{i + half}) by its angle, of as many as the tables have; the rest of a head stays."""
    cos, sin = tables
    half = cos.shape[-1]
    y = widened(x)
    first, second, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1).astype(x.dtype)


def _dynamic(
    positions: Float[Given, "batch seq"], exponents: np.ndarray, theta: float, max_position: int, factor: float
) -> Float[Array, "batch 1 half"]:
    """Frequencies for a base that grows with the row's length, once that exceeds the context length."""
    length = jnp.maximum(positions.max(-1, keepdims=True) + 1, max_position)
    d_head = 2 * len(exponents)
    base = theta * (factor * length / max_position - (factor - 1)) ** (d_head / (d_head - 2))
    return base[..., None] ** -jnp.asarray(exponents, positions.dtype)[None, None]


def _longrope(
    positions: Given, inverse: np.ndarray, scaling: Mapping[str, Any], max_position: int, dtype: Any
) -> tuple[Float[Array, "batch 1 half"], float]:
    """LongRoPE (https://arxiv.org/abs/2402.13753): a factor for every frequency, another set for rows that are long."""
    original = scaling.get("original_max_position_embeddings") or max_position
    factor = scaling.get("factor") or max_position / original
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (
        jnp.asarray(inverse / np.asarray(scaling[name]), dtype)[None, None] for name in ("short_factor", "long_factor")
    )
    return jnp.where((positions.max(-1) >= original)[:, None, None], long, short), amplitude


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
