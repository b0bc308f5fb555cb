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
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import seams
from .._fields import indices, names, one_of, rate, whole
from .._method import BIAS_CHOICES, Adapter, Frozen, Method, Site, Start, Targets, pattern_value, wide
from ._lora_start import STARTS

#: What PEFT adapts by default, by the model's type.
DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("q_proj", "v_proj")),
    "bert": ("query", "value"),
}


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
      layers: indices of the layers to adapt; None for all.
      exclude: names left out of `targets`, by the same rules.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.

    Example:
      >>> jpeft.LoRA(rank=16, alpha=32, targets=["q_proj", "v_proj"], dropout=0.05)
    """

    kind: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float = 8
    targets: Any = None
    dropout: float = 0.0
    rslora: bool = False
    init: str = "default"
    bias: str = "none"
    rank_pattern: Any = dataclasses.field(default_factory=Frozen)
    alpha_pattern: Any = dataclasses.field(default_factory=Frozen)
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        for field in ("targets", "exclude", "modules_to_save"):
            object.__setattr__(self, field, names(field, getattr(self, field)))
        object.__setattr__(self, "layers", indices(self.layers))
        object.__setattr__(self, "rank_pattern", Frozen(self.rank_pattern or {}))
        object.__setattr__(self, "alpha_pattern", Frozen(self.alpha_pattern or {}))
        for rank in (self.rank, *self.rank_pattern.values()):
            whole("LoRA", "rank", rank)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
                raise ValueError(f"LoRA's alpha must be a positive number (at 0 nothing is trained), got {alpha!r}")
        rate("LoRA", "dropout", self.dropout)
        one_of("LoRA", "init", self.init, STARTS)
        one_of("LoRA", "bias", self.bias, BIAS_CHOICES)
        if isinstance(self.targets, str) and self.targets != "all-linear" and self.layers is not None:
            raise ValueError("layers= picks among listed targets; with a regular expression, say the layers in it")

    def select(self, model_type: str | None) -> Targets:
        targets = self.targets
        if targets is None:
            if model_type is None or model_type not in DEFAULT_TARGETS:
                raise ValueError(
                    f"LoRA knows no default targets for model type {model_type!r} (it does for "
                    f"{', '.join(DEFAULT_TARGETS)}); pass targets="
                )
            targets = DEFAULT_TARGETS[model_type]
        patterns = (*self.rank_pattern, *self.alpha_pattern)
        return Targets(targets, self.exclude, self.layers, self.modules_to_save, self.bias, patterns)

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        start = STARTS[self.init](site, base, key, self.ranks(site), self.scales(site))
        dtype = wide(getattr(base, seams.projection(base).kernel).dtype)
        parts = (start.trainable, start.constants)
        return Start(*({name: leaf.astype(dtype) for name, leaf in leaves.items()} for leaves in parts))

    def after(self, adapter: Adapter, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "..."]:
        projection = seams.projection(base)
        x, scale = jnp.asarray(inputs[0]), self._running_scale(adapter)
        if not isinstance(projection, seams.Lookup):
            x = adapter.dropout(x.astype(wide(x.dtype)), self.dropout)
        delta = _difference(
            adapter, lambda a, b: seams.rows_times(projection.contract(base, x, a * scale), b)
        )  # [..., d_out]
        return (y + projection.emit(base, delta)).astype(y.dtype)

    def attend(self, adapter: Adapter, base: Any, y: jax.Array, query: jax.Array) -> Float[Array, "..."]:
        query, scale = query.astype(wide(query.dtype)), self._running_scale(adapter)
        return (y + _difference(adapter, lambda a, b: (query @ b.T) @ (a * scale).T)).astype(y.dtype)

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        projection = seams.projection(base)
        scale = self._scale(adapter)[..., None, :]
        delta = _difference(adapter, lambda a, b: jnp.matmul(a * scale, b, precision="highest"))
        kernel = projection.read(base)
        return {projection.kernel: projection.unmatrix(base, kernel.astype(wide(kernel.dtype)) + delta)}

    def factors(self, adapter: Any, base: Any) -> tuple[jax.Array, jax.Array]:
        a, b = adapter.A[...] * self._scale(adapter)[..., None, :], adapter.B[...]
        if not hasattr(adapter, "A0"):
            return a, b
        a0 = adapter.A0[...] * self._scale(adapter)[..., None, :]
        return jnp.concatenate([a, -a0], -1), jnp.concatenate([b, adapter.B0[...]], -2)

    def padded(self, adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        scale, rank = self._scale(adapter), shapes["A"][-1]
        padding = [(0, 0)] * (scale.ndim - 1) + [(0, rank - scale.shape[-1])]
        plain = dataclasses.replace(
            self, rank=rank, alpha=rank, rslora=False, init="default", rank_pattern={}, alpha_pattern={}
        )
        return plain, {"scale": jnp.pad(scale, padding)}

    def depends_on_layer(self, site: Site) -> bool:
        return self.dropout > 0 or not _uniform(self.table(site))

    def count(self, site: Site) -> tuple[int, int]:
        trained = sum(self.ranks(site)) * (site.d_in + site.d_out)
        return trained, sum(site.active) * site.d_in * site.d_out

    def ranks(self, site: Site) -> tuple[int, ...]:
        """The rank in every layer; 0 where the layer is not adapted."""
        named = (pattern_value(self.rank_pattern, name, self.rank) for name in site.names)
        return tuple(rank if acts else 0 for rank, acts in zip(named, site.active, strict=True))

    def scales(self, site: Site) -> tuple[float, ...]:
        """The factor s in every layer; 0 where the layer is not adapted."""
        alphas = (pattern_value(self.alpha_pattern, name, self.alpha) for name in site.names)
        roots = ((math.sqrt(rank) if self.rslora else rank) for rank in self.ranks(site))
        return tuple(alpha / root if root else 0.0 for alpha, root in zip(alphas, roots, strict=True))

    def table(self, site: Site) -> np.ndarray:
        """`[layers, largest rank]`: the factor of every column of A, zero in the padding."""
        ranks, scales = np.array(self.ranks(site)), np.array(self.scales(site))
        return np.where(np.arange(ranks.max()) < ranks[:, None], scales[:, None], 0.0)

    def _scale(self, adapter: Any) -> Float[Array, "..."]:
        """`[*lead, rank]`: the factor of every column of A, in all layers."""
        if hasattr(adapter, "scale"):
            return adapter.scale[...]
        return jnp.asarray(self.table(adapter.site), adapter.A.dtype).reshape(*adapter.site.lead, -1)

    def _running_scale(self, adapter: Any) -> Any:
        if hasattr(adapter, "scale"):  # a slot of a bank
            return adapter.scale[...][None]
        table = self.table(adapter.site)
        if _uniform(table):
            return float(table[0, 0])
        return jnp.asarray(table, adapter.A.dtype)[adapter.layer][None]  # [1, rank]


def _difference(adapter: Any, product: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """`product` of A and B, less that of the start where there is one; exactly zero while they are equal."""
    delta = product(adapter.A[...], adapter.B[...])
    return delta - product(adapter.A0[...], adapter.B0[...]) if hasattr(adapter, "A0") else delta


def _uniform(table: np.ndarray) -> bool:
    return bool((table == table[0, 0]).all())
