# SPDX-License-Identifier: Apache-2.0
"""What a model does with every example of a set: classes with their probabilities, or losses by text."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._partition import GraphDef, Leaves, combine, partition
from ..feed import Feed
from ..losses import lm_sums, logits_of
from ..sections.model import NAMING
from .outcomes import Classes, Outcome, Texts


def judge(model: Any, batches: Feed) -> Outcome:
    """The outcome of a `SEQ_CLS`, `IMAGE_CLS` or `CAUSAL_LM` model on all examples, in their order.

    Raises:
      FloatingPointError: an answer is not finite.
    """
    graphdef, trainable, frozen = partition(model)
    answer = _probabilities if model.task in NAMING else _losses
    rows: dict[int, np.ndarray] = {}
    for batch in batches.buckets.in_order():
        answers = np.asarray(_answers(answer, graphdef, trainable, frozen, batches.collate(batch)))
        rows.update(zip(np.asarray(batch.rows).tolist(), answers, strict=False))  # the rest is padding
    found = np.stack([rows[i] for i in range(len(rows))])
    if not np.isfinite(found).all():
        raise FloatingPointError(f"{(~np.isfinite(found)).any(1).sum()} of {len(found)} answers are not finite")
    if model.task in NAMING:
        truth = np.array(batches.examples.labels)
        return Classes(truth, found.argmax(1), found.max(1), found.shape[1])
    return Texts(found[:, 0].astype(float), found[:, 1].astype(np.int64))


@functools.partial(jax.jit, static_argnums=(0, 1))  # compiled once for all models of one make
def _answers(
    answer: Callable[..., jax.Array], graphdef: GraphDef, trainable: Leaves, frozen: Leaves, batch: Any
) -> jax.Array:
    return answer(combine(graphdef, trainable, frozen), jax.tree.map(lambda x: x[0], batch))


def _probabilities(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return jax.nn.softmax(logits_of(model, batch, None).astype(jnp.float32))


def _losses(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """`[rows, 2]`: the sum of a text's losses, and the number of its predicted tokens."""

    return jax.vmap(lambda row: jnp.stack(lm_sums(model, jax.tree.map(lambda x: x[None], row))))(batch)
