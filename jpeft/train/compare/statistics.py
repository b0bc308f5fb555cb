# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests over what varies: the seeds that a method was trained with, and the examples it was tested on.

Both are drawn with replacement, the seeds and the examples each by themselves, for every seed is tested on the same
examples (a crossed design; Owen 2007, "The pigeonhole bootstrap"). With one seed the interval holds what the examples
vary alone, and the report says so.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .outcomes import Outcome, swapped

#: Draws of a bootstrap and of a permutation test: p-values down to 1 in 2,001.
DRAWS = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over seeds, and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """How far a method is from the one it is compared with.

    Attributes:
      interval: of the difference, over seeds and examples.
      p: two-sided, of a permutation test over the examples: under the null hypothesis a swap of the two methods'
        answers to an example changes nothing.
    """

    interval: Interval
    p: float


def interval(outcomes: Sequence[Outcome], score: str, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of a score over seeds, with a percentile interval.

    Args:
      outcomes: of each seed, on the same examples.
      score: a key of their `scores`.
      draws, seed: of the bootstrap.
    """
    values = [_mean(outcomes, score, *draw) for draw in _draws(outcomes, draws, seed)]
    return Interval(_mean(outcomes, score), *_ends(values))


def difference(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], score: str, *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """`ours` minus `theirs`, seed by seed and example by example.

    Raises:
      ValueError: they were not tested with the same seeds on the same examples.
    """
    if len(ours) != len(theirs) or {len(o) for o in (*ours, *theirs)} != {len(ours[0])}:
        raise ValueError(
            "a paired difference needs the same seeds and examples on both sides, got "
            f"{[len(o) for o in ours]} and {[len(o) for o in theirs]} examples by seed"
        )
    apart = _mean(ours, score) - _mean(theirs, score)
    values = [_mean(ours, score, *d) - _mean(theirs, score, *d) for d in _draws(ours, draws, seed)]
    rng = np.random.default_rng((seed, 1))
    as_far = 0
    for _ in range(draws):
        swap = rng.random(len(ours[0])) < 0.5
        a, b = zip(*(swapped(x, y, swap) for x, y in zip(ours, theirs, strict=True)), strict=True)
        as_far += abs(_mean(a, score) - _mean(b, score)) >= abs(apart) - 1e-12
    return Difference(Interval(apart, *_ends(values)), (as_far + 1) / (draws + 1))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that one false finding in all is as rare as the level says (Holm 1979)."""
    order, out, worst = np.argsort(ps), [0.0] * len(ps), 0.0
    for rank, at in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[at]))
        out[at] = worst
    return out


def _draws(outcomes: Sequence[Outcome], draws: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices of seeds, weights of examples) of every bootstrap draw."""
    rng, seeds, size = np.random.default_rng((seed, 0)), len(outcomes), len(outcomes[0])
    for _ in range(draws):
        yield rng.integers(seeds, size=seeds), np.bincount(rng.integers(size, size=size), minlength=size).astype(float)


def _mean(
    outcomes: Sequence[Outcome],
    score: str,
    seeds: Sequence[int] | np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> float:
    chosen = range(len(outcomes)) if seeds is None else seeds
    found = {int(at): outcomes[at].scores(weights)[score] for at in {*map(int, chosen)}}
    return float(np.mean([found[int(at)] for at in chosen]))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
