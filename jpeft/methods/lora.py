# SPDX-License-Identifier: Apache-2.0
"""LoRA: a low-rank update beside a frozen projection (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = x W + b + s * drop(x) A B        A [d_in, rank], B [rank, d_out], s = alpha / rank

It starts as the base: B is zero (on an embedding A is, as its rows are read). With rsLoRA s = alpha / sqrt(rank)
(Kalajdzievski 2023). PiSSA and OLoRA start A and B from the kernel itself and subtract that start again,
`x W + s (x A B - x A0 B0)`, so the base stays as it is and leaving the adapter out gives it back, bit for bit.
LoRA+ is a higher rate for B, by labels: `jpeft.labels(trainable, {"**/B": "b", "**": "a"})`.

Ranks that differ between the layers of a stack are padded to the largest, and the padding is multiplied by zero.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import seams
from .._fields import Frozen, one_of, token_ids
from .._method import Adapter, Method, Site, Start, Targets, wide
from .._scope import fold_path
from .._text import check_gate, text_mean
from . import _low_rank


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation, with PEFT's meanings and defaults.

    Args:
      rank: inner size of A and B.
      alpha: the update is scaled by alpha / rank.
      targets: what to adapt: a regular expression for the whole name, a list of names or suffixes, `"all-linear"`, or
        None for the model type's default.
      dropout: probability of dropping an input of A while training; embeddings have none.
      rslora: scale by alpha / sqrt(rank) instead.
      init: `"default"` (A uniform in ±1/sqrt(d_in), B zero), `"gaussian"` (A normal, std 1/rank), `"orthogonal"` (A
        and B random with A B zero), `"pissa"`, `"olora"`.
      bias: `"none"`, `"lora_only"` (train the adapted projections' biases too) or `"all"`.
      rank_pattern, alpha_pattern: other ranks and alphas by name; the first key that matches the end of a name counts.
      gate: times a number per example, the mean over its text of sigmoid(x · w + b), as in UniPELT (Mao et al. 2022),
        with w, b trained at each place. (`adapters` leaves out alpha / rank then, and lets padding into the mean.)
      layers: indices of the layers to adapt; None for all.
      exclude: names left out of `targets`, by the same rules.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.
      trainable_token_indices: ids of tokens whose rows of the input's table are trained too; of other tables, a mapping
        of their names to ids. It is `jpeft.TrainableTokens` beside LoRA, under one name.

    Example:
      >>> jpeft.LoRA(rank=16, alpha=32, targets=["q_proj", "v_proj"], dropout=0.05)
    """

    kind: ClassVar[str] = "lora"
    grouped: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 8
    targets: Any = None
    dropout: float = 0.0
    rslora: bool = False
    init: str = "default"
    bias: str = "none"
    rank_pattern: Any = dataclasses.field(default_factory=Frozen)
    alpha_pattern: Any = dataclasses.field(default_factory=Frozen)
    gate: bool = False
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None
    trainable_token_indices: Any = None

    def __post_init__(self) -> None:
        _low_rank.check_factors(self)
        one_of("LoRA", "gate", self.gate, (True, False))
        object.__setattr__(self, "trainable_token_indices", _tables(self.trainable_token_indices))

    def select(self, model_type: str | None) -> Targets:
        return _low_rank.select(self, model_type, (*self.rank_pattern, *self.alpha_pattern))

    def beside(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        tables = self.trainable_token_indices
        if not isinstance(tables, Mapping):
            tables = {} if tables is None else {None: tables}
        return tuple(
            ("trainable_tokens", {"token_indices": ids, "targets": name and [name], "modules_to_save": ()})
            for name, ids in tables.items()
        )

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        if site.beside and (self.dropout or self.gate):
            option = f"dropout={self.dropout}" if self.dropout else "gate=True"
            raise ValueError(
                f"{site.path} are experts, which read the tokens that are sent to them in an order of their own; LoRA "
                f"has no {option} there (nor has PEFT). Adapt them by a LoRA without it, or exclude= them"
            )
        start = _low_rank.start(self, site, base, key)
        return Start({**start.trainable, **_gate(site, base, key)}, start.constants) if self.gate else start

    def start_shared(self, site: Site, model: Any, key: jax.Array) -> None:
        if self.gate:
            check_gate(model)

    def after(self, adapter: Any, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "..."]:
        a, b = self._running_factors(adapter)
        x, _ = _low_rank.dropped(adapter, base, inputs[0], self.dropout)
        delta = _low_rank.change(base, x, a, b)
        if self.gate:
            given = jnp.asarray(inputs[0]).astype(delta.dtype)
            score = seams.projection(base).contract(base, given, adapter.gate_weight[...])  # [..., 1]
            delta = delta * text_mean(jax.nn.sigmoid(score + adapter.gate_bias[...].reshape((1,) * score.ndim)))
        return (y + seams.projection(base).emit(base, delta)).astype(y.dtype)

    def attend(self, adapter: Adapter, base: Any, y: jax.Array, query: jax.Array) -> Float[Array, "..."]:
        a, b = self._running_factors(adapter)
        return (y + (query.astype(wide(query.dtype)) @ b.T) @ a.T).astype(y.dtype)

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        if self.gate:
            raise ValueError(
                f"{adapter.site.path}: a LoRA with gate=True weighs its update by what it reads, so it has no merged "
                "form; keep the adapter beside the base"
            )
        projection = seams.projection(base)
        a, b = _low_rank.factors(adapter, _low_rank.scale_of_all(adapter, self.table(adapter.site)))
        kernel = projection.read(base)
        merged = kernel.astype(wide(kernel.dtype)) + jnp.matmul(a, b, precision="highest")
        return {projection.kernel: projection.unmatrix(base, merged)}

    def factors(self, adapter: Any, base: Any) -> tuple[jax.Array, jax.Array] | None:
        return (
            None if self.gate else _low_rank.factors(adapter, _low_rank.scale_of_all(adapter, self.table(adapter.site)))
        )

    def padded(self, adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        return _low_rank.padded(self, adapter, shapes)

    def depends_on_layer(self, site: Site) -> bool:
        return self.dropout > 0 or not _low_rank.uniform(self.table(site))

    def count(self, site: Site) -> tuple[int, int]:
        gates = sum(site.active) * (site.d_in + 1) * self.gate
        return sum(self.ranks(site)) * (site.d_in + site.d_out) + gates, sum(site.active) * site.d_in * site.d_out

    def ranks(self, site: Site) -> tuple[int, ...]:
        """The rank in every layer; 0 where the layer is not adapted."""
        return _low_rank.ranks(self, site)

    def table(self, site: Site) -> np.ndarray:
        """`[layers, largest rank]`: the factor of every column of A, zero in the padding."""
        return _low_rank.table(self.ranks(site), _low_rank.scales(self, site))

    def _running_factors(self, adapter: Any) -> tuple[jax.Array, jax.Array]:
        return _low_rank.factors(adapter, _low_rank.running_scale(adapter, self.table(adapter.site)))


def _tables(tokens: Any) -> Any:
    """`trainable_token_indices` as it is kept: ids, or of every named table its ids; None for none.

    Raises:
      TypeError, ValueError: it is something else.
    """
    if not isinstance(tokens, Mapping):
        return None if tokens is None else token_ids("LoRA", tokens)
    if not tokens:
        raise ValueError("LoRA's trainable_token_indices names no table; leave it out to train no token")
    return Frozen({name: token_ids("LoRA", ids) for name, ids in tokens.items()})


def _gate(site: Site, base: Any, key: jax.Array) -> Mapping[str, jax.Array]:
    """First values of a gate: w normal with std 0.02 and b zero (of `adapters`, b uniform as torch's Linear)."""
    if not isinstance(seams.projection(base), seams.Matmul):
        raise ValueError(
            f"{site.path} is no matrix product of each token, and LoRA's gate reads one vector per token; leave it out "
            "of targets, or adapt it without gate="
        )
    weight = 0.02 * jax.random.normal(fold_path(key, "gate"), (*site.lead, site.d_in, 1))
    return {"gate_weight": weight, "gate_bias": jnp.zeros((*site.lead, 1))}
