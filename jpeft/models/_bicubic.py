# SPDX-License-Identifier: Apache-2.0
"""A grid of vectors in another size, by cubic convolution (Keys 1981) as torch computes it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._wide import wide, widened

#: The slope of the kernel at distance 1, torch's choice.
_A = -0.75


def resized(grid: Float[Array, "rows columns d_model"], size: tuple[int, int]) -> Float[Array, "height width d_model"]:
    """`grid` in `size` rows and columns; corners of pixels stay corners (torch's `align_corners=False`)."""
    if grid.shape[:2] == size:
        return grid
    sizes, dtype = zip(grid.shape, size, strict=False), wide(grid.dtype)
    down, across = (jnp.asarray(_weights(old, new), dtype) for old, new in sizes)
    precision = jax.lax.Precision.HIGHEST
    whole = jnp.einsum("hr,wc,rcd->hwd", down, across, widened(grid), precision=precision)
    return whole.astype(grid.dtype)


def _weights(old: int, new: int) -> np.ndarray:
    """What each of `new` places takes of `old` ones, `[new, old]`; those beyond an edge are the edge's."""
    middle = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(middle).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        near = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), near), _kernel(np.abs(middle - first - tap)))
    return weights


def _kernel(distance: np.ndarray) -> np.ndarray:
    x = distance
    near = (_A + 2) * x**3 - (_A + 3) * x**2 + 1
    far = _A * x**3 - 5 * _A * x**2 + 8 * _A * x - 4 * _A
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
