# SPDX-License-Identifier: Apache-2.0
"""The precision of what is summed, normalised or exponentiated: float32, or float64 where numbers are that already."""

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """float32, of float64 float64: the dtype of sums over numbers of `dtype`, and of adapters on leaves of it."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """`x` in `wide` of its own dtype."""
    return x.astype(wide(x.dtype))
