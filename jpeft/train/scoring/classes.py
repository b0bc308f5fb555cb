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
    y, p = np.asarray(labels), np.asarray(predicted)
    figures = {"accuracy": _accuracy, "macro_f1": _macro_f1}
    if len(names) == 2:
        figures |= {
            name: lambda y, p, at=at: float(_by_class(y, p, 2)[1, at])
            for at, name in enumerate(("precision", "recall", "f1"))
        }
    metrics = {
        name: bootstrap(lambda rows, figure=figure: figure(y[rows], p[rows]), len(y), seed=seed)
        for name, figure in figures.items()
    }
    table = _by_class(y, p, len(names))
    by_class = {
        name: {
            "precision": float(row[0]),
            "recall": float(row[1]),
            "f1": float(row[2]),
            "examples": int((y == i).sum()),
        }
        for i, (name, row) in enumerate(zip(names, table, strict=True))
    }
    largest = np.full_like(y, np.bincount(y).argmax())
    majority = {"accuracy": _accuracy(y, largest), "macro_f1": _macro_f1(y, largest)}
    collapsed = names[int(p[0])] if len(set(p.tolist())) == 1 < len(set(y.tolist())) else None
    return Report(metrics, by_class, majority, collapsed)


def _accuracy(y: np.ndarray, p: np.ndarray) -> float:
    return float((y == p).mean())


def _macro_f1(y: np.ndarray, p: np.ndarray) -> float:
    occur = np.union1d(y, p)
    return float(_by_class(y, p, int(occur.max()) + 1)[occur, 2].mean())


def _by_class(y: np.ndarray, p: np.ndarray, count: int) -> np.ndarray:
    """`[classes, 3]`: precision, recall, F1; 0 where a quotient has no denominator."""
    hits = np.bincount(y[y == p], minlength=count)
    said, true = np.bincount(p, minlength=count), np.bincount(y, minlength=count)
    ratio = lambda a, b: np.divide(a, b, out=np.zeros(count), where=b > 0)  # noqa: E731
    return np.stack([ratio(hits, said), ratio(hits, true), ratio(2 * hits, said + true)], axis=1)
