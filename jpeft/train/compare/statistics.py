# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests over what varies: the seeds that a method was trained with, and the examples it was tested on.

Both are drawn with replacement, the seeds and the examples each by themselves, for every seed is tested on the same
examples (a crossed design; Owen 2007, "The pigeonhole bootstrap"). With one seed the interval holds what the examples
vary alone, and the report says so.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

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


def intervals(outcomes: Sequence[Outcome], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Interval]:
    """The mean of every score over seeds, with a percentile interval.

    Args:
      outcomes: of each seed, on the same examples.
      draws, seed: of the bootstrap.
    """
    means = _means(outcomes)
    drawn = [_means(outcomes, *draw) for draw in _draws(outcomes, draws, seed)]
    return {score: Interval(mean, *_ends([values[score] for values in drawn])) for score, mean in means.items()}


def difference(ours: Sequence[Outcome], theirs: Sequence[Outcome], *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """The main score of `ours` minus that of `theirs`, seed by seed and example by example.

    Raises:
      ValueError: they were not tested with the same seeds on the same examples.
    """
    if len(ours) != len(theirs) or {len(o) for o in (*ours, *theirs)} != {len(ours[0])}:
        raise ValueError(
            "a paired difference needs the same seeds and examples on both sides, got "
            f"{[len(o) for o in ours]} and {[len(o) for o in theirs]} examples by seed"
        )
    apart = _apart(ours, theirs, range(len(ours)))
    values = [_apart(ours, theirs, seeds.tolist(), weights) for seeds, weights in _draws(ours, draws, seed)]
    rng = np.random.default_rng((seed, 1))
    as_far = 0
    for _ in range(draws):
        swap = rng.random(len(ours[0])) < 0.5
        a, b = zip(*(swapped(x, y, swap) for x, y in zip(ours, theirs, strict=True)), strict=True)
        as_far += abs(_apart(a, b, range(len(a)))) >= abs(apart) - 1e-12
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


def _means(outcomes: Sequence[Outcome], seeds: Any = None, weights: np.ndarray | None = None) -> dict[str, float]:
    """The mean of every score over the outcomes, or over those that were drawn, each as often as it was."""
    chosen = range(len(outcomes)) if seeds is None else seeds.tolist()
    found = {at: outcomes[at].scores(weights) for at in {*chosen}}
    return {score: float(np.mean([found[at][score] for at in chosen])) for score in next(iter(found.values()))}


def _apart(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], seeds: Iterable[int], weights: np.ndarray | None = None
) -> float:
    """The mean over these seeds of how far the main scores are apart."""
    return float(np.mean([ours[at].main_score(weights) - theirs[at].main_score(weights) for at in seeds]))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
