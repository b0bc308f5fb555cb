# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: a rank for every matrix, found in training (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

    y = x W + b + s * (drop(x) A * E) B        A [d_in, rank], E [rank], B [rank, d_out], s = alpha / (init_rank + 1e-5)

E starts at zero, A and B normal with standard deviation 0.02. Every matrix starts with `init_rank` triplets (a column
of A, an entry of E, a row of B). While the budget shrinks to `target_rank` a matrix on average, along a cubic from
update `tinit` to update `total_steps - tfinal`, the triplets of least importance lose their entry of E.

All of this happens in the optimizer, `jpeft.optimizer(tx, model=model)`: see `_rank_allocation`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import seams
from .._fields import extent, number, positive, whole
from .._method import Adapter, Method, Site, Start, Steering, Targets, wide
from .._scope import fold_path
from . import _low_rank
from ._lora_start import per_layer
from ._rank_allocation import Allocation


@dataclasses.dataclass(frozen=True)
class AdaLoRA(Method):
    """Low-rank adaptation whose ranks are allocated by importance, with PEFT's meanings and defaults.

    Train it by `jpeft.optimizer(tx, model=model)`, which does all of it; the program `jpeft train` does so by itself.

    Args:
      init_rank: triplets of every matrix at the start.
      target_rank: triplets of a matrix in the end, on average.
      alpha: the update is scaled by alpha / init_rank.
      targets: what to adapt; as of `LoRA`.
      dropout: probability of dropping an input of A while training; embeddings have none.
      beta1, beta2: of the averages of sensitivity and of its uncertainty.
      tinit: updates before the first allocation.
      tfinal: updates after the last one.
      delta_t: updates from one allocation to the next.
      total_steps: updates of the whole training; it must be given.
      orth_reg_weight: of the regularizer.
      bias: `"none"`, `"lora_only"` (train the adapted projections' biases too) or `"all"`.
      layers: indices of the layers to adapt; None for all.
      exclude: names left out of `targets`, by the same rules.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.

    Example:
      >>> jpeft.AdaLoRA(init_rank=12, target_rank=8, alpha=32, tinit=200, tfinal=500, delta_t=10, total_steps=3000)
    """

    kind: ClassVar[str] = "adalora"

    init_rank: int = 12
    target_rank: int = 8
    alpha: float = 8
    targets: Any = None
    dropout: float = 0.0
    beta1: float = 0.85
    beta2: float = 0.85
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    total_steps: int | None = None
    orth_reg_weight: float = 0.5
    bias: str = "none"
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        _low_rank.check_selection(self)
        positive("AdaLoRA", "alpha", self.alpha)
        for field, least in (("init_rank", 1), ("target_rank", 1), ("tinit", 0), ("tfinal", 0), ("delta_t", 1)):
            whole("AdaLoRA", field, getattr(self, field), least)
        if self.total_steps is None:
            raise ValueError("AdaLoRA plans its budget over the whole training: pass total_steps=, its updates")
        extent("AdaLoRA", "init_rank", self.init_rank)
        whole("AdaLoRA", "total_steps", self.total_steps)
        if self.target_rank > self.init_rank:
            raise ValueError(
                f"AdaLoRA's ranks only shrink: target_rank {self.target_rank} is over init_rank {self.init_rank}"
            )
        if self.tinit >= self.total_steps - self.tfinal:
            raise ValueError(
                f"AdaLoRA has no update to allocate in: tinit={self.tinit} and tfinal={self.tfinal} take up all "
                f"{self.total_steps} of total_steps"
            )
        for field in ("beta1", "beta2"):
            if not 0 < number("AdaLoRA", field, getattr(self, field)) < 1:
                raise ValueError(f"AdaLoRA's {field} must be in (0, 1), got {getattr(self, field)!r}")
        if not 0 <= number("AdaLoRA", "orth_reg_weight", self.orth_reg_weight) < float("inf"):
            raise ValueError(f"AdaLoRA's orth_reg_weight must be a number of at least 0, got {self.orth_reg_weight!r}")

    def select(self, model_type: str | None) -> Targets:
        return _low_rank.select(self, model_type)

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        ranks, std = self.ranks(site), 0.02
        key_a, key_b = fold_path(key, "A"), fold_path(key, "B")
        a = per_layer(site, key_a, ranks, lambda k, r: std * jax.random.normal(k, (site.d_in, r)), axis=-1)
        b = per_layer(site, key_b, ranks, lambda k, r: std * jax.random.normal(k, (r, site.d_out)), axis=-2)
        dtype = wide(getattr(base, seams.projection(base).kernel).dtype)
        leaves = {"A": a, "E": jnp.zeros((*site.lead, self.init_rank)), "B": b}
        return Start({name: leaf.astype(dtype) for name, leaf in leaves.items()})

    def after(self, adapter: Adapter, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "..."]:
        a, b = self._running_factors(adapter)
        x, _ = _low_rank.dropped(adapter, base, inputs[0], self.dropout)
        return (y + seams.projection(base).emit(base, _low_rank.change(base, x, a, b))).astype(y.dtype)

    def attend(self, adapter: Adapter, base: Any, y: jax.Array, query: jax.Array) -> Float[Array, "..."]:
        a, b = self._running_factors(adapter)
        return (y + (query.astype(wide(query.dtype)) @ b.T) @ a.T).astype(y.dtype)

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        projection = seams.projection(base)
        scale = _low_rank.scale_of_all(adapter, self.table(adapter.site)) * adapter.E[...][..., None, :]
        kernel = projection.read(base)
        change = jnp.matmul(adapter.A[...] * scale, adapter.B[...], precision="highest")
        return {projection.kernel: projection.unmatrix(base, kernel.astype(wide(kernel.dtype)) + change)}

    def depends_on_layer(self, site: Site) -> bool:
        return self.dropout > 0 or not all(site.active)

    def count(self, site: Site) -> tuple[int, int]:
        trained = sum(self.ranks(site)) * (site.d_in + site.d_out + 1)
        return trained, sum(site.active) * site.d_in * site.d_out

    def ranks(self, site: Site) -> tuple[int, ...]:
        """The rank that every layer starts with; 0 where the layer is not adapted."""
        return tuple(self.init_rank * acts for acts in site.active)

    def table(self, site: Site) -> np.ndarray:
        """`[layers, init_rank]`: the factor of every triplet, zero in layers that are not adapted."""
        return _low_rank.table(self.ranks(site), tuple(self.alpha / (self.init_rank + 1e-5) for _ in site.names))

    def _running_factors(self, adapter: Any) -> tuple[jax.Array, jax.Array]:
        scale = _low_rank.running_scale(adapter, self.table(adapter.site)) * adapter.E[...][None]  # [1, rank]
        return adapter.A[...] * scale, adapter.B[...]

    def steer(self, adapters: Mapping[str, Adapter]) -> Steering:
        allocation = Allocation(self, {path: adapter.site for path, adapter in adapters.items()})
        return Steering(allocation.init, allocation.gradients, allocation.updates)
