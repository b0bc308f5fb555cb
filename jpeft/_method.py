# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning method is: a frozen dataclass that answers for one seam of a model at a time.

Whole models (finding seams, cloning, partitioning, masks, sharding, saving) are handled once, elsewhere.
"""

import abc
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ._scope import current, dropout

#: What `bias=` may say: train no bias, those of the adapted projections, or all.
BIAS_CHOICES = ("none", "lora_only", "all")


def wide(dtype: Any) -> Any:
    """The dtype of adapters on leaves of `dtype`, and of their sums: float32, on a float64 base float64."""
    return jnp.promote_types(dtype, jnp.float32)


class AdapterParam(nnx.Param):
    """A trainable leaf. `jpeft.partition` puts exactly the leaves of this type into `trainable`."""


class AdapterConstant(nnx.Variable):
    """A leaf that an adapter needs and never trains (a start to subtract, a layer index); it is frozen."""


class Frozen(dict):
    """A hashable mapping, for the dict-valued fields of a method. Order counts: PEFT's patterns go first match wins."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        same_order = not isinstance(other, Frozen) or list(self) == list(other)
        return same_order and dict.__eq__(self, other)  # type: ignore[operator]

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("a method's fields cannot be changed; use dataclasses.replace")

    def __reduce__(self) -> Any:
        return Frozen, (dict(self),)


@dataclasses.dataclass(frozen=True)
class Site:
    """One place of a model where a method acts, in numbers: no arrays, so it is part of the static graphdef.

    Attributes:
      path: the module's path in the NNX model, `"layers/attention/query"`.
      names: its name, one per layer of a stack: the Hugging Face module name where the model has a name map, else
        the dotted path.
      active: which of these the method adapts, one bool per name.
      lead: leading (layer) axes of its leaves, `(12,)` in a stack of 12, `()` outside.
      d_in: inputs of the projection seen as a matrix; 0 for a seam without one.
      d_out: outputs, likewise.
      scanned: whether jpeft's own scan runs the stack, so that the scope knows the layer.
      adapter: the adapter's name, which leaf paths and dropout masks depend on.
    """

    path: str
    names: tuple[str, ...]
    active: tuple[bool, ...]
    lead: tuple[int, ...] = ()
    d_in: int = 0
    d_out: int = 0
    scanned: bool = False
    adapter: str = ""


@dataclasses.dataclass(frozen=True)
class Targets:
    """What a method asks to be grafted onto, in PEFT's terms; read by `_targets`."""

    targets: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    bias: str = "none"
    patterns: tuple[str, ...] = ()  # keys of rank_pattern and the like: each must match an adapted name


@dataclasses.dataclass(frozen=True)
class Start:
    """The leaves that an adapter starts with: trained ones and constants, by name."""

    trainable: Mapping[str, jax.Array]
    constants: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)


class Adapter(nnx.Module):
    """One method at one seam: its leaves, and what is needed to run them.

    `saved` holds trainable copies of the seam's own leaves (for `bias=` and `modules_to_save`), which stand in for
    the base's while the base module runs, in the layers that `saved_layers` names.

    Trained leaves are copies: a train step may donate them, and neither a base leaf nor a constant may go with them.
    """

    layer_index: AdapterConstant  # in a stack that jpeft does not run itself, if the method depends on the layer

    def __init__(
        self,
        method: "Method",
        site: Site,
        start: Start,
        saved: Mapping[str, jax.Array],
        saved_layers: Mapping[str, tuple[bool, ...]],
    ):
        self.method = method
        self.site = site
        self.saved_layers = Frozen(saved_layers)
        for name, value in start.trainable.items():
            setattr(self, name, AdapterParam(jnp.copy(value)))
        for name, value in start.constants.items():
            setattr(self, name, AdapterConstant(value))
        self.saved = nnx.Dict({name: AdapterParam(jnp.copy(value)) for name, value in saved.items()})

    @property
    def acts(self) -> bool:
        """Whether the method's formula runs here, rather than only copies of leaves being trained."""
        return any(self.site.active)

    @property
    def layer(self) -> jax.Array | None:
        """Index of the running layer, in a stack; None outside of one.

        Raises:
          ValueError: a stack runs in a way that hides which of its layers it is in.
        """
        if not self.site.lead:
            return None
        scanned = current().layer if self.site.scanned else None
        index = self.layer_index[...] if hasattr(self, "layer_index") else scanned
        if index is None or index.ndim:
            raise ValueError(
                f"{self.site.path} differs between the layers of its stack, and runs where its layer is not known; run "
                "the stack by jax.lax.scan or jax.vmap over the whole module (a stack of jpeft's by jpeft's own scan), "
                "or adapt all layers alike and without dropout"
            )
        return index

    def dropout(self, x: jax.Array, rate: float) -> jax.Array:
        """`x` with entries dropped while the call has a key; every adapter and every layer draws a mask of its own."""
        if rate == 0.0 or current().key is None:
            return x
        return dropout(x, rate, f"{self.site.path}/{self.site.adapter}", self.layer)


def pattern_matches(key: str, name: str) -> bool:
    """PEFT's rule for the keys of a `rank_pattern`: a regular expression for the end of `name`, at a dot."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key of a `rank_pattern` or `alpha_pattern` that matches the end of `name`."""
    return next((value for key, value in patterns.items() if pattern_matches(key, name)), default)


class Method(abc.ABC):
    """A frozen dataclass whose fields are the method's options; its instances hash, so they live in the graphdef.

    `kind` names the method: in `METHODS`, in leaf paths, in selectors. `seam` is the kind of seam it fits.
    """

    kind: ClassVar[str]
    seam: ClassVar[str] = "projection"

    @abc.abstractmethod
    def select(self, model_type: str | None) -> Targets:
        """Where the method wants to act; `model_type` (Hugging Face's word) picks its defaults."""

    @abc.abstractmethod
    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        """First values of its leaves at `site`; `key` is this site's own."""

    @abc.abstractmethod
    def apply(self, adapter: Adapter, base: Any, y: jax.Array, *inputs: Any) -> jax.Array:
        """What comes out of the seam, given what the base module gave (`y`) for `inputs`."""

    def depends_on_layer(self, site: Site) -> bool:
        """Whether what it computes at a stacked `site` differs between layers by more than the leaves."""
        return False

    @abc.abstractmethod
    def merge(self, adapter: Adapter, base: Any) -> Mapping[str, jax.Array]:
        """New values for the base module's own leaves, by attribute, that do what the adapter does."""

    def attend(self, adapter: Adapter, base: Any, y: jax.Array, query: jax.Array) -> jax.Array:
        """As `apply`, for an embedding read backwards as an output head: `y = query @ table.T`."""
        (table,) = self.merge(adapter, base).values()
        return query @ table.astype(query.dtype).T

    @abc.abstractmethod
    def count(self, site: Site) -> tuple[int, int]:
        """(trainable parameters, base parameters whose effective value changes) at `site`, by formula."""
