# SPDX-License-Identifier: Apache-2.0
"""T5's relative positions: distances in buckets, exact ones up close and ever wider ones up to a largest distance."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .._given import Given


def check_buckets(num_buckets: int, max_distance: int) -> None:
    """Both directions, and a distance that is not exact, need buckets.

    Raises:
      ValueError: there are too few of them, or the largest distance is too small.
    """
    if num_buckets < 4 or num_buckets % 2 or max_distance <= num_buckets // 2:
        raise ValueError(
            "relative_attention_num_buckets must be even and at least 4, and relative_attention_max_distance more than "
            f"half of it; got {num_buckets} and {max_distance}"
        )


def relative_buckets(
    positions: Int[Given, "rows seq"],
    keys: Int[Array, "rows keys"] | None = None,
    *,
    num_buckets: int,
    max_distance: int,
    causal: bool,
) -> Int[Array, "rows seq keys"]:
    """For each query (second axis) and key (last), the bucket of key - query.

    Of `n` buckets for a direction, the first n/2 are distances 0, 1, ...; the others grow by a constant factor up to
    `max_distance`. A causal attention has one direction; else later keys have the second half of the buckets.

    Args:
      positions: of the queries.
      keys: positions of the keys; None where they are those of the queries.
      num_buckets, max_distance, causal: as above.
    """
    away = (positions if keys is None else keys)[:, None, :] - positions[:, :, None]
    size = num_buckets if causal else num_buckets // 2
    distance = jnp.maximum(-away, 0) if causal else jnp.abs(away)
    buckets = jnp.asarray(_table(size, max_distance))[jnp.minimum(distance, max_distance)]
    return buckets if causal else buckets + jnp.where(away > 0, size, 0)


def _table(num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every distance up to `max_distance`, computed on the host, where a logarithm is rounded well."""
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    wide = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)).astype(int)
    return np.where(distance < exact, distance, np.minimum(wide, num_buckets - 1)).astype(np.int32)
