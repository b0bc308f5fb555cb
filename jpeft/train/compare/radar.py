# SPDX-License-Identifier: Apache-2.0
"""The radar: a web for each method, of its rank on every figure."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .table import Table

#: What the radar shows beside the main figure; less of each is better.
_SPOKES = ("trained", "peak MB", "step ms", "forward ms", "adapter KB", "calibration error")
_COLOUR = "#0072B2"


def radar(axes: Any, table: Table) -> bool:
    """Ranks, not values: each spoke goes from the worst method (the middle) to the best (the rim). A web a method, for
    more than three or four on top of each other cannot be told apart.
    """
    rows = [row for row in table.rows if row.scores and row.costs["trained"]]
    sign = -1 if table.more_is_better else 1
    merits = [math.inf if row.all_collapsed else sign * row.scores[table.main].mean for row in rows]
    spokes = {table.main: merits}
    for cost in _SPOKES:
        values = [row.costs[cost] for row in rows]
        if all(value is not None for value in values):
            spokes[cost] = [float(value) for value in values if value is not None]
    if len(rows) < 2 or len(spokes) < 3:
        return False
    figure = axes.figure
    axes.remove()
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    ranks = np.array([_ranks(values) for values in spokes.values()])  # [spokes, methods]
    lines = math.ceil(len(rows) / 4)
    figure.set_figheight(0.5 + 1.9 * lines)
    figure.suptitle("rank on every figure: the rim is the best method, the middle the worst", fontsize=10)
    for at, row in enumerate(rows):
        polar = figure.add_subplot(lines, 4, at + 1, projection="polar")
        web = np.append(ranks[:, at], ranks[0, at])
        polar.fill(np.append(angles, angles[0]), web, color=_COLOUR, alpha=0.25)
        polar.plot(np.append(angles, angles[0]), web, color=_COLOUR, marker="o", ms=3)
        polar.set_xticks(angles, [_broken(name) for name in spokes], fontsize=7)
        polar.tick_params(axis="x", pad=-1)
        for label, angle in zip(polar.get_xticklabels(), angles, strict=True):  # beside the rim, not on it
            side = np.cos(angle)
            label.set_horizontalalignment("center" if abs(side) < 0.3 else "left" if side > 0 else "right")
        polar.set_yticks(range(1, len(rows) + 1), [""] * len(rows))
        polar.grid(color="#dddddd", lw=0.5)
        polar.set_ylim(0, len(rows))
        polar.set_title(row.method, fontsize=9, fontweight="bold")
    return True


def _broken(name: str) -> str:
    """A name of two words on two lines."""
    return name.replace(" ", "\n", 1)


def _ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the largest value up to their number for the smallest; equal values share the mean of theirs."""
    x = np.asarray(values)
    return (x[None] > x[:, None]).sum(1) + ((x[None] == x[:, None]).sum(1) + 1) / 2
