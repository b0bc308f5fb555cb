# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's share in an update: its regularizer's gradient, the importance of every triplet, and which of them go.

Updates are numbered from 1, as in PEFT's `update_and_allocate(number)`, which does the same after `optimizer.step()`:

  - The regularizer's gradient joins the given one; it depends on A and B alone, so it need not be in the loss. Of
    n matrices it is `orth_reg_weight / (2 n)` times the sum of the norms of A^T A - 1 and of B B^T - 1. So do PEFT and
    the paper's own code; the paper writes the squares of the norms, and no mean.
  - Importance follows the updated values p and these gradients g: |p g| is averaged (beta1), and so is its distance
    from that average (beta2); the product of both is an entry's. A triplet has that of its entry of E, plus the
    means over its column of A and its row of B. It is learned until the last allocation, at `total_steps - tfinal`.
  - At an allocation, as many triplets as are over the budget get E = 0, those of least importance. Between two
    allocations E is free again; after the last one the dropped stay at zero.

Of equally important triplets the first go, so that the budget is met; PEFT drops all of them. The paper's cubic does
not end at the target; the one here is that of its code and of PEFT.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._method import Site

Leaves = dict[str, jax.Array]


class State(NamedTuple):
    """What is known between two updates.

    Attributes:
      number: of updates so far.
      sensitivity, uncertainty: averages by path, shaped as the leaves.
      kept: by the path of E, the triplets that the last allocation kept.
      regularizer: its value before the last update, weight included.
    """

    number: Int[Array, ""]
    sensitivity: Leaves
    uncertainty: Leaves
    kept: Leaves
    regularizer: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The budget of one AdaLoRA adapter, over all its places.

    Attributes:
      method: the `AdaLoRA`.
      sites: by the path in front of the leaves' names.
    """

    method: Any
    sites: Mapping[str, Site]

    def init(self, trainable: Leaves) -> State:
        """The state before the first update."""
        zeros = {path: jnp.zeros_like(trainable[path]) for path in self._paths("AEB")}
        kept = {path: jnp.ones(trainable[path].shape, bool) for path in self._paths("E")}
        return State(jnp.int32(0), zeros, dict(zeros), kept, jnp.float32(0))

    def gradients(self, gradients: Leaves, state: State, trainable: Leaves) -> tuple[Leaves, State]:
        """The gradients with the regularizer's added."""
        own = {path: trainable[path] for path in self._paths("AB")}
        value, slopes = jax.value_and_grad(self.regularizer)(own)
        added = {path: gradients[path] + slope for path, slope in slopes.items()}
        return {**gradients, **added}, state._replace(regularizer=value.astype(jnp.float32))

    def updates(self, updates: Leaves, gradients: Leaves, state: State, trainable: Leaves) -> tuple[Leaves, State]:
        """The updates, with those of E such that dropped triplets end at zero."""
        state = self._learn(updates, gradients, state, trainable)
        number, last = state.number, self._last
        between = (number > self.method.tinit) & (number < last) & (number % self.method.delta_t == 0)
        allocates = between | (number == last)
        kept = {path: jnp.where(allocates, new, state.kept[path]) for path, new in self._best(state).items()}
        drops = allocates | (number > last)
        changed = {path: jnp.where(drops & ~kept[path], -trainable[path], updates[path]) for path in kept}
        return {**updates, **changed}, state._replace(kept=kept)

    def regularizer(self, trainable: Leaves) -> Float[Array, ""]:
        """How far A and B are from orthogonal, weight included."""
        total = jnp.zeros(())
        for path, site in self.sites.items():
            a, b = trainable[f"{path}/A"], trainable[f"{path}/B"]
            grams = (
                jnp.einsum("...ir,...iq->...rq", a, a, precision="highest"),
                jnp.einsum("...ro,...qo->...rq", b, b, precision="highest"),
            )
            for gram in grams:
                square = jnp.square(gram - jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)).sum((-1, -2))
                counts = _active(site) & (square > 0)
                total += jnp.where(counts, jnp.sqrt(jnp.where(counts, square, 1)), 0).sum()
        return self.method.orth_reg_weight * total / (2 * self._matrices)

    def surplus(self, number: Any) -> Int[Array, ""]:
        """How many triplets are over the budget at this update."""
        return (jnp.asarray(self._departures, jnp.int32) <= number).sum()

    @property
    def _last(self) -> int:
        return self.method.total_steps - self.method.tfinal

    @property
    def _matrices(self) -> int:
        return sum(sum(site.active) for site in self.sites.values())

    @functools.cached_property
    def _departures(self) -> np.ndarray:
        """The update at which the budget shrinks below the first, second, ... triplet; in float64, as PEFT has it."""
        first, target = (rank * self._matrices for rank in (self.method.init_rank, self.method.target_rank))
        left = 1 - (np.arange(self._last + 1) - self.method.tinit) / (self._last - self.method.tinit)
        budget = ((first - target) * np.clip(left, 0, 1) ** 3 + target).astype(int)
        return np.searchsorted(first - budget, np.arange(1, first - target + 1))

    def _learn(self, updates: Leaves, gradients: Leaves, state: State, trainable: Leaves) -> State:
        """The state after the update, with the averages that follow it."""
        number, (one, two) = state.number + 1, (self.method.beta1, self.method.beta2)
        sensitivity, uncertainty = {}, {}
        for path in state.sensitivity:
            now = jnp.abs((trainable[path] + updates[path]) * gradients[path])
            mean = one * state.sensitivity[path] + (1 - one) * now
            spread = two * state.uncertainty[path] + (1 - two) * jnp.abs(now - mean)
            sensitivity[path] = jnp.where(number < self._last, mean, state.sensitivity[path])
            uncertainty[path] = jnp.where(number < self._last, spread, state.uncertainty[path])
        return state._replace(number=number, sensitivity=sensitivity, uncertainty=uncertainty)

    def _best(self, state: State) -> dict[str, jax.Array]:
        """By the path of E, which triplets are within the budget."""
        scores = {f"{path}/E": self._importance(path, site, state) for path, site in self.sites.items()}
        order = jnp.argsort(jnp.concatenate([score.ravel() for score in scores.values()]))
        kept = jnp.zeros(order.shape, bool).at[order].set(jnp.arange(order.size) >= self.surplus(state.number))
        ends = np.cumsum([score.size for score in scores.values()])[:-1]
        parts = zip(scores.items(), jnp.split(kept, ends), strict=True)
        return {path: part.reshape(score.shape) for (path, score), part in parts}

    def _importance(self, path: str, site: Site, state: State) -> Float[Array, "*lead rank"]:
        """Of every triplet; infinite in layers that are not adapted."""
        a, e, b = (state.sensitivity[f"{path}/{leaf}"] * state.uncertainty[f"{path}/{leaf}"] for leaf in "AEB")
        return jnp.where(_active(site)[..., None], e + a.mean(-2) + b.mean(-1), jnp.inf)

    def _paths(self, leaves: str) -> list[str]:
        return [f"{path}/{leaf}" for path in self.sites for leaf in leaves]


def _active(site: Site) -> np.ndarray:
    """`[*lead]`, where the adapter acts."""
    return np.array(site.active).reshape(site.lead)
