# SPDX-License-Identifier: Apache-2.0
"""How far a figure could be off because the test set is the sample that it is: the percentile bootstrap."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95


class Estimate(NamedTuple):
    """A figure, and the ends of its interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    num_examples: int,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Estimate:
    """A statistic of all examples, with the interval that holds `level` of it over resampled examples.

    Args:
      statistic: of row numbers, which may repeat.
      num_examples: rows that there are, one or more.
      seed: of the resampling.
      resamples: how many.
      level: such as 0.95.

    Raises:
      ValueError: there is no example.
    """
    if num_examples < 1:
        raise ValueError("there is no example to compute a figure of")
    rng = np.random.default_rng(seed)
    found = [statistic(rng.integers(0, num_examples, num_examples)) for _ in range(resamples)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(statistic(np.arange(num_examples))), float(low), float(high))


def mean(values: np.ndarray | list[float], *, seed: int = 0) -> Estimate:
    """The mean of one value an example, with its interval."""
    array = np.asarray(values, float)
    return bootstrap(lambda rows: float(array[rows].mean()), len(array), seed=seed)


def means(values: Mapping[str, Sequence[float]], *, seed: int = 0) -> dict[str, Estimate]:
    """The mean of every figure of which there is one value an example, with its interval."""
    return {name: mean(np.asarray(each, float), seed=seed) for name, each in values.items()}
