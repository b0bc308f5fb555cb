# SPDX-License-Identifier: Apache-2.0
"""ReFT: a low-rank edit of a layer's output at both ends of the prompt (Wu et al. 2024, https://arxiv.org/abs/2404.03592).

    LoReFT   y + R^T (W y + b - R y)      the rows of R are orthonormal
    NoReFT   y + R^T (W y + b - R y)
    DiReFT   y + R^T (W y + b)            R, W [rank, d_model]

It acts on what leaves a layer, at the first `first` and the last `last` tokens of each example's prompt; everywhere
else the output is the base's, bit for bit. So no base weights can do the same, and there is no merged form.

LoReFT trains any matrix and reads R as its Q factor (diagonal of the other positive): R depends on no scale, and weight
decay cannot touch it. torch's parametrisation, which `adapters` and `pyreft` use, loses R to the first such step.

The edit is computed at all positions, and zero but at the ends. That is 2 rank / d_model of one projection, and works
alike for padded and packed rows, where the ends stand somewhere else in every row. The backward pass keeps y alone.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._fields import extent, indices, names, one_of, rate, whole
from .._method import Method, Site, Start, Targets, wide
from .._scope import fold_path, made_again
from .._text import prompt_ends
from ._orthonormal import orthonormal

Leaf = Float[Array, "units d_model rank"]


@dataclasses.dataclass(frozen=True)
class ReFT(Method):
    """What the three are: fields (told of at `LoReFT`), positions, leaves and counts.

    Leaves: `R` and `W` `[*lead, units, d_model, rank]`, whose columns are the formulas' rows, and `b`
    `[*lead, units, rank]`.
    """

    constrained: ClassVar[bool] = False
    subtracts: ClassVar[bool] = True

    rank: int = 1
    first: int = 3
    last: int = 0
    tied: bool = True
    dropout: float = 0.0
    layers: Any = None
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "layers", indices(self.layers))
        object.__setattr__(self, "modules_to_save", names("modules_to_save", self.modules_to_save))
        extent(name, "rank", self.rank)
        whole(name, "first", self.first, least=0)
        whole(name, "last", self.last, least=0)
        rate(name, "dropout", self.dropout)
        one_of(name, "tied", self.tied, (True, False))
        if not self.first and not self.last:
            raise ValueError(f"{name} with first=0 and last=0 would act nowhere; say at how many tokens it shall")
        if not self.tied and not (self.first and self.last):
            raise ValueError(
                f"{name} with tied=False has one unit for the first tokens and one for the last, of which one would "
                f"never act with first={self.first} and last={self.last}; give both, or tied=True"
            )

    @property
    def units(self) -> int:
        """How many (R, W, b) a layer has."""
        return 1 if self.tied else 2

    def select(self, model_type: str | None) -> Targets:
        del model_type
        saved = self.modules_to_save
        return Targets(".*", layers=self.layers, modules_to_save=saved, seam="residual", blocks=("mlp",))

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        """All uniform in ±1/sqrt(d_model), as torch's Linear; but LoReFT's R is the Q factor of normal numbers."""
        if self.constrained and self.rank > site.d_out:
            raise ValueError(
                f"{site.path} is {site.d_out} wide, which has no {self.rank} orthonormal directions; lower the rank"
            )
        bound, shape = site.d_out**-0.5, (*site.lead, self.units, site.d_out, self.rank)
        shapes = {"R": shape, "W": shape, "b": (*shape[:-2], self.rank)}
        keys = {name: fold_path(key, name) for name in shapes}
        drawn = {n: jax.random.uniform(keys[n], shapes[n], jnp.float32, -bound, bound) for n in shapes}
        if self.constrained:
            drawn["R"] = orthonormal(jax.random.normal(keys["R"], shape, jnp.float32))
        return Start(drawn)

    def after(self, adapter: Any, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "*batch seq d_model"]:
        front, back = prompt_ends(y.shape[:-1], self.first, self.last)
        at = (front | back)[..., None] if self.tied else jnp.stack([front, back], -1)  # [*batch, seq, units]
        if not all(adapter.site.active):
            at = at & jnp.array(adapter.site.active)[adapter.layer]
        r, w = adapter.R[...], adapter.W[...]
        r = orthonormal(r) if self.constrained else r
        edited = _edit(made_again(y), at, r, w - r if self.subtracts else w, adapter.b[...])
        edited = adapter.dropout(edited, self.dropout).astype(y.dtype)
        return jnp.where(at.any(-1, keepdims=True), edited, y)

    def depends_on_layer(self, site: Site) -> bool:
        return self.dropout > 0 or not all(site.active)

    def count(self, site: Site) -> tuple[int, int]:
        return sum(site.active) * self.units * (2 * site.d_out + 1) * self.rank, 0


@dataclasses.dataclass(frozen=True)
class LoReFT(ReFT):
    """Low-rank linear subspace ReFT: y + R^T (W y + b - R y), where the rows of R are orthonormal.

    Args:
      rank: number of rows of R and W.
      first, last: how many tokens at the front and at the end of each example's prompt (`jpeft.prompt_tokens`; all of
        the text by default). In a prompt shorter than both together each token belongs to the nearer end.
      tied: whether both ends share one (R, W, b), or have one each.
      dropout: probability of dropping an entry of what the edit gives, y included, while training. None by default,
        as in the paper's recipes for LLaMA; those for GLUE, and the default of `adapters`, have 0.05.
      layers: indices of the layers that are edited; None for all.
      modules_to_save: modules trained whole, as a copy; None trains the head of a classification task, () nothing.

    Example:
      >>> jpeft.LoReFT(rank=8, first=7, last=7)
    """

    kind: ClassVar[str] = "loreft"
    constrained: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class NoReFT(ReFT):
    """ReFT without the constraint: y + R^T (W y + b - R y), R any matrix; fields as of `LoReFT`."""

    kind: ClassVar[str] = "noreft"


@dataclasses.dataclass(frozen=True)
class DiReFT(ReFT):
    """Direct ReFT: y + R^T (W y + b), R any matrix; fields as of `LoReFT`.

    (The paper's; `pyreft` has it as `NodireftIntervention`, and its `DireftIntervention` keeps R orthonormal.)
    """

    kind: ClassVar[str] = "direft"
    subtracts: ClassVar[bool] = False


@functools.partial(jax.checkpoint, prevent_cse=False)
def _edit(
    y: Float[Array, "*batch d_model"], at: Bool[Array, "*batch units"], r: Leaf, w: Leaf, b: Float[Array, "units rank"]
) -> Float[Array, "*batch d_model"]:
    """y + Σ r (w^T y + b) over the units that are `at` the token, in the adapter's precision."""
    x = y.reshape(-1, y.shape[-1]).astype(wide(y.dtype))
    inner = jnp.einsum("nd,udr->nur", x, w) + b[None]
    inner = jnp.where(at.reshape(-1, at.shape[-1], 1), inner, 0)
    return (x + jnp.einsum("nur,udr->nd", inner, r)).reshape(y.shape)
