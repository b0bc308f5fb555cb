# SPDX-License-Identifier: Apache-2.0
"""Figures for predicted classes, with the majority's beside them, and whether one class is all that is predicted."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .intervals import Estimate, bootstrap


@dataclasses.dataclass(frozen=True)
class Report:
    """How well classes were predicted.

    Attributes:
      metrics: accuracy, macro-F1, and of two classes precision, recall and F1 of the second one.
      by_class: precision, recall, F1 and number of examples of each class by name.
      majority: accuracy and macro-F1 of always naming the largest class.
      collapsed: the one class that is predicted for all, though there are several; None where there is none.
    """

    metrics: dict[str, Estimate]
    by_class: dict[str, dict[str, float]]
    majority: dict[str, float]
    collapsed: str | None


def report(labels: Sequence[int], predicted: Sequence[int], names: Sequence[str], *, seed: int = 0) -> Report:
    """Figures of predicted classes, with intervals over examples.

    Macro-F1 is the mean over all classes of `names` that occur among labels or predictions; a class that is never
    predicted has F1 0.

    Args:
      labels, predicted: numbers of classes.
      names: of every class.
      seed: of the resampling.
    """
    y, p, size = np.asarray(labels), np.asarray(predicted), len(names)
    wanted = ("accuracy", "macro_f1") + (("precision", "recall", "f1") if size == 2 else ())
    metrics = {
        name: bootstrap(lambda rows, name=name: _figures(y[rows], p[rows], size)[name], len(y), seed=seed)
        for name in wanted
    }
    counts = confusion(y, p, size)
    rows = zip(names, by_class(counts), counts.sum(1), strict=True)
    table = {
        name: {"precision": float(row[0]), "recall": float(row[1]), "f1": float(row[2]), "examples": int(examples)}
        for name, row, examples in rows
    }
    largest = _figures(y, np.full_like(y, np.bincount(y).argmax()), size)
    one = names[int(p[0])] if collapsed(y, p) else None
    return Report(metrics, table, {name: largest[name] for name in ("accuracy", "macro_f1")}, one)


def confusion(truth: np.ndarray, predicted: np.ndarray, size: int, weights: np.ndarray | None = None) -> np.ndarray:
    """`[true class, predicted class]` of `size` classes: how many examples, or their weight."""
    return np.bincount(truth * size + predicted, weights, size * size).reshape(size, size).astype(float)


def by_class(counts: np.ndarray) -> np.ndarray:
    """`[classes, 3]`: precision, recall, F1 of a confusion; 0 where a quotient has no denominator."""
    hits, true, said = np.diag(counts), counts.sum(1), counts.sum(0)
    quotients = ((hits, said), (hits, true), (2 * hits, said + true))
    return np.stack([np.divide(a, b, out=np.zeros(len(counts)), where=b > 0) for a, b in quotients], axis=1)


def means(counts: np.ndarray) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 as means over the classes that occur in a confusion.

    A class counts where it is the truth of an example or predicted for one. One that is never predicted has precision
    0, as in scikit-learn with `zero_division=0`.
    """
    there = (counts.sum(0) + counts.sum(1)) > 0
    precision, recall, f1 = by_class(counts)[there].mean(0).tolist()
    accuracy = float(np.trace(counts) / counts.sum())
    return {"accuracy": accuracy, "macro_f1": f1, "precision": precision, "recall": recall}


def collapsed(truth: np.ndarray, predicted: np.ndarray) -> bool:
    """One class was predicted for everything, and it is not the only one there is: no score, a failure."""
    return len(np.unique(predicted)) == 1 < len(np.unique(truth))


def _figures(truth: np.ndarray, predicted: np.ndarray, size: int) -> dict[str, float]:
    """Accuracy and macro-F1; of two classes precision, recall and F1 of the second one."""
    counts = confusion(truth, predicted, size)
    found = means(counts)
    second = dict(zip(("precision", "recall", "f1"), by_class(counts)[1].tolist(), strict=True)) if size == 2 else {}
    return found | second
