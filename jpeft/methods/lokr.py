# SPDX-License-Identifier: Apache-2.0
"""LoKr: the Kronecker product of two small matrices, one or both of low rank (KronA, Edalati et al. 2022,
https://arxiv.org/abs/2212.10650; LyCORIS, Yeh et al. 2023, https://arxiv.org/abs/2309.14859).

    y = x W + b + s * x (w1 ⊗ w2)        w1 [m, l], w2 [n, k], d_in = m n, d_out = l k, s = alpha / rank
    w2 = w2_in w2_out                    w2_in [n, rank], w2_out [rank, k], where rank < max(n, k) / 2

The sizes are the divisors of d_in and of d_out nearest to their square roots, or `decompose_factor`. It starts as the
base: w1 is zero, or with init="lycoris" w2. The Kronecker product is never made: x is read as `[..., m, n]`, and meets
one small matrix after the other.

The factor s is alpha / rank where w2 is whole, too, as in PEFT; the LyCORIS package has 1 there.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import seams
from .._fields import Frozen, one_of
from .._method import Method, Site, Start, Targets, wide
from .._stream import split_rows
from ._lycoris import Ranks, check, draw, dropped, padded, ranks, select


@dataclasses.dataclass(frozen=True)
class LoKr(Method):
    """Low-rank Kronecker product, with PEFT's meanings and defaults.

    Not on a convolution: its factors are factors of the channels, and the kernel's matrix has the window in its rows.

    Args:
      rank: inner size of the factors of w2, and with `decompose_both` of w1.
      alpha: the update is scaled by alpha / rank.
      targets: what to adapt: a regular expression for the whole name, a list of names or suffixes, `"all-linear"`, or
        None for the model type's default.
      decompose_both: w1 is a product too, where rank is below half of its larger side.
      decompose_factor: m and l where they are divided by it, else the largest divisors up to it; -1 for the divisors
        nearest to the square root.
      init: `"default"` (w1 zero, the rest uniform in ±1/sqrt(inputs)) or `"lycoris"` (w2 zero).
      rank_dropout: probability of leaving an output of the update out, for all tokens of a call alike.
      rank_dropout_scale: divide the others by the part that is kept.
      module_dropout: probability of leaving the whole update of a layer out.
      rank_pattern, alpha_pattern: other ranks and alphas by name; the first key that matches the end of a name counts.
      layers: indices of the layers to adapt; None for all.
      exclude: names left out of `targets`, by the same rules.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.

    Example:
      >>> jpeft.LoKr(rank=8, alpha=16, targets=["q_proj", "v_proj"], decompose_factor=16)
    """

    kind: ClassVar[str] = "lokr"

    rank: int = 8
    alpha: float = 8
    targets: Any = None
    decompose_both: bool = False
    decompose_factor: int = -1
    init: str = "default"
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    module_dropout: float = 0.0
    rank_pattern: Any = dataclasses.field(default_factory=Frozen)
    alpha_pattern: Any = dataclasses.field(default_factory=Frozen)
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        check(self)
        one_of("LoKr", "init", self.init, ("default", "lycoris"))
        for field in ("decompose_both", "rank_dropout_scale"):
            one_of("LoKr", field, getattr(self, field), (True, False))
        factor = self.decompose_factor
        if not isinstance(factor, int) or isinstance(factor, bool) or (factor < 1 and factor != -1):
            raise ValueError(
                f"LoKr's decompose_factor must be a whole number of at least 1, or -1 for the square root's nearest "
                f"divisors; got {factor!r}"
            )

    def select(self, model_type: str | None) -> Targets:
        return select(self, model_type)

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        if isinstance(seams.projection(base), seams.Convolution):
            raise ValueError(
                f"{site.path} is a convolution, and LoKr's factors are factors of the channels, which the kernel's "
                "matrix does not tell from the window; adapt it by LoRA or LoHa"
            )
        dtype, found = wide(getattr(base, seams.projection(base).kernel).dtype), self.ranks(site)
        zero = ("w1", "w1_out") if self.init == "default" else ("w2", "w2_in")
        leaves = {}
        for name, (rows, columns) in self.shapes(site).items():
            leaf = draw(site, key, name, (rows, columns), rows, found)
            leaves[name] = (jnp.zeros_like(leaf) if name in zero else leaf).astype(dtype)
        return Start(leaves)

    def after(self, adapter: Any, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "..."]:
        projection, x = seams.projection(base), jnp.asarray(inputs[0])
        w1, w2 = self._factors(adapter, *self.ranks(adapter.site).running(adapter, wide(y.dtype)))
        n, first, second = w2[0].shape[0], _FIRST[len(w1)], _SECOND[len(w2)]
        if isinstance(projection, seams.Lookup):
            rows = w1[0][x // n], *w1[1:], w2[0][x % n], *w2[1:]
            delta = jnp.einsum(f"...{first[1:]},...{second[1:]}->...lk", *rows)
            delta = split_rows(delta.reshape(*x.shape, -1)).reshape(delta.shape)
        else:
            x = projection.rows(base, x.astype(wide(x.dtype)))
            delta = jnp.einsum(f"...mn,{first},{second}->...lk", x.reshape(*x.shape[:-1], -1, n), *w1, *w2)
        delta = dropped(self, adapter, delta.reshape(*delta.shape[:-2], -1), self.rank_dropout_scale)
        return (y + projection.emit(base, delta)).astype(y.dtype)

    def attend(self, adapter: Any, base: Any, y: jax.Array, query: jax.Array) -> Float[Array, "..."]:
        w1, w2 = self._factors(adapter, *self.ranks(adapter.site).running(adapter, wide(y.dtype)))
        query, k = query.astype(wide(query.dtype)), w2[-1].shape[-1]
        query = query.reshape(*query.shape[:-1], -1, k)
        delta = jnp.einsum(f"...lk,{_FIRST[len(w1)]},{_SECOND[len(w2)]}->...mn", query, *w1, *w2)
        return (y + delta.reshape(y.shape)).astype(y.dtype)

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        projection, site = seams.projection(base), adapter.site
        kernel = projection.read(base)
        w1, w2 = self._factors(adapter, *self.ranks(site).stacked(adapter, wide(kernel.dtype)))
        terms = ",".join(f"...{term}" for term in f"{_FIRST[len(w1)]},{_SECOND[len(w2)]}".split(","))
        delta = jnp.einsum(f"{terms}->...mnlk", *w1, *w2, precision="highest").reshape(kernel.shape)
        return {projection.kernel: projection.unmatrix(base, kernel.astype(wide(kernel.dtype)) + delta)}

    def padded(self, adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        whole = max(adapter.site.d_in, adapter.site.d_out)  # without a leaf of low rank, any that keeps it so
        return padded(self, adapter, max((s[-1] for name, s in shapes.items() if name.endswith("_in")), default=whole))

    def depends_on_layer(self, site: Site) -> bool:
        return self.rank_dropout > 0 or self.module_dropout > 0 or not self.ranks(site).alike

    def count(self, site: Site) -> tuple[int, int]:
        kept = [rank for rank in self.ranks(site).ranks if rank]
        trained = sum(
            (rows or rank) * (columns or rank) for rows, columns in self.shapes(site).values() for rank in kept
        )
        return trained, len(kept) * site.d_in * site.d_out

    def ranks(self, site: Site) -> Ranks:
        """Rank and factor of every layer."""
        return ranks(self, site)

    def shapes(self, site: Site) -> dict[str, tuple[int | None, int | None]]:
        """Shape of every leaf in one layer, with None for the rank.

        Raises:
          ValueError: w1 or w2 is of low rank in some layers of the stack alone.
        """
        (m, n), (ell, k) = (factorization(size, self.decompose_factor) for size in (site.d_in, site.d_out))
        shapes: dict[str, tuple[int | None, int | None]] = {}
        for name, rows, columns, split in (("w1", m, ell, self.decompose_both), ("w2", n, k, True)):
            low = {split and rank < max(rows, columns) / 2 for rank in self.ranks(site).ranks if rank}
            if len(low) > 1:
                raise ValueError(
                    f"{site.path}: {name} is {rows} x {columns}, of low rank in the layers of a rank below "
                    f"{max(rows, columns) / 2:g} and whole in the others, and one stack cannot hold both; choose ranks "
                    "on one side of it"
                )
            shapes |= (
                {f"{name}_in": (rows, None), f"{name}_out": (None, columns)} if True in low else {name: (rows, columns)}
            )
        return shapes

    def _factors(self, adapter: Any, scale: Any, columns: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        """What w1 and w2 are the products of, with the factor in the first, and without the padding."""
        leaves = {name: getattr(adapter, name)[...] for name in self.shapes(adapter.site)}
        leaves |= {name: leaf * columns for name, leaf in leaves.items() if name.endswith("_in")}
        w1, w2 = ([leaf for name, leaf in leaves.items() if name.startswith(own)] for own in ("w1", "w2"))
        return [w1[0] * scale, *w1[1:]], w2


#: The axes of w1's and of w2's factors, by how many there are.
_FIRST = {1: "ml", 2: "ma,al"}
_SECOND = {1: "nk", 2: "nb,bk"}


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `size`: `factor` and the rest where it divides, else the smaller first.

    The smaller is the largest divisor that is at most the square root and, unless -1, at most `factor`.

    Example:
      >>> factorization(768), factorization(768, 4), factorization(768, 7)
      ((24, 32), (4, 192), (6, 128))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    small = max(divisor for divisor in range(1, most + 1) if size % divisor == 0)
    return small, size // small
