# SPDX-License-Identifier: Apache-2.0
"""What an evaluation measures, task by task: sums over a batch, made on the device, and figures of all sums together.

No logits leave the device: a batch gives a few numbers, and where rows are classified the class of each.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._head import IGNORED
from .losses import Batch, lm_sums, logits_of, nll, qa_sums, seq2seq_sums

#: Longest answer that is looked for, in tokens.
LONGEST_ANSWER = 64


class Measure(NamedTuple):
    """How a task is measured.

    Attributes:
      sums: (model, batch, groups) -> arrays that are summed over batches, `loss` and `labels` among them; and
        `predicted`, `[rows]`, which is not.
      figures: (these sums) -> figures beside the loss.
    """

    sums: Callable[[Any, Batch, int], dict[str, jax.Array]]
    figures: Callable[[Mapping[str, Any]], dict[str, float]]


def _perplexity(sums: Mapping[str, Any]) -> dict[str, float]:
    return {"perplexity": math.exp(min(float(sums["loss"] / sums["labels"]), 700.0))}


def _lm(model: Any, batch: Batch, groups: int) -> dict[str, jax.Array]:
    loss, labels = lm_sums(model, batch, None, groups)
    return {"loss": loss, "labels": labels}


def _seq2seq(model: Any, batch: Batch, groups: int) -> dict[str, jax.Array]:
    loss, labels = seq2seq_sums(model, batch, None, groups)
    return {"loss": loss, "labels": labels}


def _classes(model: Any, batch: Batch, groups: int) -> dict[str, jax.Array]:
    """With the class of every row."""
    del groups  # few classes: all logits are computed
    logits = logits_of(model, batch, None)
    return {**_counts(logits, batch["labels"]), "predicted": jnp.argmax(logits, -1)}


def _tags(model: Any, batch: Batch, groups: int) -> dict[str, jax.Array]:
    del groups
    return _counts(logits_of(model, batch, None), batch["labels"])


def _counts(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """With the counts `[classes classes]` of which class was taken for which."""
    counted, size = labels != IGNORED, logits.shape[-1]
    truth = jax.nn.one_hot(jnp.where(counted, labels, size), size, dtype=jnp.float32).reshape(-1, size)
    taken = jax.nn.one_hot(jnp.argmax(logits, -1), size, dtype=jnp.float32).reshape(-1, size)
    return {"loss": nll(logits, labels), "labels": counted.sum(), "confusion": truth.T @ taken}


def scores(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, and macro-F1: the mean over the classes that occur of 2 TP / (2 TP + FP + FN).

    Args:
      confusion: `[classes classes]`: how often a class (row) was taken for which (column).
    """
    counts = np.asarray(confusion, np.float64)
    right, size = np.diag(counts), counts.sum(0) + counts.sum(1)
    occur = size > 0
    return {
        "accuracy": float(right.sum() / counts.sum()),
        "macro_f1": float((2 * right[occur] / size[occur]).mean()),
    }


def _spans(model: Any, batch: Batch, groups: int) -> dict[str, jax.Array]:
    """With how many answers are found exactly, and the sum of F1 over their tokens."""
    loss, labels = qa_sums(model, batch, None, groups)
    logits = logits_of(model, batch, None)  # [rows seq 2]
    seq = logits.shape[1]
    first, last = jnp.arange(seq)[:, None], jnp.arange(seq)[None]
    allowed = ((first <= last) & (last < first + LONGEST_ANSWER))[None]
    if "attention_mask" in batch:
        real = batch["attention_mask"][:, :seq] == 1
        allowed = allowed & real[:, :, None] & real[:, None, :]
    both = jnp.where(allowed, logits[:, :, None, 0] + logits[:, None, :, 1], -jnp.inf)
    best = jnp.argmax(both.reshape(len(logits), -1), axis=-1)
    found = jnp.stack([best // seq, best % seq], axis=-1)
    truth = batch["labels"]
    counted = (truth != IGNORED).all(axis=-1)
    shared = jnp.minimum(found[:, 1], truth[:, 1]) - jnp.maximum(found[:, 0], truth[:, 0]) + 1
    sizes = (found[:, 1] - found[:, 0] + 1) + (truth[:, 1] - truth[:, 0] + 1)
    overlap = 2 * jnp.maximum(shared, 0) / jnp.maximum(sizes, 1)
    return {
        "loss": loss,
        "labels": labels,
        "answers": counted.sum(),
        "exact": (counted & (found == truth).all(axis=-1)).sum(),
        "overlap": jnp.where(counted, overlap, 0.0).sum(),
    }


def _found(sums: Mapping[str, Any]) -> dict[str, float]:
    answers = float(sums["answers"])
    return {"exact_match": float(sums["exact"]) / answers, "f1": float(sums["overlap"]) / answers}


#: Of every task.
MEASURES: Mapping[str, Measure] = {
    "SEQ_CLS": Measure(_classes, lambda sums: scores(sums["confusion"])),
    "IMAGE_CLS": Measure(_classes, lambda sums: scores(sums["confusion"])),
    "TOKEN_CLS": Measure(_tags, lambda sums: scores(sums["confusion"])),
    "QUESTION_ANS": Measure(_spans, _found),
    "CAUSAL_LM": Measure(_lm, _perplexity),
    "SEQ_2_SEQ_LM": Measure(_seq2seq, _perplexity),
}


def measured_by(sums: Callable[..., Any]) -> Measure:
    """A loss's own figures, as those of preferences, over the labels that it counts."""

    def of_batch(model: Any, batch: Batch, groups: int) -> dict[str, jax.Array]:
        loss, labels, figures = sums(model, batch, None, groups)
        return {"loss": loss, "labels": labels, **figures}

    def figures(totals: Mapping[str, Any]) -> dict[str, float]:
        named = {name: value for name, value in totals.items() if name not in ("loss", "labels")}
        return {name: float(value / totals["labels"]) for name, value in named.items()}

    return Measure(of_batch, figures)
