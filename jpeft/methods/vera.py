# SPDX-License-Identifier: Apache-2.0
"""VeRA: two trained vectors around random projections that all places share (Kopiczko et al. 2023,
https://arxiv.org/abs/2310.11454).

    y = x W + b + ((drop(x) A) * d) B * b        A [d_in, rank], d [rank], B [rank, d_out], b [d_out]

A and B are random, frozen, and kept once, at the model's root, as large as the largest place needs; every place reads
the first d_in rows of A and the first d_out columns of B. It starts as the base: b is zero, and d is `d_initial`.

They are drawn from `projection_key` alone, not from the key of `adapt`: so the vectors are all that an adapter is, and
two adapters of one rank whose largest sizes agree have the same A and B, which are also those that PEFT draws.

This is the paper's method and PEFT's. What AdapterHub's adapters calls VeRA trains dense matrices in the place of d and
b.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _mersenne, seams
from .._fields import extent, rate, selection, whole
from .._method import Method, Site, Start, Targets, wide
from .._stream import everywhere
from ._default_targets import default_targets


@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """Vector-based random matrix adaptation, with PEFT's meanings and defaults.

    Not on an embedding: the shared A would have a row for every word.

    Args:
      rank: inner size of A and B; they are not trained, so it is much larger than LoRA's.
      targets: what to adapt: a regular expression for the whole name, a list of names or suffixes, `"all-linear"`, or
        None for the model type's default.
      dropout: probability of dropping an input of A while training.
      d_initial: first value of every entry of d.
      projection_key: seed of A and B, as PEFT's `projection_prng_key`: the numbers are those of torch's generator.
      layers: indices of the layers to adapt; None for all.
      exclude: names left out of `targets`, by the same rules.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.

    Example:
      >>> jpeft.VeRA(rank=256, targets=["q_proj", "v_proj"])
    """

    kind: ClassVar[str] = "vera"

    rank: int = 256
    targets: Any = None
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_key: int = 0
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        selection(self)
        extent("VeRA", "rank", self.rank)
        whole("VeRA", "projection_key", self.projection_key, least=0)
        rate("VeRA", "dropout", self.dropout)
        d = self.d_initial
        if not isinstance(d, (int, float)) or isinstance(d, bool) or d == 0 or not math.isfinite(d):
            raise ValueError(f"VeRA's d_initial must be a number other than 0 (at 0 nothing is trained), got {d!r}")

    def select(self, model_type: str | None) -> Targets:
        targets = default_targets("VeRA", self.targets, model_type)
        return Targets(targets, self.exclude, self.layers, self.modules_to_save)

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        if isinstance(seams.projection(base), seams.Lookup):
            raise ValueError(
                f"{site.path} is an embedding, and VeRA's shared A would get a row for each of its {site.d_in} words; "
                "adapt it by LoRA or LoHa"
            )
        dtype = wide(getattr(base, seams.projection(base).kernel).dtype)
        d = jnp.full((*site.lead, self.rank), self.d_initial, dtype)
        return Start({"d": d, "b": jnp.zeros((*site.lead, site.d_out), dtype)})

    def start_shared(self, site: Site, model: Any, key: jax.Array) -> Start:
        """A uniform in ±sqrt(6 / its rows), B in ±sqrt(6 / rank) (kaiming); `key` plays no part."""
        d_in, d_out = (max(getattr(member, size) for member in site.members) for size in ("d_in", "d_out"))

        draws = (math.sqrt(6 / d_in), (self.rank, d_in)), (math.sqrt(6 / self.rank), (d_out, self.rank))
        a, b = _mersenne.uniforms(self.projection_key, *draws)
        return Start({}, {"A": jnp.asarray(a.T), "B": jnp.asarray(b.T)})

    def after(self, adapter: Any, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "..."]:
        projection, x = seams.projection(base), jnp.asarray(inputs[0])
        x = adapter.dropout(x.astype(wide(x.dtype)), self.dropout)
        hidden = projection.contract(base, x, everywhere(adapter.shared.A[...])[: adapter.site.d_in])
        d = adapter.d[...] if all(adapter.site.active) else _where(adapter, adapter.d[...])
        delta = seams.rows_times(_scaled(hidden, d), everywhere(adapter.shared.B[...])[:, : adapter.site.d_out])
        delta = _scaled(delta, adapter.b[...])  # [..., d_out]
        return (y + projection.emit(base, delta)).astype(y.dtype)

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        projection, site = seams.projection(base), adapter.site
        acts = jnp.array(site.active).reshape(*site.lead, 1)
        d, b = jnp.where(acts, adapter.d[...], 0), adapter.b[...]
        a, c = adapter.shared.A[...][: site.d_in], adapter.shared.B[...][:, : site.d_out]
        delta = jnp.einsum("ir,...r,ro,...o->...io", a, d, c, b, precision="highest")
        kernel = projection.read(base)
        return {projection.kernel: projection.unmatrix(base, kernel.astype(wide(kernel.dtype)) + delta)}

    def depends_on_layer(self, site: Site) -> bool:
        return self.dropout > 0 or not all(site.active)

    def count(self, site: Site) -> tuple[int, int]:
        places = sum(site.active)
        return places * (self.rank + site.d_out), places * site.d_in * site.d_out


def _where(adapter: Any, d: jax.Array) -> jax.Array:
    """`d` in a layer that is adapted, 0 in one that is not."""
    return jnp.where(jnp.array(adapter.site.active)[adapter.layer], d, 0)


def _scaled(x: jax.Array, vector: jax.Array) -> jax.Array:
    return x * vector.reshape((1,) * (x.ndim - 1) + (-1,))
