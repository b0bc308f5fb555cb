# SPDX-License-Identifier: Apache-2.0
"""The plots of a comparison. Told apart by marker, dash and hatch as well as by colour, and drawn in colours that every
kind of colour vision tells apart (Okabe and Ito), so that they read the same in print.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .radar import radar
from .table import Row, Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vP*X<>hpd"  # 13, and 8 colours: no pair comes twice among 104 methods
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
#: Curves of more methods than this have no bands, which would lie over one another.
_MOST_BANDS = 8
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "ooo", "**")

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "jpeft", "svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def draw(table: Table, folder: str | Path) -> dict[str, Path]:
    """Draws what the table has figures for, as PNG and SVG; gives the SVG files by title."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return {title: file for title, plot in _plots().items() if (file := _drawn(plot, table, folder, title)) is not None}


def draw_one(table: Table, title: str, file: str | Path) -> None:
    """Draws one of the plots of `draw` as PNG.

    Raises:
      ValueError: there is no such plot, or the table has no figures for it.
    """
    file, plot = Path(file), _plots().get(title)
    figure = None if plot is None else _figure(plot, table)
    if figure is None:
        raise ValueError(f"no plot {title!r} of this table; there are {', '.join(_plots())}, where they are measured")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _plots() -> Mapping[str, Callable[[Any, Table], bool]]:
    return {
        "scores": _scores,
        "groups": _groups,
        "forgetting": _forgetting,
        "score against parameters": _pareto,
        "parameters": _parameters,
        "memory": _memory,
        "latency": _latency,
        "learning curves": _curves,
        "radar": radar,
    }


def few_examples(tables: Sequence[Table], folder: str | Path) -> Path | None:
    """The main figure against the number of training rows, all of them last, of the tables of one task and model; None
    where there is but one number.
    """
    places: dict[int | None, float] = {size: float(size) for size in sorted(t.size for t in tables if t.size)}
    if not places:
        return None
    whole = next((t for t in tables if t.size is None), tables[0])
    if whole.size is None:
        places[None] = float(whole.train_rows or 4 * max(places.values()))  # how many they are may not be known
    everything = "all" if whole.train_rows is None else f"all\n{whole.train_rows:,}"

    def plot(axes: Any, tables: Any) -> bool:
        drawn = False
        for at, method in enumerate(row.method for row in whole.rows):
            found = [(places[t.size], row) for t in tables for row in t.rows if row.method == method and row.scores]
            if method == "majority" or not found:  # every one of its runs may have diverged
                continue
            found.sort(key=lambda one: one[0])
            xs = np.array([x for x, _ in found]) * 1.02 ** (at - 3)  # beside each other, not on top
            means, low, high = np.array([row.scores[whole.main] for _, row in found]).T
            style = {"marker": _of(MARKERS, at), "color": _of(COLOURS, at)}
            errors = [means - low, high - means]
            axes.errorbar(xs, means, yerr=errors, capsize=2, label=method, ls=_of(DASHES, at), **style)
            lost = np.array([row.all_collapsed for _, row in found])
            axes.plot(xs[lost], means[lost], ls="none", mfc="white", zorder=3, **style)
            drawn = True
        axes.set_xscale("log")
        axes.set_xticks([*places.values()], [everything if size is None else f"{size:,}" for size in places])
        axes.minorticks_off()
        axes.set_xlabel("training rows (bars: 95 % intervals; hollow: collapsed)")
        _scaled(axes.yaxis, whole)
        axes.set_ylabel(whole.main)
        _legend(axes)
        return drawn

    return _drawn(plot, tables, Path(folder), "few examples")


def heat_map(
    values: np.ndarray,
    rows: Sequence[Any],
    columns: Sequence[Any],
    names: tuple[str, str, str],
    file: str | Path,
    notes: Mapping[tuple[int, int], str] | None = None,
) -> Path:
    """A grid of figures, each written into its cell.

    Args:
      values: by row and column; NaN is said to have diverged.
      rows, columns: their labels.
      names: of the rows, the columns and the figure.
      file: the SVG; a PNG comes beside it.
      notes: a second line for some cells.
    """

    def plot(axes: Any, values: Any) -> bool:
        image = axes.imshow(values, cmap="cividis", aspect="auto")
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for row, column in np.ndindex(values.shape):
            value = values[row, column]
            said = "diverged" if np.isnan(value) else f"{value:.3f}"
            if notes and (row, column) in notes:
                said += f"\n{notes[row, column]}"
            axes.text(column, row, said, ha="center", va="center", color="black" if value > middle else "white")
        axes.set_xticks(range(len(columns)), map(str, columns))
        axes.set_yticks(range(len(rows)), map(str, rows))
        axes.set_ylabel(names[0])
        axes.set_xlabel(names[1])
        axes.figure.colorbar(image, ax=axes, label=names[2])
        return True

    file = Path(file)
    drawn = _drawn(plot, np.asarray(values, float), file.parent, file.stem)
    assert drawn is not None
    return drawn


def scatter(
    values: Sequence[Any], scores: Sequence[float], ended: Sequence[bool], names: tuple[str, str], file: str | Path
) -> Path:
    """Scores against the values of one key: filled where a training came to its end, hollow where it did not.

    Args:
      values: numbers, or what else a key may be: then each has a place of its own.
      scores: beside them.
      ended: beside them.
      names: of the key and of the score.
      file: the SVG; a PNG comes beside it.
    """

    def plot(axes: Any, _: Any) -> bool:
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        known = list(dict.fromkeys(map(str, values)))
        places = np.array([value if numeric else known.index(str(value)) for value in values], float)
        for end, face, label in ((True, COLOURS[0], "to the end"), (False, "none", "dropped before")):
            chosen = np.array(ended) == end
            if chosen.any():
                axes.scatter(
                    places[chosen], np.array(scores)[chosen], s=36, marker="o" if end else "s",
                    facecolors=face, edgecolors=COLOURS[0 if end else 7], label=label,
                )  # fmt: skip
        if not numeric:
            axes.set_xticks(range(len(known)), known)
        elif places.min() > 0 and places.max() >= 10 * places.min():
            axes.set_xscale("log")
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.grid(axis="y", alpha=0.3)
        _legend(axes)
        return True

    file = Path(file)
    drawn = _drawn(plot, None, file.parent, file.stem)
    assert drawn is not None
    return drawn


def _scores(axes: Any, table: Table) -> bool:
    rows = [row for row in table.rows if row.scores]
    sign = 1 if table.more_is_better else -1
    rows = sorted(rows, key=lambda row: (not row.all_collapsed, sign * row.scores[table.main].mean))  # upwards
    for at, row in enumerate(rows):
        mean, low, high = row.scores[table.main]
        colour = COLOURS[7] if row.is_baseline else COLOURS[0]
        face = "white" if row.collapsed or row.is_baseline else colour
        axes.errorbar(
            mean,
            at,
            xerr=[[mean - low], [high - mean]],
            fmt="s" if row.is_baseline else "o",
            color=colour,
            mfc=face,
            capsize=3,
        )
    names = [row.method + (f" (collapsed {row.collapsed} of {row.seeds})" if row.collapsed else "") for row in rows]
    _scaled(axes.xaxis, table)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"{table.main} on {table.examples:,} test examples, mean over seeds and 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    axes.figure.set_figheight(1.4 + 0.36 * len(rows))
    return True


def _groups(axes: Any, table: Table) -> bool:
    """The main figure of every group of test examples, by method."""
    rows = [row for row in table.rows if row.groups and not row.all_collapsed]
    if not rows:
        return False
    names = list(dict.fromkeys(name for row in rows for name in row.groups))
    for at, name in enumerate(names):
        means, low, high = np.array([row.groups[name] for row in rows]).T
        places = np.arange(len(rows)) + 0.16 * (at - (len(names) - 1) / 2)
        axes.errorbar(
            means, places, xerr=[means - low, high - means], label=name, capsize=3,
            ls="none", marker=_of(MARKERS, at), color=_of(COLOURS, at),
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{table.main} on each group alone, mean over seeds and 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    axes.figure.set_figheight(1.6 + 0.4 * len(rows))
    _legend(axes)
    return True


def _forgetting(axes: Any, table: Table) -> bool:
    """What was gained against what was forgotten: the best is at the lower left for perplexities."""
    rows = _from_above(table, lambda row: bool(row.scores) and row.costs["general loss after"] is not None)
    for at, row in rows:
        forgot = (row.costs["general loss after"] or 0) - (row.costs["general loss before"] or 0)
        axes.plot(
            forgot, row.scores[table.main].mean, ls="none", ms=9, label=row.method,
            marker=_of(MARKERS, at), color=_of(COLOURS, at),
        )  # fmt: skip
    axes.axvline(0, color="black", lw=0.8, ls=":")
    axes.set_xlabel("loss per token on general text, after minus before (right: more was forgotten)")
    _scaled(axes.yaxis, table)
    axes.set_ylabel(f"{table.main} on {table.examples:,} test examples")
    axes.grid(alpha=0.3)
    _legend(axes)
    return len(rows) > 1


def _pareto(axes: Any, table: Table) -> bool:
    rows = _from_above(table, lambda row: bool(row.scores and row.costs["trained"]))
    for at, row in rows:
        mean, low, high = row.scores[table.main]
        axes.errorbar(
            row.costs["trained"], mean, yerr=[[mean - low], [high - mean]], label=row.method,
            fmt=_of(MARKERS, at), color=_of(COLOURS, at), ms=8, capsize=3,
            mfc="white" if row.all_collapsed else None,
        )  # fmt: skip
    best, front = None, []
    for row in sorted((row for _, row in rows if not row.all_collapsed), key=lambda row: row.costs["trained"] or 0):
        mean = row.scores[table.main].mean
        if best is None or (mean > best if table.more_is_better else mean < best):
            best = mean
            front.append((row.costs["trained"], mean))
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color="black", lw=0.8, ls=":", zorder=0)
    axes.set_xscale("log")
    hollow = "; hollow: collapsed" if any(row.all_collapsed for _, row in rows) else ""
    axes.set_xlabel(f"trained parameters (dotted: the best for at most so many{hollow})")
    _scaled(axes.yaxis, table)
    axes.set_ylabel(table.main)
    _legend(axes)
    return len(rows) > 1


def _parameters(axes: Any, table: Table) -> bool:
    rows = [row for row in table.rows if row.costs["trained"]]
    _bars(axes, rows, ("trained", "changed"))
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    return bool(rows)


def _memory(axes: Any, table: Table) -> bool:
    """What the compiled training step takes: weights, adapter and optimizer, and what it makes on the way."""
    rows = [row for row in table.rows if row.memory]
    parts: dict[str, list[float]] = {}
    for row in rows:
        for name, size in row.memory.items():
            parts.setdefault(name, []).append(size)
    left = np.zeros(len(rows))
    for at, (name, sizes) in enumerate(parts.items()):
        style = {"color": _of(COLOURS, at), "hatch": _of(HATCHES, at), "edgecolor": "white"}
        axes.barh(range(len(rows)), sizes, left=left, label=name, **style)
        left += sizes
    axes.invert_yaxis()
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.set_xlabel("MB of a compiled training step")
    axes.figure.set_figheight(1.6 + 0.34 * len(rows))
    _legend(axes)
    return bool(rows)


def _latency(axes: Any, table: Table) -> bool:
    rows = [row for row in table.rows if row.costs["forward ms"]]
    names = [
        n
        for n in ("forward ms", "merged ms", "decode ms/token", "merged decode ms/token")
        if any(r.costs[n] for r in rows)
    ]
    lost = any(not row.costs[name] for row in rows for name in names)
    _bars(axes, rows, names)
    axes.set_xlabel("ms (no bar: it cannot be merged, or could not be told)" if lost else "ms")
    return bool(rows)


def _curves(axes: Any, table: Table) -> bool:
    rows = _from_above(table, lambda row: len(row.curve) > 1)
    for at, row in rows:
        updates, seeds = [update for update, _ in row.curve], np.array([values for _, values in row.curve])
        colour = _of(COLOURS, at)
        marks = {"marker": _of(MARKERS, at), "markevery": max(1, len(updates) // 8), "ms": 5}
        axes.plot(updates, seeds.mean(1), ls=_of(DASHES, at), color=colour, label=row.method, **marks)
        if len(rows) <= _MOST_BANDS:
            axes.fill_between(updates, seeds.min(1), seeds.max(1), color=colour, alpha=0.12, lw=0)
    band = "; band: from the lowest to the highest" if len(rows) <= _MOST_BANDS else ""
    axes.set_xlabel(f"updates (line: mean over seeds{band})")
    _scaled(axes.yaxis, table)
    axes.set_ylabel(f"{table.main} on the validation split")
    _legend(axes)
    return bool(rows)


def _bars(axes: Any, rows: Sequence[Row], costs: Sequence[str]) -> None:
    """Groups of bars, one group a method, one bar a figure; a figure that was not measured has no bar."""
    height = 0.8 / max(len(costs), 1)
    for at, cost in enumerate(costs):
        values = [row.costs[cost] or np.nan for row in rows]
        places = np.arange(len(rows)) - 0.4 + height * (at + 0.5)
        axes.barh(places, values, height, label=cost, color=_of(COLOURS, at), hatch=_of(HATCHES, at), edgecolor="white")
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.invert_yaxis()
    axes.figure.set_figheight(1.4 + (0.24 + 0.16 * len(costs)) * len(rows))
    _legend(axes)


def _from_above(table: Table, shown: Callable[[Row], bool]) -> list[tuple[int, Row]]:
    """Rows with their place in the table, which says how they are drawn in all plots; the highest on the plot first."""
    rows = [(at, row) for at, row in enumerate(table.rows) if shown(row)]
    return sorted(rows, key=lambda found: -found[1].scores[table.main].mean if found[1].scores else 0.0)


def _scaled(axis: Any, table: Table) -> None:
    """A perplexity is an exponential: where equal ratios are equally long, the good methods are not all in a corner."""
    from matplotlib import ticker

    if table.main == "perplexity":
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(ticker.ScalarFormatter())
        axis.set_minor_formatter(ticker.NullFormatter())


def _legend(axes: Any) -> None:
    """Beside the plot, where it hides nothing."""
    lines = len(axes.get_legend_handles_labels()[0])
    if lines:
        axes.figure.set_figheight(max(axes.figure.get_figheight(), 0.4 + 0.205 * lines))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, handlelength=3.2)


def _drawn(plot: Callable[[Any, Any], bool], data: Any, folder: Path, title: str) -> Path | None:
    figure = _figure(plot, data)
    if figure is None:
        return None
    from matplotlib import rc_context

    file = folder / f"{title.replace(' ', '_')}.svg"
    with rc_context(_STYLE):  # what an SVG is written with is asked for as it is saved
        figure.savefig(file, metadata={"Date": None})
        figure.savefig(file.with_suffix(".png"), dpi=130)
    return file


def _figure(plot: Callable[[Any, Any], bool], data: Any) -> Any:
    """The figure; None where there is nothing to be drawn."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        return figure if plot(figure.add_subplot(), data) else None


def _of(values: Sequence[Any], at: int) -> Any:
    return values[at % len(values)]
