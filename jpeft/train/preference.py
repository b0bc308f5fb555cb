# SPDX-License-Identifier: Apache-2.0
"""Preference tuning: of two answers to a prompt, the chosen one is to become likelier than the rejected one.

Rows come in pairs, chosen and rejected in turn. With the log-probabilities of their labelled tokens under the adapted
model and under the reference, and delta = (chosen - its reference) - (rejected - its reference), a pair's loss is

  sigmoid  -(1 - e) log s(beta delta) - e log s(-beta delta)    DPO (Rafailov et al. 2023); e > 0 is cDPO (Mitchell)
  ipo      (delta - 1 / (2 beta))^2, of log-probabilities a token    IPO (Azar et al. 2023)
  hinge    max(0, 1 - beta delta)    SLiC (Zhao et al. 2023)

with s the logistic function. The reference is the base with the adapter left out: the same frozen leaves, quantized or
not, so it costs a forward pass and no memory; or its log-probabilities are computed once and come with the batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from .._adapt import strip
from .._partition import GraphDef, Leaves, combine
from . import devices
from ._head import IGNORED
from .batches import Batches
from .losses import Batch, Measured, lm_log_probs
from .sections import Preference

#: Entry of a batch that holds the reference's log-probabilities, `[rows]`; without it they are computed.
REFERENCE = "reference"


@dataclasses.dataclass(frozen=True)
class PreferenceSums:
    """The sums of a preference loss over the pairs of a batch, and what is measured beside it.

    The figures are sums over pairs of: `rewards_chosen` and `rewards_rejected` (beta times log-probability above the
    reference's), `margin` between the two, and `accuracy`: whether the chosen one's is the higher.

    Args:
      options: which loss.

    Raises:
      ValueError: an odd number of rows; rows that are packed.

    Example:
      >>> update = make_step(graphdef, PreferenceSums(Preference(beta=0.1)), tx)
    """

    options: Preference

    def __call__(self, model: Any, batch: Batch, key: jax.Array | None = None, groups: int = 1) -> Measured:
        labels = batch["labels"]
        if len(labels) % 2:
            raise ValueError(f"rows are chosen and rejected answers in turn; got {len(labels)} rows, an odd number")
        reference = batch[REFERENCE] if REFERENCE in batch else reference_log_probs(model, batch, groups)
        gains = lm_log_probs(model, batch, key, groups) - reference
        counts = (labels[:, 1:] != IGNORED).sum(axis=1)
        if self.options.loss == "ipo":
            gains = gains / jnp.maximum(counts, 1)
        chosen, rejected = gains[0::2], gains[1::2]
        counted = (counts.reshape(-1, 2) > 0).all(axis=1)
        chosen, rejected = jnp.where(counted, chosen, 0.0), jnp.where(counted, rejected, 0.0)
        beta = self.options.beta
        figures = {
            "rewards_chosen": beta * chosen,
            "rewards_rejected": beta * rejected,
            "margin": beta * (chosen - rejected),
            "accuracy": chosen > rejected,
        }
        losses = jnp.where(counted, preference_losses(chosen - rejected, self.options), 0.0)
        sums = {name: jax.lax.stop_gradient(value).sum().astype(jnp.float32) for name, value in figures.items()}
        return losses.sum(), counted.sum().astype(jnp.float32), sums


def preference_losses(delta: Float[Array, " pairs"], options: Preference) -> Float[Array, " pairs"]:
    """The loss of every pair; see this file's head for the formulas."""
    scaled = options.beta * delta
    if options.loss == "ipo":
        return (delta - 1 / (2 * options.beta)) ** 2
    if options.loss == "hinge":
        return jax.nn.relu(1 - scaled)
    smoothing = options.label_smoothing
    return -(1 - smoothing) * jax.nn.log_sigmoid(scaled) - smoothing * jax.nn.log_sigmoid(-scaled)


def reference_log_probs(model: Any, batch: Batch, groups: int = 1) -> Float[Array, " rows"]:
    """`lm_log_probs` of the base of an adapted model, without dropout and without a gradient."""
    return jax.lax.stop_gradient(lm_log_probs(strip(model), batch, None, groups))


def with_reference(
    batches: Batches, graphdef: GraphDef, trainable: Leaves, frozen: Leaves, mesh: Mesh | None
) -> Batches:
    """The same batches with the reference's log-probabilities beside every row, computed once."""

    def compute(trainable: Leaves, frozen: Leaves, batch: dict[str, Any]) -> jax.Array:
        model = combine(graphdef, trainable, frozen)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        return reference_log_probs(model, flat, devices.num_groups(mesh))

    compiled, examples = jax.jit(compute, out_shardings=devices.whole(mesh)), batches.examples
    found = np.zeros(len(examples.tokens), np.float32)
    for batch in batches.buckets.in_order():
        rows = np.asarray(compiled(trainable, frozen, devices.place(batches.collate(batch), mesh)))
        rows = rows.reshape(-1, examples.per_example)[: len(batch.rows)]
        found.reshape(-1, examples.per_example)[np.asarray(batch.rows)] = rows
    return dataclasses.replace(batches, beside={REFERENCE: found})
