# SPDX-License-Identifier: Apache-2.0
"""OFT: an orthogonal map of a projection's input, in blocks (Qiu et al. 2023, https://arxiv.org/abs/2306.07280).

    y = (x R) W + b        R block-diagonal, each block (I + Q) / (I - Q) of a skew-symmetric Q (Cayley)

Angles between the columns of W, and their lengths, stay as they are. The leaf `Q` is the upper triangle of every
block, row by row: `[blocks, block_size (block_size - 1) / 2]`; it is zero at the start, so R = I.

The quotient is the limit of I + 2 Q + 2 Q² + ..., for small Q. As in PEFT it is cut off by default, after
`neumann_terms` (R is then orthogonal up to the rest, of the order Q^neumann_terms; Qiu et al. 2025,
https://arxiv.org/abs/2506.19847); None solves for it exactly. PEFT's exact form is (I - Q) / (I + Q), the inverse of
what its own series tends to; here both are the paper's, so the one approximates the other, and a leaf of PEFT's exact
form changes its sign on the way here.

With `coft` the map stays near the identity: of a Q whose Frobenius norm is above eps / sqrt(blocks), Q / |Q| times that
bound is taken. PEFT writes that back into the leaf; here the leaf stays and the bound is a part of the function, with
its exact gradient.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import seams
from .._fields import one_of, rate, selection, whole
from .._method import Adapter, Method, Site, Start, Targets, wide
from ._default_targets import default_targets


@dataclasses.dataclass(frozen=True)
class OFT(Method):
    """Orthogonal fine-tuning, with PEFT's meanings and defaults.

    Only where a projection reads rows of numbers: an embedding reads token ids, and a convolution patches that overlap
    (PEFT turns their overlaps, which no merged kernel does).

    Args:
      block_size: size of the blocks; it must divide d_in. 32 where `rank` is not given either.
      rank: number of blocks, in its place. (PEFT's word; more blocks are fewer parameters.)
      targets: what to adapt: a regular expression for the whole name, a list of names or suffixes, `"all-linear"`, or
        None for the model type's default.
      neumann_terms: powers of Q in R, the identity counted, at least 4; None for the exact quotient.
      coft: bound Q.
      eps: the bound.
      block_share: one Q for all blocks of a place.
      block_dropout: probability of leaving a block of R out, for all tokens of a call alike. (PEFT has the option
        `module_dropout`, and ignores it.)
      layers: indices of the layers to adapt; None for all.
      exclude: names left out of `targets`, by the same rules.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.

    Example:
      >>> jpeft.OFT(block_size=16, targets=["q_proj", "v_proj"])
    """

    kind: ClassVar[str] = "oft"

    block_size: int | None = None
    rank: int | None = None
    targets: Any = None
    neumann_terms: int | None = 5
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    block_dropout: float = 0.0
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        selection(self)
        if self.block_size is not None and self.rank is not None:
            raise ValueError(
                f"OFT takes block_size or rank, for each gives the other (block_size * rank = d_in); got both, "
                f"{self.block_size!r} and {self.rank!r}"
            )
        if self.rank is None:
            size = 32 if self.block_size is None else self.block_size
            object.__setattr__(self, "block_size", whole("OFT", "block_size", size, least=2))
        else:
            whole("OFT", "rank", self.rank)
        for field in ("coft", "block_share"):
            one_of("OFT", field, getattr(self, field), (True, False))
        if self.neumann_terms is not None:
            whole("OFT", "neumann_terms", self.neumann_terms, least=4)
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not 0 < self.eps < float("inf"):
            raise ValueError(f"OFT's eps must be a positive number, got {self.eps!r}")
        rate("OFT", "block_dropout", self.block_dropout)

    def select(self, model_type: str | None) -> Targets:
        targets = default_targets("OFT", self.targets, model_type)
        return Targets(targets, self.exclude, self.layers, self.modules_to_save)

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        projection = seams.projection(base)
        if not isinstance(projection, seams.Matmul):
            raise ValueError(
                f"{site.path} is a {type(base).__name__}: OFT turns rows of d_in numbers, and it reads none (an "
                "embedding reads token ids, a convolution overlapping patches); adapt it by LoRA or LoHa"
            )
        blocks, size = self.blocks(site)
        blocks = 1 if self.block_share else blocks
        dtype = wide(getattr(base, projection.kernel).dtype)
        return Start({"Q": jnp.zeros((*site.lead, blocks, size * (size - 1) // 2), dtype)})

    def before(self, adapter: Any, base: Any, *inputs: Any) -> tuple[Any, ...]:
        projection, x = seams.projection(base), jnp.asarray(inputs[0])
        packed, site = adapter.Q[...], adapter.site
        if not all(site.active):
            packed = jnp.where(jnp.array(site.active)[adapter.layer], packed, 0)
        blocks, size = self.blocks(site)
        turns = self._dropped(adapter, self._turns(packed, size), blocks)
        rows = projection.rows(base, x.astype(wide(x.dtype)))
        rows = rows.reshape(*rows.shape[:-1], blocks, size)
        if len(turns) == 1:
            turned = jnp.einsum("...i,ij->...j", rows, turns[0])
        else:
            turned = jnp.einsum("...ni,nij->...nj", rows, turns)
        turned = projection.unrows(base, turned.reshape(*rows.shape[:-2], -1))
        return (turned.astype(x.dtype), *inputs[1:])

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        projection, site = seams.projection(base), adapter.site
        blocks, size = self.blocks(site)
        packed = jnp.where(jnp.array(site.active).reshape(*site.lead, 1, 1), adapter.Q[...], 0)
        turns = self._turns(packed, size)  # [*lead, blocks or 1, size, size]
        kernel = projection.read(base)
        parts = kernel.astype(turns.dtype).reshape(*site.lead, blocks, size, site.d_out)
        turned = jnp.matmul(turns, parts, precision="highest").reshape(kernel.shape)
        return {projection.kernel: projection.unmatrix(base, turned)}

    def on_the_way_in(self, site: Site) -> bool:
        return True

    def depends_on_layer(self, site: Site) -> bool:
        return self.block_dropout > 0 or not all(site.active)

    def count(self, site: Site) -> tuple[int, int]:
        blocks, size = self.blocks(site)
        trained = (1 if self.block_share else blocks) * size * (size - 1) // 2
        return sum(site.active) * trained, sum(site.active) * site.d_in * site.d_out

    def blocks(self, site: Site) -> tuple[int, int]:
        """Number and size of the blocks at `site`.

        Raises:
          ValueError: d_in has no such parts, or they are single numbers, which nothing can turn.
        """
        field, given = ("rank", self.rank) if self.block_size is None else ("block_size", self.block_size)
        assert given is not None
        other = site.d_in // given
        size = other if field == "rank" else given
        if other * given != site.d_in or size < 2:
            sizes = [n for n in range(2, site.d_in + 1) if site.d_in % n == 0]
            fitting = [site.d_in // n for n in reversed(sizes)] if field == "rank" else sizes
            raise ValueError(
                f"{site.path} reads {site.d_in} numbers, which {field}={given} does not part into blocks of two or "
                f"more; {field} can be {', '.join(map(str, fitting)) or 'nothing'} there"
            )
        return site.d_in // size, size

    def _turns(self, packed: jax.Array, size: int) -> jax.Array:
        """R of every block, `[..., size, size]`."""
        q = _skew(packed, size)
        if self.coft:
            bound = self.eps / packed.shape[-2] ** 0.5
            square = (q * q).sum((-2, -1), keepdims=True)
            above = square > bound**2
            q = jnp.where(above, q * (bound * jax.lax.rsqrt(jnp.where(above, square, 1))), q)
        identity = jnp.eye(size, dtype=q.dtype)
        if self.neumann_terms is None:
            return jnp.linalg.solve(_plus(-q, identity), _plus(q, identity))
        power = series = q
        for _ in range(self.neumann_terms - 3):
            power = jnp.matmul(power, q, precision="highest")
            series = series + power
        last = jnp.matmul(power, q, precision="highest")
        return _plus(2 * series + last, identity)

    def _dropped(self, adapter: Adapter, turns: jax.Array, blocks: int) -> jax.Array:
        """`turns` with the identity in place of some blocks."""
        if not self.block_dropout:
            return turns
        kept = adapter.dropout(jnp.ones((blocks, 1, 1), turns.dtype), self.block_dropout) > 0
        return jnp.where(kept, turns, jnp.eye(turns.shape[-1], dtype=turns.dtype)[None])


def _plus(blocks: jax.Array, identity: jax.Array) -> jax.Array:
    return blocks + identity.reshape((1,) * (blocks.ndim - 2) + identity.shape)


def _skew(packed: jax.Array, size: int) -> jax.Array:
    """The skew-symmetric matrices whose upper triangles are `packed`, row by row: `[..., size, size]`."""
    place = np.zeros((size, size), np.int32)
    place[np.triu_indices(size, 1)] = np.arange(packed.shape[-1])
    sign = np.triu(np.ones((size, size)), 1) - np.tril(np.ones((size, size)), -1)
    full = jnp.take(packed, (place + place.T).ravel(), axis=-1).reshape(*packed.shape[:-1], size, size)
    return full * jnp.asarray(sign, packed.dtype).reshape((1,) * (packed.ndim - 1) + sign.shape)
