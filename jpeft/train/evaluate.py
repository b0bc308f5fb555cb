# SPDX-License-Identifier: Apache-2.0
"""How well a model does, in loss and figures of its task; and what it says about new texts."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from .._partition import GraphDef, Leaves, combine, partition
from . import devices, roll
from .batches import Batches
from .buckets import Buckets, choose_widths
from .examples import IGNORED, Examples
from .feed import Feed
from .losses import logits_of
from .measures import MEASURES, Measure
from .tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures, and for classification the class predicted for every example, in their order."""

    metrics: dict[str, float]
    predicted: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable label of a text, or of an image, whose file is then the `text`."""

    text: str
    label: str
    probability: float


class Evaluator:
    """Evaluates one model structure, compiled once per width of batch.

    Args:
      graphdef: of `jpeft.partition`.
      measure: what is measured: a task's, or one of `measures.measured_by`.
      mesh: where the arrays lie.
    """

    def __init__(self, graphdef: GraphDef, measure: str | Measure, mesh: Mesh | None = None):
        self._measure = MEASURES[measure] if isinstance(measure, str) else measure
        self._mesh = mesh
        sums, groups = self._measure.sums, devices.num_groups(mesh)

        def compute(trainable: Leaves, frozen: Leaves, batch: dict[str, Any]) -> dict[str, Any]:
            return sums(combine(graphdef, trainable, frozen), jax.tree.map(lambda x: x[0], batch), groups)

        self._compute = jax.jit(compute, out_shardings=devices.whole(mesh))

    def __call__(self, trainable: Leaves, frozen: Leaves, batches: Feed) -> Evaluation:
        """Evaluates every example once.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        order = batches.buckets.in_order()
        outcomes = []
        for number, batch in enumerate(order, 1):
            roll.at(f"batch {number} of an evaluation")
            outcomes.append(self._compute(trainable, frozen, devices.place(batches.collate(batch), self._mesh)))
        return assembled(self._measure, batches, jax.device_get(outcomes))


def assembled(measure: Measure, batches: Feed, outcomes: Sequence[Mapping[str, np.ndarray]]) -> Evaluation:
    """The evaluation that the batches of `batches.buckets.in_order()` come to.

    Args:
      measure: what was measured.
      batches: what it was measured on.
      outcomes: what `measure.sums` gave for every batch.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    metrics = figures(measure, outcomes)
    if "predicted" not in outcomes[0]:
        return Evaluation(metrics)
    predicted = np.empty(len(batches.examples), np.int32)
    for batch, outcome in zip(batches.buckets.in_order(), outcomes, strict=True):
        predicted[np.asarray(batch.rows)] = outcome["predicted"][: len(batch.rows)]
    return Evaluation(metrics, predicted)


def figures(measure: Measure, outcomes: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """The mean loss, and the figures of a measure, of what `measure.sums` gave for every batch.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    totals = [name for name in outcomes[0] if name != "predicted"]
    sums = {name: np.sum([outcome[name] for outcome in outcomes], axis=0, dtype=np.float64) for name in totals}
    loss = float(sums["loss"] / sums["labels"])
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of the evaluation is {loss}")
    return {"loss": loss, **measure.figures(sums)}


def predict(
    model: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    names: Sequence[str],
    *,
    max_length: int = 128,
    batch_size: int = 32,
) -> list[Prediction]:
    """The most probable label of every text, as the evaluation during training would give it.

    Args:
      model: a `SEQ_CLS` model, adapted or not.
      tokenizer: that of its folder.
      texts: any number; longer ones are cut at `max_length` tokens.
      names: label of every output of the head.
      max_length, batch_size: as in training.
    """
    ids, lost = tokenizer.cut(texts, max_length)
    tokens, labels = [np.asarray(row, np.int32) for row in ids], [np.asarray(IGNORED, np.int32)] * len(ids)
    examples = Examples(tokens, labels, len(ids), sum(n > 0 for n in lost), sum(lost), 0, {})
    sizes = {"max_length": max_length, "batch_size": batch_size, "pad_id": tokenizer.pad_id}
    found = dict(each_row(model, examples, jax.nn.softmax, **sizes))
    return [Prediction(text, names[int(found[i].argmax())], float(found[i].max())) for i, text in enumerate(texts)]


def each_row(
    model: Any,
    examples: Examples,
    of_logits: Callable[[jax.Array], jax.Array],
    *,
    max_length: int,
    batch_size: int,
    pad_id: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """The number of every row and what `of_logits` makes of its logits, in the order in which they are computed.

    Args:
      model: adapted or not.
      examples: rows; their labels are not looked at.
      of_logits: of a batch.
      max_length, batch_size, pad_id: of the batches.
    """
    graphdef, trainable, frozen = partition(model)

    @jax.jit
    def compute(trainable: Leaves, frozen: Leaves, batch: dict[str, Any]) -> jax.Array:
        batch = jax.tree.map(lambda x: x[0], batch)
        return of_logits(logits_of(combine(graphdef, trainable, frozen), batch, None))

    widths = choose_widths(examples.lengths, 8, max_length)
    batches = Batches(examples, Buckets(examples.lengths, widths, min(batch_size, len(examples))), 1, pad_id)
    for batch in batches.buckets.in_order():
        for row, values in zip(
            batch.rows, np.asarray(compute(trainable, frozen, batches.collate(batch))), strict=False
        ):
            yield int(row), values  # the rest is padding
