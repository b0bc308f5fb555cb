# SPDX-License-Identifier: Apache-2.0
"""DoRA: LoRA with a trained length for every column of the kernel (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    y = b + f * (x W + s * drop(x) A B)        f = m / ||W + s A B||, of each of the d_out columns

m `[d_out]` starts at the norm of W's columns, so that it starts as the base, bit for bit. As in the paper (section 4.3)
and in PEFT the norm counts as a constant in the backward pass. While dropout is on, what f adds to x W is computed of
the dropped x as well, as in PEFT: y = b + x W + (f - 1) drop(x) W + f s drop(x) A B.

A B is never built: ||W + D||^2 = ||W||^2 + 2 <W, D> + ||D||^2 needs, for D = s A B, the products W^T A `[d_out, rank]`
and A^T A alone, and ||W||^2 is a constant that the adapter keeps. Columns that A B all but wipes out lose digits so.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import seams
from .._fields import Frozen
from .._method import Adapter, Method, Site, Start, Targets, wide
from . import _low_rank


@dataclasses.dataclass(frozen=True)
class DoRA(Method):
    """Weight-decomposed low-rank adaptation: directions by LoRA, lengths by themselves.

    It stands directly on the base: an adapter that was put on the same module before it is an error.

    Args:
      rank: inner size of A and B.
      alpha: the update is scaled by alpha / rank.
      targets: what to adapt; as of `LoRA`.
      dropout: probability of dropping an input while training; embeddings have none.
      rslora: scale by alpha / sqrt(rank) instead.
      init: of A and B: `"default"`, `"gaussian"`, `"orthogonal"`, `"pissa"`, `"olora"`; as of `LoRA`.
      bias: `"none"`, `"lora_only"` (train the adapted projections' biases too) or `"all"`.
      rank_pattern, alpha_pattern: other ranks and alphas by name; the first key that matches the end of a name counts.
      layers: indices of the layers to adapt; None for all.
      exclude: names left out of `targets`, by the same rules.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.

    Example:
      >>> jpeft.DoRA(rank=16, alpha=32, targets=["q_proj", "v_proj"], dropout=0.05)
    """

    kind: ClassVar[str] = "dora"

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
        _low_rank.check_factors(self)

    def select(self, model_type: str | None) -> Targets:
        return _low_rank.select(self, model_type, (*self.rank_pattern, *self.alpha_pattern))

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        drawn = _low_rank.start(self, site, base, key)
        square = _column_squares(seams.projection(base).read(base))
        return Start({**drawn.trainable, "m": jnp.sqrt(square)}, {**drawn.constants, "square": square})

    def objection(self, adapter: Adapter, base: Any, company: Sequence[Adapter]) -> str | None:
        place = next(i for i, other in enumerate(company) if other is adapter)
        for i, other in enumerate(company):
            who = f"DoRA goes by the norm of the base's kernel, and the adapter {other.site.adapter!r}, a "
            who += type(other.method).__name__
            meet = i != place and any(map(all, zip(adapter.site.active, other.site.active, strict=True)))
            if meet and i < place:
                return f"{who}, stands before it: put DoRA there first, as in DoRA(...) | LoRA(...)"
            if seams.projection(base).kernel in other.saved or (meet and other.method.on_the_way_in(other.site)):
                return f"{who}, changes that in whatever order they stand: leave one of them out there"
        return None

    def after(self, adapter: Adapter, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "..."]:
        projection = seams.projection(base)
        kernel, (a, b) = projection.read(base), self._running_factors(adapter)
        x, drops = _low_rank.dropped(adapter, base, inputs[0], self.dropout)
        delta = projection.emit(base, _low_rank.change(base, x, a, b))
        if drops:
            plain = projection.emit(base, projection.contract(base, x.astype(kernel.dtype), kernel))
        else:
            plain = projection.less_bias(base, y.astype(delta.dtype))
        growth = self._running_growth(adapter, kernel, a, b)
        grown = projection.scale_output(base, plain.astype(delta.dtype) + delta, growth)
        return (y + (delta + grown)).astype(y.dtype)

    def attend(self, adapter: Adapter, base: Any, y: jax.Array, query: jax.Array) -> Float[Array, "..."]:
        table, (a, b) = seams.projection(base).read(base), self._running_factors(adapter)
        query = query.astype(wide(query.dtype))
        growth = jnp.broadcast_to(self._running_growth(adapter, table, a, b), query.shape)
        plain = jnp.matmul((growth * query).astype(table.dtype), table.T, preferred_element_type=query.dtype)
        return (y + plain + (((1 + growth) * query) @ b.T) @ a.T).astype(y.dtype)

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        projection, site = seams.projection(base), adapter.site
        a, b = _low_rank.factors(adapter, _low_rank.scale_of_all(adapter, self.table(site)))
        kernel = projection.read(base)
        growth = _growth(adapter, kernel, a, b, jnp.array(site.active).reshape(*site.lead, 1))[..., None, :]
        kernel = kernel.astype(a.dtype)
        merged = kernel + (growth * kernel + (1 + growth) * jnp.matmul(a, b, precision="highest"))
        return {projection.kernel: projection.unmatrix(base, merged)}

    def padded(self, adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        return _low_rank.padded(self, adapter, shapes)

    def depends_on_layer(self, site: Site) -> bool:
        return self.dropout > 0 or not _low_rank.uniform(self.table(site))

    def count(self, site: Site) -> tuple[int, int]:
        trained = sum(self.ranks(site)) * (site.d_in + site.d_out) + sum(site.active) * site.d_out
        return trained, sum(site.active) * site.d_in * site.d_out

    def ranks(self, site: Site) -> tuple[int, ...]:
        """The rank in every layer; 0 where the layer is not adapted."""
        return _low_rank.ranks(self, site)

    def table(self, site: Site) -> np.ndarray:
        """`[layers, largest rank]`: the factor of every column of A, zero in the padding."""
        return _low_rank.table(self.ranks(site), _low_rank.scales(self, site))

    def _running_factors(self, adapter: Any) -> tuple[jax.Array, jax.Array]:
        return _low_rank.factors(adapter, _low_rank.running_scale(adapter, self.table(adapter.site)))

    def _running_growth(self, adapter: Any, kernel: jax.Array, a: jax.Array, b: jax.Array) -> Float[Array, " d_out"]:
        active = adapter.site.active
        return _growth(adapter, kernel, a, b, True if all(active) else jnp.array(active)[adapter.layer])


@jax.jit
def _column_squares(kernel: Float[Array, "*lead d_in d_out"]) -> Float[Array, "*lead d_out"]:
    return jnp.square(kernel.astype(wide(kernel.dtype))).sum(-2)


def _growth(adapter: Any, kernel: jax.Array, a: jax.Array, b: jax.Array, active: Any) -> Float[Array, "*lead d_out"]:
    """f - 1: exactly zero at the start, as a b is, and where the layer is not adapted.

    A column of zeros has no direction: its f is 1 + m until A B gives it one.
    """
    a, b = jax.lax.stop_gradient((a, b))
    crossed = jnp.einsum("...io,...ir->...or", kernel.astype(a.dtype), a, precision="highest")
    gram = jnp.einsum("...ir,...iq->...rq", a, a, precision="highest")
    twice = 2 * (jnp.swapaxes(crossed, -1, -2) * b).sum(-2)
    own = (jnp.matmul(gram, b, precision="highest") * b).sum(-2)
    norm = jnp.sqrt(jnp.maximum(adapter.square[...] + (twice + own), 0))
    return jnp.where(active, (adapter.m[...] - norm) / jnp.where(norm > 0, norm, 1), 0)
