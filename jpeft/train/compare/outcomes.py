# SPDX-License-Identifier: Apache-2.0
"""What a model did with every example of a test set, and figures of merit of any weighting of these examples.

A weighting is what an interval needs: a bootstrap draw of examples is a vector of how often each was drawn.
"""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from ..scoring import classes

#: Bins of equal width that a calibration error sorts confidences into (Guo et al. 2017).
BINS = 15


@dataclasses.dataclass(frozen=True)
class Classes:
    """Of a classifier.

    Attributes:
      truth: class of every example.
      predicted: the most probable one.
      confidence: its probability.
      num_classes: outputs of the head.
    """

    truth: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    num_classes: int

    #: The figure that methods are ranked by, whether more of it is better, and the fields that are a model's answers.
    main: ClassVar = "accuracy"
    more_is_better: ClassVar = True
    answers: ClassVar = ("predicted", "confidence")

    def __len__(self) -> int:
        return len(self.truth)

    def scores(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Accuracy, and precision, recall and F1 as means over the classes that occur among the weighted examples."""
        return classes.means(self.confusion(weights))

    def main_score(self, weights: np.ndarray | None = None) -> float:
        """`scores(weights)[main]`, which tests ask for thousands of times."""
        right = self.truth == self.predicted
        return float(right.mean() if weights is None else weights @ right / weights.sum())

    def confusion(self, weights: np.ndarray | None = None) -> np.ndarray:
        """`[true class, predicted class]`: weight of the examples."""
        return classes.confusion(self.truth, self.predicted, self.num_classes, weights)

    @property
    def shares(self) -> list[float]:
        """How much of the examples each class is."""
        return (np.bincount(self.truth, minlength=self.num_classes) / len(self)).tolist()

    @property
    def predicted_shares(self) -> list[float]:
        """How much of the examples each class is predicted for."""
        return (np.bincount(self.predicted, minlength=self.num_classes) / len(self)).tolist()

    @property
    def recalls(self) -> list[float]:
        """Of the examples of each class, how much is found; 0 of a class without examples."""
        return classes.by_class(self.confusion())[:, 1].tolist()

    @property
    def collapsed(self) -> bool:
        """One class was predicted for everything, and it is not the only one there is: no score, a failure."""
        return classes.collapsed(self.truth, self.predicted)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: |confidence - accuracy| of bins of confidence, weighted by their sizes."""
        bins = np.minimum((self.confidence * BINS).astype(int), BINS - 1)
        right = (self.truth == self.predicted).astype(float)
        gaps = np.bincount(bins, right - self.confidence, BINS)
        return float(np.abs(gaps).sum() / len(self))

    def saved(self) -> dict[str, Any]:
        """Plain values, from which `read` makes it again."""
        return {
            "kind": "classes",
            "truth": self.truth.tolist(),
            "predicted": self.predicted.tolist(),
            "confidence": [round(float(p), 6) for p in self.confidence],
            "num_classes": self.num_classes,
        }


@dataclasses.dataclass(frozen=True)
class Texts:
    """Of a language model.

    Attributes:
      loss: of every text, summed over its predicted tokens.
      tokens: their number.
    """

    loss: np.ndarray
    tokens: np.ndarray

    main: ClassVar = "perplexity"
    more_is_better: ClassVar = False
    answers: ClassVar = ("loss", "tokens")
    collapsed: ClassVar = False
    calibration_error: ClassVar = None

    def __len__(self) -> int:
        return len(self.loss)

    def scores(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Loss per token in nats, and its exponential."""
        weights = np.ones(len(self)) if weights is None else weights
        loss = float(weights @ self.loss / (weights @ self.tokens))
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}

    def main_score(self, weights: np.ndarray | None = None) -> float:
        """`scores(weights)[main]`."""
        return self.scores(weights)[self.main]

    def saved(self) -> dict[str, Any]:
        """Plain values, from which `read` makes it again."""
        return {"kind": "texts", "loss": [float(x) for x in self.loss], "tokens": self.tokens.tolist()}


@dataclasses.dataclass(frozen=True)
class Written:
    """Of a language model whose texts were scored.

    Attributes:
      names: of the figures, each of which is a mean over the examples.
      values: `[figures, examples]`.
      main: of `names`, the one that methods are ranked by; more of it is better.
    """

    names: tuple[str, ...]
    values: np.ndarray
    main: str

    more_is_better: ClassVar = True
    answers: ClassVar = ("values",)
    collapsed: ClassVar = False
    calibration_error: ClassVar = None

    def __len__(self) -> int:
        return self.values.shape[1]

    def scores(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """The mean of every figure."""
        weights = np.ones(len(self)) if weights is None else weights
        return dict(zip(self.names, (self.values @ weights / weights.sum()).tolist(), strict=True))

    def main_score(self, weights: np.ndarray | None = None) -> float:
        """`scores(weights)[main]`."""
        return self.scores(weights)[self.main]

    def saved(self) -> dict[str, Any]:
        """Plain values, from which `read` makes it again."""
        values = dict(zip(self.names, self.values.tolist(), strict=True))
        return {"kind": "written", "values": values, "main": self.main}


Outcome = Classes | Texts | Written


def read(values: dict[str, Any]) -> Outcome:
    """An outcome from what `saved` gave.

    Raises:
      ValueError: it is no outcome.
    """
    match values:
        case {"kind": "classes"}:
            truth, predicted = (np.asarray(values[key], np.int64) for key in ("truth", "predicted"))
            return Classes(truth, predicted, np.asarray(values["confidence"]), values["num_classes"])
        case {"kind": "texts"}:
            return Texts(np.asarray(values["loss"]), np.asarray(values["tokens"], np.int64))
        case {"kind": "written", "values": dict(found)}:
            return Written((*found,), np.asarray([*found.values()], float), values["main"])
    raise ValueError(f"an outcome is of classes, of texts or of written ones, got kind {values.get('kind')!r}")


def swapped(a: Outcome, b: Outcome, swap: np.ndarray) -> tuple[Outcome, Outcome]:
    """The two with their answers to some examples, a mask, exchanged."""
    first = {f: np.where(swap, getattr(b, f), getattr(a, f)) for f in a.answers}
    second = {f: np.where(swap, getattr(a, f), getattr(b, f)) for f in a.answers}
    return dataclasses.replace(a, **first), dataclasses.replace(b, **second)


def subset(outcome: Outcome, chosen: np.ndarray) -> Outcome:
    """The outcome of some examples, a mask, alone."""
    values = {f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome)}
    return dataclasses.replace(outcome, **{k: v[..., chosen] for k, v in values.items() if isinstance(v, np.ndarray)})


def majority(outcome: Classes, train: np.ndarray) -> Classes:
    """What predicting the largest class of the training labels gives."""
    counts = np.bincount(train, minlength=outcome.num_classes)
    size = len(outcome)
    share = np.full(size, counts.max() / counts.sum())
    return dataclasses.replace(outcome, predicted=np.full(size, counts.argmax()), confidence=share)
