# SPDX-License-Identifier: Apache-2.0
"""What a sweep found: a table, plots, and the best configuration, ready for `jpeft train`; and report.json, which holds
all that table and plots show, so that they can be made from it again where the sweep is not.

Points are ranked by the mean over their seeds of the figure that the sweep names, on `data.eval`, at the end of their
training. Points that were dropped stand below, with the score and the update of their last comparison; one of which a
seed diverged has no score.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...models._files import write_text
from .. import config as configuration
from ..compare import figures
from . import digest as digests
from .digest import Digest, Point
from .runner import Cost, Made
from .space import Sweep


def write(sweep: Sweep, made: Sequence[Made], cost: Cost) -> Path:
    """Writes table.csv, report.json, report.md, best.yaml and plots/ into the sweep's folder; gives report.md.

    Raises:
      ValueError: every point diverged, so none is the best.
    """
    out, digest = Path(sweep.out), digests.digested(sweep, made, cost)
    first = digest.points[0]
    write_text(out / "table.csv", spreadsheet(sweep, digest))
    write_text(out / "report.json", digests.dumped(digest))
    plots = draw(digest, out / "plots")
    write_text(out / "report.md", markdown(digest, [plot.relative_to(out) for plot in plots]))
    if first.status != "finished":
        raise ValueError(f"every point of {out} diverged, so there is no best.yaml; see report.md, and try lower rates")
    config = next(one.trial.config for one in made if one.trial.values == first.values)
    write_text(out / "best.yaml", best(sweep, first, config))
    return out / "report.md"


def best(sweep: Sweep, point: Point, config: configuration.Config) -> str:
    """The configuration of a point, with the first of the seeds."""
    config = dataclasses.replace(config, out=f"{sweep.out}/best")
    said = ", ".join(f"{key}={value}" for key, value in point.values.items())
    return (
        f"# The best of a sweep by {sweep.figure} on data.eval, {point.mean:.4f} over seeds "
        f"{', '.join(map(str, sweep.seeds))}: {said}\n" + configuration.dump(config)
    )


def spreadsheet(sweep: Sweep, digest: Digest) -> str:
    """A line for every point, best first."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    seeds = [f"{sweep.figure} seed {seed}" for seed in sweep.seeds]
    writer.writerow([*sweep.space, "status", "updates", "of", sweep.figure, "standard deviation", *seeds])
    for point in digest.points:
        scores = point.scores or [""] * len(sweep.seeds)
        mean = point.mean if point.scores else ""
        spread = "" if point.spread is None else point.spread
        writer.writerow([*point.values.values(), point.status, point.updates, point.of, mean, spread, *scores])
    return stream.getvalue()


def markdown(digest: Digest, plots: Sequence[Path]) -> str:
    """The table with what was done."""
    lines = ["# Sweep", "", *(f"- {line}" for line in digest.protocol), "", *table(digest)]
    return "\n".join([*lines, "", *(f"![{plot.stem}]({plot})" for plot in plots), ""])


def table(digest: Digest) -> list[str]:
    """The points in Markdown, by lines, best first."""
    head = [*digest.keys, f"{digest.figure}", "updates", "status"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for point in digest.points:
        spread = "" if point.spread is None else f" ± {point.spread:.4f}"
        score = f"{point.mean:.4f}{spread}" if point.scores else "-"
        cells = [*map(_said, point.values.values()), score, f"{point.updates} of {point.of}", point.status]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(digest: Digest, folder: Path) -> list[Path]:
    """A heat map where two keys make a grid; otherwise the scores against each key's values."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(digest.grid) == 2:
        return [heat_map(digest, folder / f"{_slug(' x '.join(digest.grid))}.svg")]
    sound = [point for point in digest.points if point.scores]
    means, ended = [point.mean for point in sound], [point.status == "finished" for point in sound]
    return [
        figures.scatter(
            [p.values[key] if isinstance(p.values[key], int | float) else _said(p.values[key]) for p in sound],
            means, ended, (key, digest.figure), folder / f"{_slug(key)}.svg",
        )
        for key in digest.keys
        if sound
    ]  # fmt: skip


def heat_map(digest: Digest, file: Path) -> Path:
    """The scores of a grid of two keys.

    Args:
      digest: of such a sweep.
      file: as of `figures.heat_map`.

    Raises:
      ValueError: it has another number of keys, or no grid.
    """
    if len(digest.grid) != 2:
        raise ValueError(f"a heat map is of a grid of two keys; {', '.join(digest.keys)} were varied")
    (rows, down), (columns, across) = ((key, [*map(_said, part)]) for key, part in digest.grid.items())
    values, notes = np.full((len(down), len(across)), np.nan), {}
    for point in digest.points:
        at = down.index(_said(point.values[rows])), across.index(_said(point.values[columns]))
        values[at] = point.mean
        if point.status == "dropped":
            notes[at] = f"at {point.updates}"
        elif point.spread is not None:
            notes[at] = f"± {point.spread:.3f}"
    return figures.heat_map(values, down, across, (rows, columns, digest.figure), file, notes)


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _slug(text: str) -> str:
    return re.sub(r"[^\w-]+", "_", text)
