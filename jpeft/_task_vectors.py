# SPDX-License-Identifier: Apache-2.0
"""Sums of task vectors: what several fine-tunings change, trimmed, thinned out, or put to the vote, sign by sign.

A task vector is a list of arrays in float64. The formulas are those of TIES (Yadav et al. 2023,
https://arxiv.org/abs/2306.01708) and DARE (Yu et al. 2024, https://arxiv.org/abs/2311.03099).
"""

from collections.abc import Sequence

import jax
import numpy as np

Vector = list[np.ndarray]


def trim(vector: Sequence[np.ndarray], density: float) -> Vector:
    """The part `density` of all entries with the largest absolute values, the others 0 (TIES, step 1)."""
    sizes = np.concatenate([np.abs(array).ravel() for array in vector])
    kept = int(density * sizes.size)
    if not kept:
        return [np.zeros_like(array) for array in vector]
    least = np.partition(sizes, sizes.size - kept)[sizes.size - kept]
    return [np.where(np.abs(array) >= least, array, 0.0) for array in vector]


def drop(vector: Sequence[np.ndarray], density: float, keys: Sequence[jax.Array]) -> Vector:
    """Every entry kept with probability `density` and divided by it, else 0 (DARE); a key for every array."""
    masks = [np.asarray(jax.random.bernoulli(key, density, a.shape)) for key, a in zip(keys, vector, strict=True)]
    return [np.where(mask, array / density, 0.0) for mask, array in zip(masks, vector, strict=True)]


def total(vectors: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """The weighted sum."""
    return [sum(w * a for w, a in zip(weights, arrays, strict=True)) for arrays in zip(*vectors, strict=True)]  # type: ignore[misc]


def elect(vectors: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """Of every entry the mean of those weighted values that have the sign of their sum (TIES, steps 2 and 3)."""
    weighted = [
        np.stack([w * a for w, a in zip(weights, arrays, strict=True)]) for arrays in zip(*vectors, strict=True)
    ]
    return [_agreed(values) for values in weighted]


def _agreed(values: np.ndarray) -> np.ndarray:
    agree = (np.sign(values) == np.sign(values.sum(0))[None]) & (values != 0)
    return np.where(agree, values, 0.0).sum(0) / np.maximum(agree.sum(0), 1)
