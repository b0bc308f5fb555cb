# SPDX-License-Identifier: Apache-2.0
"""All that a sweep's report shows, as one small file of plain values; table and plot can be made from it again."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .runner import Cost, Made
from .space import Range, Sweep


@dataclasses.dataclass(frozen=True)
class Point:
    """A choice of values.

    Attributes:
      values: by key of the space.
      scores: of each seed, at its last evaluation; empty where one diverged.
      status: as of a trial.
      updates: that were made, of `of`.
    """

    values: Mapping[str, Any]
    scores: tuple[float, ...]
    status: str
    updates: int
    of: int

    @property
    def mean(self) -> float:
        """NaN where a seed diverged."""
        return float(np.mean(self.scores)) if self.scores else float("nan")

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, of a sample; None of one seed."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None


@dataclasses.dataclass(frozen=True)
class Digest:
    """All that a report shows.

    Attributes:
      protocol: what was done, in lines.
      figure: by which points are judged, on data.eval.
      grid: values of every key, where all their combinations were tried; else empty.
      points: best first.
    """

    protocol: tuple[str, ...]
    figure: str
    grid: Mapping[str, tuple[Any, ...]]
    points: tuple[Point, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that vary."""
        return (*self.points[0].values,)


def digested(sweep: Sweep, made: Sequence[Made], cost: Cost) -> Digest:
    """What a sweep came to."""
    grid = {key: part for key, part in sweep.space.items() if sweep.search == "grid" and not isinstance(part, Range)}
    found = points(sweep, made)
    return Digest(tuple(protocol(sweep, found, len(made), cost)), sweep.figure, grid, tuple(found))


def points(sweep: Sweep, made: Sequence[Made]) -> list[Point]:
    """The points, best first: those that came to their end, then the others, the longest trained ones first."""
    by_point: dict[int, list[Made]] = {}
    for one in made:
        by_point.setdefault(one.trial.point, []).append(one)
    found = []
    for ones in by_point.values():
        status = "diverged" if any(one.status == "diverged" for one in ones) else ones[0].status
        scores = () if status == "diverged" else tuple(one.evaluations[-1][sweep.figure] for one in ones)
        updates = min(len(one.losses) for one in ones)
        found.append(Point(ones[0].trial.values, scores, status, updates, ones[0].updates))
    sign, places = -1 if sweep.better(1.0, 0.0) else 1, ("finished", "dropped", "diverged")
    return sorted(found, key=lambda r: (places.index(r.status), -r.updates / r.of, sign * r.mean if r.scores else 0.0))


def protocol(sweep: Sweep, found: Sequence[Point], trials: int, cost: Cost) -> list[str]:
    """What was done, in lines."""
    lanes = f"{min(cost.lanes)} to {max(cost.lanes)}" if min(cost.lanes) < max(cost.lanes) else str(cost.lanes[0])
    lines = [
        f"{len(found)} points by {sweep.search}, each with the seeds {', '.join(map(str, sweep.seeds))}: {trials} "
        f"trials in {len(cost.lanes)} legs of {lanes} lanes; {cost.compiled} steps compiled, {cost.seconds:.1f} s.",
        f"Judged by {sweep.figure} on data.eval, mean over seeds ± standard deviation.",
    ]
    if sweep.halving is not None:
        shares = ", ".join(f"{share:.3g}" for share in sweep.halving.shares)
        lines.append(
            f"After {shares} of the updates one point in {sweep.halving.eta} went on, in {sweep.halving.brackets} "
            "bracket(s). Points that were dropped have the score of that comparison, which is not one of a whole "
            "training."
        )
    return [*lines, *(f"Device: {device}." for device in cost.devices)]


def dumped(digest: Digest) -> str:
    """As JSON; `read` gives it back."""
    return json.dumps(dataclasses.asdict(digest), indent=1, allow_nan=False) + "\n"


def read(text: str) -> Digest:
    """A digest from what `dumped` gave.

    Raises:
      pydantic.ValidationError: it is none.
    """
    import pydantic

    return pydantic.TypeAdapter(Digest).validate_json(text)
