# SPDX-License-Identifier: Apache-2.0
"""Pictures of results, as PNG files."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .feed import counted
from .standing import LOWER_IS_BETTER


def confusion(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """How often a class (row) was taken for which (column)."""
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (truth, predicted), 1)
    return counts


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str], file: str | Path) -> Path:
    """Draws how many rows of each class were taken for which, as counts, shaded by their share of the true class.

    One hue from light to dark, so that it reads the same for every kind of colour vision and in print.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = confusion(truth, predicted, len(names))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 3.2 + 0.62 * len(names)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    for row, column in np.ndindex(counts.shape):
        if counts[row, column]:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=10)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), [f"{name} ({n})" for name, n in zip(names, counts.sum(axis=1), strict=True)])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class (rows of it)")
    axes.set_title(f"{np.trace(counts)} of {counts.sum()} right: accuracy {np.trace(counts) / counts.sum():.3f}")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    figure.savefig(file, dpi=130)
    return Path(file)


def curves(metrics: str | Path, folder: str | Path) -> list[Path]:
    """Draws a run's metrics.jsonl: loss, evaluation, learning rate, throughput; what was not measured is not drawn.

    Lines differ in stroke and lightness, not in hue alone, so that they can be told apart in print.

    Returns:
      the files, in `folder`.
    """
    entries = [json.loads(line) for line in Path(metrics).read_text(encoding="utf-8").splitlines()]
    logged = [entry for entry in entries if "losses" in entry]
    evaluated = [entry for entry in entries if "eval_loss" in entry]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    if logged:
        files += [_loss(logged, evaluated, folder), _rate(logged, folder), _throughput(logged, folder)]
    if evaluated:
        files.append(_evaluation(evaluated, folder))
    return files


#: Strokes in the order of their use: colours of Okabe and Ito, dark to light, each with a dash and a mark of its own.
_STROKES = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#0072B2", "linestyle": "--", "marker": "s"},
    {"color": "#D55E00", "linestyle": "-.", "marker": "^"},
)


def _loss(logged: list[Any], evaluated: list[Any], folder: Path) -> Path:
    last = [entry["update"] for entry in logged]
    updates = np.concatenate([np.arange(n - len(e["losses"]), n) + 1 for n, e in zip(last, logged, strict=True)])
    losses = np.array([loss for entry in logged for loss in entry["losses"]], np.float64)  # NaN of what was skipped
    updates, losses = updates[np.isfinite(losses)], losses[np.isfinite(losses)]
    with _figure(folder / "loss.png", "update", "loss (nats a label)") as axes:
        axes.plot(updates, losses, color="0.75", linewidth=0.8, label="training, each update")
        axes.plot(updates, _smooth(losses), color="black", linewidth=1.6, label="training, running mean")
        if evaluated:
            x, y = zip(*((entry["update"], entry["eval_loss"]) for entry in evaluated), strict=True)
            axes.plot(x, y, **_STROKES[2], markersize=5, label="evaluation")
        axes.legend(frameon=False)
    return folder / "loss.png"


def _rate(logged: list[Any], folder: Path) -> Path:
    with _figure(folder / "learning_rate.png", "update", "learning rate") as axes:
        axes.plot([e["update"] for e in logged], [e["lr"] for e in logged], color="black")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        axes.set_ylim(bottom=0)
    return folder / "learning_rate.png"


def _throughput(logged: list[Any], folder: Path) -> Path:
    updates, unit = [entry["update"] for entry in logged], counted(logged[0])
    real, padded = ([entry[f"{kind}{unit}_per_s"] for entry in logged] for kind in ("", "padded_"))
    with _figure(folder / "throughput.png", "update", f"{unit}/s") as axes:
        axes.plot(updates, real, color="black", label=f"real {unit}")
        axes.plot(updates, padded, color="0.5", linestyle="--", label="with padding")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(0, 1.15 * max(padded))
        axes.legend(frameon=False, loc="lower right")
    return folder / "throughput.png"


def _evaluation(evaluated: list[Any], folder: Path) -> Path:
    """One panel for each figure: their scales have nothing in common."""
    names = [name for name in evaluated[0] if name.startswith("eval_")]
    updates = [entry["update"] for entry in evaluated]
    with _figure(folder / "evaluation.png", "update", *(name[5:].replace("_", " ") for name in names)) as panels:
        for axes, name in zip(np.atleast_1d(panels), names, strict=True):
            values = [entry[name] for entry in evaluated]
            axes.plot(updates, values, **_STROKES[0], markersize=4)
            low = name[5:] in LOWER_IS_BETTER
            best = int((np.argmin if low else np.argmax)(values))
            axes.annotate(
                f"{values[best]:.4g}", (updates[best], values[best]), xytext=(0, -15 if low else 7),
                textcoords="offset points", ha="center", fontsize=9,
            )  # fmt: skip
            axes.margins(x=0.08, y=0.18)
    return folder / "evaluation.png"


@contextlib.contextmanager
def _figure(file: Path, x: str, *labels: str) -> Iterator[Any]:
    """Axes, or as many side by side as there are labels of the vertical one; saved on the way out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4 if len(labels) == 1 else 3.4 * len(labels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(labels))
    for axes, label in zip(np.atleast_1d(panels), labels, strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    yield panels
    figure.savefig(file, dpi=130)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over a window of a twentieth of the run around every value, cut at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.arange(len(values)) - half, np.arange(len(values)) + half + 1
    low, high = np.maximum(low, 0), np.minimum(high, len(values))
    return (sums[high] - sums[low]) / (high - low)
