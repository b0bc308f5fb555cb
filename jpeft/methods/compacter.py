# SPDX-License-Identifier: Apache-2.0
"""Compacter: bottleneck adapters of Kronecker products (Mahabadi et al. 2021, arXiv 2106.04647). A matrix W is

    W = sum_i S_i kron (L_i R_i)      i of n; S_i [n, n], L_i [d_in / n, rank], R_i [rank, d_out / n]

S is one tensor [n, n, n] for both matrices of every place. Compacter stands where Houlsby's adapters do, Compacter++
where Pfeiffer's do. W is small, [d_model, m], so it is built once per call and place.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._fields import extent, one_of, whole
from .._method import Site, Start
from .._scope import fold_path
from ._bottleneck import Bottleneck, Linears, _positive


@dataclasses.dataclass(frozen=True)
class Compacter(Bottleneck):
    """Bottleneck adapters of Kronecker products with a shared rule.

    Args:
      plus_plus: Compacter++: after the MLP alone, reading the normed stream, as `jpeft.Pfeiffer`.
      n: number of products, and the rule's size; must divide d_model and the width.
      rank: of the products' large factors.
      rule_std: standard deviation of the rule at the start. (The factors start Xavier normal, biases zero.)

    The other options are those of `jpeft.Houlsby`. All layers have one width.

    Example:
      >>> jpeft.Compacter(reduction_factor=32, n=4)
    """

    kind: ClassVar[str] = "compacter"
    INITS: ClassVar[tuple[str, ...]] = ("xavier",)

    reduction_factor: Any = 32
    non_linearity: str = "gelu"
    init: str = "xavier"
    blocks: Any = None
    original_ln_before: Any = None
    plus_plus: bool = False
    n: int = 4
    rank: int = 1
    rule_std: float = 1e-4

    def __post_init__(self) -> None:
        one_of("Compacter", "plus_plus", self.plus_plus, (True, False))
        for field, own in (("blocks", ("mlp",) if self.plus_plus else ("attention", "mlp")),
                           ("original_ln_before", self.plus_plus)):  # fmt: skip
            object.__setattr__(self, field, own if getattr(self, field) is None else getattr(self, field))
        super().__post_init__()
        whole("Compacter", "n", self.n)
        extent("Compacter", "rank", self.rank)
        _positive("Compacter", "rule_std", self.rule_std)
        if isinstance(self.reduction_factor, Mapping):
            raise ValueError("Compacter takes one reduction_factor for all layers, as they share one rule")

    def start_linears(self, site: Site, key: jax.Array) -> Mapping[str, jax.Array]:
        d, m = site.d_in, max(self.widths(site))
        if d % self.n or m % self.n:
            raise ValueError(
                f"Compacter's n must divide the widths of stream and bottleneck; at {site.path} they are {d} "
                f"and {m}, and n is {self.n}"
            )
        leaves = {}
        for name, d_in, d_out in (("down", d, m), ("up", m, d)):
            for side, shape in (("left", (d_in // self.n, self.rank)), ("right", (self.rank, d_out // self.n))):
                std = (2 / sum(shape)) ** 0.5
                leaf = f"{name}_{side}"
                leaves[leaf] = std * jax.random.normal(fold_path(key, leaf), (*site.lead, self.n, *shape))
            leaves[f"{name}_bias"] = jnp.zeros((*site.lead, d_out))
        return leaves

    def start_shared(self, site: Site, model: Any, key: jax.Array) -> Start | None:
        super().start_shared(site, model, key)
        rule = self.rule_std * jax.random.normal(fold_path(key, "rule"), (self.n,) * 3)
        return Start({"rule": rule})

    def share(self, adapter: Any) -> Float[Array, "n n n"]:
        return adapter.rule[...]

    def linears(self, adapter: Any) -> Linears:
        def matrix(left: jax.Array, right: jax.Array) -> jax.Array:
            blocks = jnp.einsum("iab,icr,ird->acbd", adapter.shared, left, right)
            return blocks.reshape(self.n * left.shape[1], self.n * right.shape[2])

        down = matrix(adapter.down_left[...], adapter.down_right[...])
        up = matrix(adapter.up_left[...], adapter.up_right[...])
        return down, adapter.down_bias[...], up, adapter.up_bias[...]

    def count(self, site: Site) -> tuple[int, int]:
        if site.seam == "model":
            return self.n**3, 0
        return super().count(site)

    def weights(self, site: Site) -> int:
        """Entries of the factors alone; the rule is counted once, at the model's root."""
        return sum(2 * self.rank * (site.d_in + m) for m in self.widths(site) if m) if site.seam == "residual" else 0
