# SPDX-License-Identifier: Apache-2.0
"""LoHa: the elementwise product of two low-rank updates (FedPara, Hyeon-Woo et al. 2021,
https://arxiv.org/abs/2108.06098; LyCORIS, Yeh et al. 2023, https://arxiv.org/abs/2309.14859).

    y = x W + b + s * x ((A1 B1) ∘ (A2 B2))        A [d_in, rank], B [rank, d_out], s = alpha / rank

Its rank is up to rank², for the parameters of two LoRAs. It starts as the base: A2 is zero.

The product itself is low-rank, with the rank² products of a column of A1 and one of A2, and of a row of B1 and one of
B2, as its factors. Where those are the cheaper way no matrix of the kernel's size is made; elsewhere one is made, and
again in the backward pass, but never kept.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import seams
from .._fields import Frozen
from .._method import Method, Site, Start, Targets, wide
from .._scope import made_again
from ._lycoris import Ranks, check, draw, dropped, padded, ranks, select


@dataclasses.dataclass(frozen=True)
class LoHa(Method):
    """Low-rank Hadamard product, with PEFT's meanings and defaults.

    On a convolution it acts on the flattened kernel (PEFT's `use_effective_conv2d=False`); PEFT's other form, with
    tensors of the window's size between the factors, is no product of matrices.

    Args:
      rank: inner size of both products.
      alpha: the update is scaled by alpha / rank.
      targets: what to adapt: a regular expression for the whole name, a list of names or suffixes, `"all-linear"`, or
        None for the model type's default.
      rank_dropout: probability of leaving an output of the update out, for all tokens of a call alike; the others are
        divided by the part that is kept.
      module_dropout: probability of leaving the whole update of a layer out.
      rank_pattern, alpha_pattern: other ranks and alphas by name; the first key that matches the end of a name counts.
      layers: indices of the layers to adapt; None for all.
      exclude: names left out of `targets`, by the same rules.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.

    Example:
      >>> jpeft.LoHa(rank=8, alpha=16, targets=["q_proj", "v_proj"])
    """

    kind: ClassVar[str] = "loha"

    rank: int = 8
    alpha: float = 8
    targets: Any = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_pattern: Any = dataclasses.field(default_factory=Frozen)
    alpha_pattern: Any = dataclasses.field(default_factory=Frozen)
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        check(self)

    def select(self, model_type: str | None) -> Targets:
        return select(self, model_type)

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        dtype, found = wide(getattr(base, seams.projection(base).kernel).dtype), ranks(self, site)
        leaves = {
            "A1": draw(site, key, "A1", (site.d_in, None), site.d_in, found),
            "B1": draw(site, key, "B1", (None, site.d_out), None, found),
            "A2": jnp.zeros((*site.lead, site.d_in, max(found.ranks))),
            "B2": draw(site, key, "B2", (None, site.d_out), None, found),
        }
        return Start({name: leaf.astype(dtype) for name, leaf in leaves.items()})

    def after(self, adapter: Any, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "..."]:
        projection, x = seams.projection(base), jnp.asarray(inputs[0])
        if not isinstance(projection, seams.Lookup):
            x = x.astype(wide(x.dtype))
        a1, b1, a2, b2 = self._running(adapter)
        if _thin(a1, b1):
            a, b = _flat(a1, b1, a2, b2)
            delta = seams.rows_times(projection.contract(base, x, a), b)
        else:
            product = jax.checkpoint(lambda x, *factors: projection.contract(base, x, _product(*factors)))
            delta = product(made_again(x), a1, b1, a2, b2)  # [..., d_out]
        delta = dropped(self, adapter, delta, rescale=True)
        return (y + projection.emit(base, delta)).astype(y.dtype)

    def attend(self, adapter: Any, base: Any, y: jax.Array, query: jax.Array) -> Float[Array, "..."]:
        factors, query = self._running(adapter), query.astype(wide(query.dtype))
        if _thin(*factors[:2]):
            a, b = _flat(*factors)
            return (y + (query @ b.T) @ a.T).astype(y.dtype)
        product = jax.checkpoint(lambda query, *factors: query @ _product(*factors).T)
        return (y + product(query, *factors)).astype(y.dtype)

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        projection = seams.projection(base)
        factors = self._factors(adapter, *self.ranks(adapter.site).stacked(adapter, adapter.A1.dtype))
        kernel, delta = projection.read(base), _product(*factors, precision="highest")
        return {projection.kernel: projection.unmatrix(base, kernel.astype(wide(kernel.dtype)) + delta)}

    def padded(self, adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        return padded(self, adapter, shapes["A1"][-1])

    def depends_on_layer(self, site: Site) -> bool:
        return self.rank_dropout > 0 or self.module_dropout > 0 or not self.ranks(site).alike

    def count(self, site: Site) -> tuple[int, int]:
        trained = 2 * sum(self.ranks(site).ranks) * (site.d_in + site.d_out)
        return trained, sum(site.active) * site.d_in * site.d_out

    def ranks(self, site: Site) -> Ranks:
        """Rank and factor of every layer."""
        return ranks(self, site)

    def _running(self, adapter: Any) -> tuple[jax.Array, ...]:
        """`_factors` of the running layer."""
        return self._factors(adapter, *self.ranks(adapter.site).running(adapter, adapter.A1.dtype))

    def _factors(self, adapter: Any, scale: Any, columns: Any) -> tuple[jax.Array, ...]:
        """A1, B1, A2, B2, with the factor in them, and without the padding."""
        return adapter.A1[...] * (scale * columns), adapter.B1[...], adapter.A2[...] * columns, adapter.B2[...]


def _product(a1: jax.Array, b1: jax.Array, a2: jax.Array, b2: jax.Array, precision: Any = None) -> jax.Array:
    return jnp.matmul(a1, b1, precision=precision) * jnp.matmul(a2, b2, precision=precision)


def _thin(a1: jax.Array, b1: jax.Array) -> bool:
    """Whether the rank² products of the factors' columns and rows hold less than the product itself."""
    (d_in, rank), d_out = a1.shape, b1.shape[-1]
    return rank**2 * (d_in + d_out) < d_in * d_out


def _flat(a1: jax.Array, b1: jax.Array, a2: jax.Array, b2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[d_in, rank²]` and `[rank², d_out]`, whose matrix product is the Hadamard product."""
    size = a1.shape[-1] ** 2
    return (a1[:, :, None] * a2[:, None]).reshape(-1, size), (b1[:, None] * b2[None]).reshape(size, -1)
