# SPDX-License-Identifier: Apache-2.0
"""Pictures of results, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str], file: str | Path) -> Path:
    """Draws how many rows of each class were taken for which, as counts, shaded by their share of the true class.

    One hue from light to dark, so that it reads the same for every kind of colour vision and in print.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (truth, predicted), 1)
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
