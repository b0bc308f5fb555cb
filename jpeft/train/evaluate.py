# SPDX-License-Identifier: Apache-2.0
"""How well a model does: loss with accuracy and macro-F1, or with perplexity; and what it says about new texts."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .._partition import GraphDef, Leaves, combine, partition
from . import devices
from .buckets import Buckets, choose_widths
from .data import IGNORED, Batches, Examples
from .losses import lm_sums, logits_of, nll
from .tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures, and for classification the class predicted for every example, in their order."""

    metrics: dict[str, float]
    predicted: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A text's most probable label."""

    text: str
    label: str
    probability: float


class Evaluator:
    """Evaluates one model structure for one task, compiled once per width of batch.

    Args:
      graphdef: of `jpeft.partition`.
      task: `SEQ_CLS` or `CAUSAL_LM`.
      mesh: where the arrays lie.
    """

    def __init__(self, graphdef: GraphDef, task: str, mesh: Mesh | None = None):
        self._classify = task == "SEQ_CLS"
        self._mesh = mesh
        outcome = _class_outcome if self._classify else _lm_outcome
        groups = devices.num_groups(mesh)

        def compute(trainable: Leaves, frozen: Leaves, batch: dict[str, Any]) -> dict[str, Any]:
            return outcome(combine(graphdef, trainable, frozen), jax.tree.map(lambda x: x[0], batch), groups)

        self._compute = jax.jit(compute, out_shardings=devices.whole(mesh))

    def __call__(self, trainable: Leaves, frozen: Leaves, batches: Batches) -> Evaluation:
        """Evaluates every example once.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        order = batches.buckets.in_order()
        outcomes = [
            self._compute(trainable, frozen, devices.place(batches.collate(batch), self._mesh)) for batch in order
        ]
        outcomes = [jax.tree.map(np.asarray, outcome) for outcome in outcomes]
        loss = float(sum(o["loss"] for o in outcomes) / sum(o["labels"] for o in outcomes))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of the evaluation is {loss}")
        if not self._classify:
            return Evaluation({"loss": loss, "perplexity": math.exp(min(loss, 700.0))})
        predicted = np.empty(len(batches.examples.tokens), np.int32)
        for batch, outcome in zip(order, outcomes, strict=True):
            predicted[batch.rows] = outcome["predicted"][: len(batch.rows)]
        return Evaluation({"loss": loss, **scores(np.array(batches.examples.labels), predicted)}, predicted)


def scores(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, and macro-F1: the mean over the classes that occur of 2 TP / (2 TP + FP + FN)."""
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
    }


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
    graphdef, trainable, frozen = partition(model)

    @jax.jit
    def probabilities(trainable: Leaves, frozen: Leaves, batch: dict[str, Any]) -> jax.Array:
        batch = jax.tree.map(lambda x: x[0], batch)
        return jax.nn.softmax(logits_of(combine(graphdef, trainable, frozen), batch, None))

    ids, lost = tokenizer.cut(texts, max_length)
    tokens, labels = [np.asarray(row, np.int32) for row in ids], [np.asarray(IGNORED, np.int32)] * len(ids)
    examples = Examples(tokens, labels, len(ids), sum(n > 0 for n in lost), sum(lost), 0, {})
    widths = choose_widths(examples.lengths, 8, max_length)
    batches = Batches(examples, Buckets(examples.lengths, widths, min(batch_size, len(ids))), 1, tokenizer.pad_id)
    found: dict[int, Prediction] = {}
    for batch in batches.buckets.in_order():
        rows = np.asarray(probabilities(trainable, frozen, batches.collate(batch)))
        for row, p in zip(batch.rows, rows, strict=False):  # the rest is padding
            found[int(row)] = Prediction(texts[int(row)], names[int(p.argmax())], float(p.max()))
    return [found[i] for i in range(len(texts))]


def _class_outcome(model: Any, batch: dict[str, Any], groups: int) -> dict[str, Any]:
    del groups
    logits, labels = logits_of(model, batch, None), batch["labels"]
    return {"loss": nll(logits, labels), "labels": (labels != IGNORED).sum(), "predicted": jnp.argmax(logits, -1)}


def _lm_outcome(model: Any, batch: dict[str, Any], groups: int) -> dict[str, Any]:
    loss, labels = lm_sums(model, batch, None, groups)
    return {"loss": loss, "labels": labels}
