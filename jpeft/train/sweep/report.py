# SPDX-License-Identifier: Apache-2.0
"""What a sweep found: a table, plots, and the best configuration, ready for `jpeft train`.

Points are ranked by the mean over their seeds of the figure that the sweep names, on `data.eval`, at the end of their
training. Points that were dropped stand below, with the score and the update of their last comparison; one of which a
seed diverged has no score.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...models._files import write_text
from .. import config as configuration
from ..compare import figures
from .runner import Cost, Made
from .space import Range, Sweep


@dataclasses.dataclass(frozen=True)
class Row:
    """A point.

    Attributes:
      values: by key of the space.
      scores: of each seed, at its last evaluation; empty where one diverged.
      status: as of a trial.
      updates: that were made, of `of`.
      made: its trials.
    """

    values: Mapping[str, Any]
    scores: tuple[float, ...]
    status: str
    updates: int
    of: int
    made: tuple[Made, ...]

    @property
    def mean(self) -> float:
        """NaN where a seed diverged."""
        return float(np.mean(self.scores)) if self.scores else float("nan")

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, of a sample; None of one seed."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None


def rows(sweep: Sweep, made: Sequence[Made]) -> list[Row]:
    """The points, best first: those that came to their end, then the others, the longest trained ones first."""
    points: dict[int, list[Made]] = {}
    for one in made:
        points.setdefault(one.trial.point, []).append(one)
    found = []
    for ones in points.values():
        status = "diverged" if any(one.status == "diverged" for one in ones) else ones[0].status
        scores = () if status == "diverged" else tuple(one.evaluations[-1][sweep.figure] for one in ones)
        updates = min(len(one.losses) for one in ones)
        found.append(Row(ones[0].trial.values, scores, status, updates, ones[0].updates, tuple(ones)))
    sign, places = -1 if sweep.better(1.0, 0.0) else 1, ("finished", "dropped", "diverged")
    return sorted(found, key=lambda r: (places.index(r.status), -r.updates / r.of, sign * r.mean if r.scores else 0.0))


def write(sweep: Sweep, made: Sequence[Made], cost: Cost) -> Path:
    """Writes table.csv, report.md, best.yaml and plots/ into the sweep's folder; gives report.md.

    Raises:
      ValueError: every point diverged, so none is the best.
    """
    out, found = Path(sweep.out), rows(sweep, made)
    write_text(out / "table.csv", spreadsheet(sweep, found))
    plots = draw(sweep, found, out / "plots")
    write_text(out / "report.md", markdown(sweep, found, cost, [plot.relative_to(out) for plot in plots]))
    if found[0].status != "finished":
        raise ValueError(f"every point of {out} diverged, so there is no best.yaml; see report.md, and try lower rates")
    write_text(out / "best.yaml", best(sweep, found[0]))
    return out / "report.md"


def best(sweep: Sweep, row: Row) -> str:
    """The configuration of a point, with the first of the seeds."""
    config = dataclasses.replace(row.made[0].trial.config, out=f"{sweep.out}/best")
    said = ", ".join(f"{key}={value}" for key, value in row.values.items())
    return (
        f"# The best of a sweep by {sweep.figure} on data.eval, {row.mean:.4f} over seeds "
        f"{', '.join(map(str, sweep.seeds))}: {said}\n" + configuration.dump(config)
    )


def spreadsheet(sweep: Sweep, found: Sequence[Row]) -> str:
    """A line for every point, best first."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    seeds = [f"{sweep.figure} seed {seed}" for seed in sweep.seeds]
    writer.writerow([*sweep.space, "status", "updates", "of", sweep.figure, "standard deviation", *seeds])
    for row in found:
        scores = row.scores or [""] * len(sweep.seeds)
        mean = row.mean if row.scores else ""
        spread = "" if row.spread is None else row.spread
        writer.writerow([*row.values.values(), row.status, row.updates, row.of, mean, spread, *scores])
    return stream.getvalue()


def markdown(sweep: Sweep, found: Sequence[Row], cost: Cost, plots: Sequence[Path]) -> str:
    """The table with what was done."""
    lanes = f"{min(cost.lanes)} to {max(cost.lanes)}" if min(cost.lanes) < max(cost.lanes) else str(cost.lanes[0])
    trials = sum(len(row.made) for row in found)
    lines = [
        "# Sweep",
        "",
        f"- {len(found)} points by {sweep.search}, each with the seeds {', '.join(map(str, sweep.seeds))}: {trials} "
        f"trials in {len(cost.lanes)} legs of {lanes} lanes; {cost.compiled} steps compiled, {cost.seconds:.1f} s.",
        f"- Judged by {sweep.figure} on data.eval, mean over seeds ± standard deviation.",
    ]
    if sweep.halving is not None:
        shares = ", ".join(f"{share:.3g}" for share in sweep.halving.shares)
        lines.append(
            f"- After {shares} of the updates one point in {sweep.halving.eta} went on, in {sweep.halving.brackets} "
            "bracket(s). Points that were dropped have the score of that comparison, which is not one of a whole "
            "training."
        )
    head = [*sweep.space, f"{sweep.figure}", "updates", "status"]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        score = "-" if not row.scores else f"{row.mean:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}")
        cells = [*map(_said, row.values.values()), score, f"{row.updates} of {row.of}", row.status]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"![{plot.stem}]({plot})" for plot in plots), ""])


def draw(sweep: Sweep, found: Sequence[Row], folder: Path) -> list[Path]:
    """A heat map where two keys make a grid; otherwise the scores against each key's values."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = list(sweep.space)
    if sweep.search == "grid" and len(keys) == 2:
        down, across = ([*map(_said, part)] for part in sweep.space.values() if not isinstance(part, Range))
        values, notes = np.full((len(down), len(across)), np.nan), {}
        for row in found:
            at = down.index(_said(row.values[keys[0]])), across.index(_said(row.values[keys[1]]))
            values[at] = row.mean
            if row.status == "dropped":
                notes[at] = f"at {row.updates}"
            elif row.spread is not None:
                notes[at] = f"± {row.spread:.3f}"
        file = folder / f"{_slug(' x '.join(keys))}.svg"
        return [figures.heat_map(values, down, across, (keys[0], keys[1], sweep.figure), file, notes)]
    sound = [row for row in found if row.scores]
    means, ended = [row.mean for row in sound], [row.status == "finished" for row in sound]
    return [
        figures.scatter(
            [row.values[key] if isinstance(row.values[key], int | float) else _said(row.values[key]) for row in sound],
            means, ended, (key, sweep.figure), folder / f"{_slug(key)}.svg",
        )
        for key in keys
        if sound
    ]  # fmt: skip


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _slug(text: str) -> str:
    return re.sub(r"[^\w-]+", "_", text)
