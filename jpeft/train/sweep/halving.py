# SPDX-License-Identifier: Apache-2.0
"""When points are compared on the way, and which of them go on. This file imports no JAX.

Successive halving (Jamieson and Talwalkar 2016): after a share of the updates the best of every `eta` points go on from
where they are. Hyperband (Li et al. 2018) does so in brackets, of which the later ones begin to compare later.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

from ..config import ConfigError
from .space import Halving


def stops(halving: Halving | None, updates: int) -> list[int]:
    """After which updates a training of so many is stopped to be compared, the last one among them.

    Raises:
      ConfigError: two comparisons would fall on one update, or one before the first.
    """
    shares = () if halving is None else halving.shares
    found = [*(round(share * updates) for share in shares), updates]
    if found[0] < 1 or any(a >= b for a, b in itertools.pairwise(found)):
        raise ConfigError(
            f"the budget is too small: a training of {updates} updates would be compared after {found[:-1]}; give it "
            "more updates, or halving fewer rungs"
        )
    return found


def brackets(halving: Halving | None, points: Sequence[int]) -> list[list[int]]:
    """The points dealt into brackets, in turn.

    Raises:
      ConfigError: a bracket that is halved has fewer points than it needs to keep one.
    """
    if halving is None:
        return [[*points]]
    dealt = [[*points[i :: halving.brackets]] for i in range(halving.brackets)]
    for i, bracket in enumerate(dealt):
        needed = halving.eta if i < halving.rungs else 1
        if len(bracket) < needed:
            raise ConfigError(
                f"the budget is too small: halving keeps 1 of {halving.eta} points, and bracket {i} has "
                f"{len(bracket)} of {len(points)}; try more points, or fewer brackets"
            )
    return dealt


def survivors(
    halving: Halving, rung: int, dealt: Sequence[Sequence[int]], scores: Mapping[int, float | None]
) -> list[int]:
    """The points that go on after a comparison: of each bracket that makes it, the best one in `eta`, rounded up.

    Args:
      halving: how many are kept.
      rung: which comparison, from 0.
      dealt: the points of all brackets at the beginning.
      scores: of the points that are still trained, more being better; None of one that diverged, which ends here. Of
        equal ones the earlier goes on.
    """
    kept = []
    for i, bracket in enumerate(dealt):
        alive = [point for point in bracket if point in scores]
        sound = [point for point in alive if scores[point] is not None]
        if rung < i:
            kept += sound
            continue
        ranked = sorted(sound, key=lambda point: -(scores[point] or 0.0))
        kept += ranked[: math.ceil(len(alive) / halving.eta)]
    return sorted(kept)
