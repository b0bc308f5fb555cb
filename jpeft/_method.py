# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning method is: a frozen dataclass that answers for one seam of a model at a time.

Whole models (finding seams, cloning, partitioning, masks, sharding, saving) are handled once, elsewhere.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ._fields import Frozen
from ._scope import current, dropout
from ._site import Site
from ._wide import wide as wide

#: What `bias=` may say: train no bias, those of the adapted projections, or all.
BIAS_CHOICES = ("none", "lora_only", "all")


class AdapterParam(nnx.Param):
    """A trainable leaf. `jpeft.partition` puts exactly the leaves of this type into `trainable`."""


class AdapterConstant(nnx.Variable):
    """A leaf that an adapter needs and never trains (a start to subtract, a layer index); it is frozen."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """What a method asks to be grafted onto, in PEFT's terms; read by `_targets`.

    Attributes:
      targets: names, or a regular expression, of modules at which the method's formula acts; None for none.
      exclude, layers, modules_to_save, bias: as of `jpeft.LoRA`.
      patterns: keys of rank_pattern and the like: each must match an adapted name.
      seam: the kind of seam that is meant. Or, for a method that acts nowhere and trains copies of the base's own
        leaves: `"bias"`, `"norm"` (all leaves of norms) or `"parameter"` (all leaves).
      blocks: of the residuals or attentions, those of these blocks alone; None for all.
      absorb: names of adapters that the method takes over: they stand below its own, and are trained no more.
      last: in the place of `layers`, how many of the last ones; 0 for what stands outside of all layers.
      optional: whether it is no error that nothing matches.
      leave_out: indices of layers in which it does not act; the others are as `layers` says.
      prefer: blocks again: of those that the model has, the first alone.
    """

    targets: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    bias: str = "none"
    patterns: tuple[str, ...] = ()
    seam: str = "projection"
    blocks: tuple[str, ...] | None = None
    absorb: tuple[str, ...] = ()
    last: int | None = None
    optional: bool = False
    leave_out: tuple[int, ...] = ()
    prefer: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Start:
    """The leaves that an adapter starts with: trained ones and constants, by name."""

    trainable: Mapping[str, jax.Array]
    constants: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Folded:
    """A simpler method that does the same: its kind, its options, and the leaves that all its places share."""

    kind: str
    options: Mapping[str, Any]
    start: Start


class Adapter(nnx.Module):
    """One method at one seam: its leaves, and what is needed to run them.

    `saved` holds trainable copies of the seam's own leaves (for `bias=` and `modules_to_save`), which stand in for
    the base's while the base module runs, in the layers that `saved_layers` names. `parts` holds other adapters that
    it took over.

    Trained leaves are copies: a train step may donate them, and neither a base leaf nor a constant may go with them.
    """

    strength: AdapterConstant  # where `jpeft.scale` set one; one per layer
    layer_index: AdapterConstant  # in a stack that jpeft does not run itself, if the method depends on the layer
    order: int = 0  # among the adapters of its module
    on: AdapterConstant  # in a bank: False in the slot without an adapter; one per layer

    def __init__(
        self,
        method: "Method",
        site: Site,
        start: Start,
        saved: Mapping[str, jax.Array],
        saved_layers: Mapping[str, tuple[bool, ...]],
        parts: Mapping[str, "Adapter"] | None = None,
    ):
        self.method = method
        self.site = site
        self.saved_layers = Frozen(saved_layers)
        for name, value in start.trainable.items():
            setattr(self, name, AdapterParam(jnp.copy(value)))
        for name, value in start.constants.items():
            setattr(self, name, AdapterConstant(value))
        self.saved = nnx.Dict({name: AdapterParam(jnp.copy(value)) for name, value in saved.items()})
        self.parts = nnx.Dict({name: part.frozen() for name, part in (parts or {}).items()})

    def frozen(self) -> "Adapter":
        """The same adapter with constants in the place of trained leaves.

        Raises:
          ValueError: it trains copies of the base's own leaves, which only an adapter that acts by itself can.
        """
        if self.saved:
            raise ValueError(
                f"the adapter {self.site.adapter!r} trains {', '.join(self.saved)} of {self.site.path or 'the model'} "
                "too, which another method cannot take over; adapt without bias= and modules_to_save="
            )
        leaves = {name: leaf[...] for name, leaf in vars(self).items() if isinstance(leaf, nnx.Variable)}
        return Adapter(self.method, self.site, Start({}, leaves), {}, {}, dict(self.parts))

    @property
    def acts(self) -> bool:
        """Whether the method's formula runs here, rather than only copies of leaves being trained."""
        return any(self.site.active)

    def where_on(self, new: Any, old: Any) -> Any:
        """`new`, or `old` where this is a bank's empty slot; what changed its shape passes (`Method.padded`)."""
        if not hasattr(self, "on"):
            return new
        if isinstance(new, tuple):
            return tuple(self.where_on(*pair) for pair in zip(new, old, strict=True))
        if new is None or old is None or new.shape != old.shape:
            return new
        on = self.on[...]
        return jnp.where(on.reshape(on.shape + (1,) * (new.ndim - on.ndim)), new, old.astype(new.dtype))

    @property
    def layer(self) -> jax.Array | None:
        """Index of the running layer, in a stack; None outside of one. The experts of a layer have one index.

        Raises:
          ValueError: a stack runs in a way that hides which of its layers it is in.
        """
        if not self.site.layers:
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

    @property
    def index(self) -> Any:
        """Which place of its adapter's this is, among those at seams of its kind: the place in a shared table."""
        return self.site.first if self.layer is None else self.site.first + self.layer

    @property
    def shared(self) -> Any:
        """What the adapter's method shares between all its places (`Method.share`), in the running call.

        Raises:
          ValueError: the place runs outside of a call of the adapted model.
        """
        if self.site.adapter not in current().shared:
            raise ValueError(
                f"{self.site.path} reads what its adapter {self.site.adapter!r} keeps at the model's root, and runs "
                "outside of a call of the model; call the adapted model itself"
            )
        return current().shared[self.site.adapter]

    def blend(self, old: jax.Array, new: jax.Array) -> jax.Array:
        """`old + strength (new - old)`: exactly `old` at 0 and `new` at 1; `new` where no strength is set."""
        if not hasattr(self, "strength"):
            return new
        dtype = wide(jnp.result_type(old, new))
        strength = self.strength[...].astype(dtype)
        strength = strength.reshape(strength.shape + (1,) * (new.ndim - strength.ndim))
        return (1 - strength) * old.astype(dtype) + strength * new.astype(dtype)

    def dropout(self, x: jax.Array, rate: float, what: str = "") -> jax.Array:
        """`x` with entries dropped while the call has a key; every adapter and every layer draws a mask of its own.

        So does every `what`, where one adapter drops several things.
        """
        if rate == 0.0 or current().key is None:
            return x
        path = f"{self.site.path}/{self.site.adapter}"
        return dropout(x, rate, f"{path}/{what}" if what else path, self.layer)


class Steering(NamedTuple):
    """A method's share in every update of the trainable tree, run inside the step by `jpeft.optimizer(tx, model=)`.

    Attributes:
      init: trainable -> the method's own state, a pytree of arrays.
      gradients: (gradients, state, trainable) -> (gradients, state), before the optimizer sees them.
      updates: (updates, gradients, state, trainable) -> (updates, state), before they are applied.
    """

    init: Callable[..., Any]
    gradients: Callable[..., tuple[Any, Any]]
    updates: Callable[..., tuple[Any, Any]]


class Method(abc.ABC):
    """A frozen dataclass whose fields are the method's options; its instances hash, so they live in the graphdef.

    A method changes what goes into a module (`before`), what comes out of it (`after`), or both. `kind` names it: in
    `METHODS`, in leaf paths, in selectors.
    """

    kind: ClassVar[str]
    #: Whether it can act on experts, whose matrices stand side by side (`seams.Grouped`).
    grouped: ClassVar[bool] = False

    @abc.abstractmethod
    def select(self, model_type: str | None) -> Targets | tuple[Targets, ...]:
        """Where the method wants to act; `model_type` (Hugging Face's word) picks its defaults.

        Several `Targets` are for several kinds of seam; what is said of copies (`modules_to_save`, `bias`) counts of
        the first alone.
        """

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        """First values of its leaves at `site`; `key` is this site's own."""
        return Start({})

    def beside(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Other methods that go on the model with it, before it and under its name: their kinds and options."""
        return ()

    def objection(self, adapter: Adapter, base: Any, company: Sequence[Adapter]) -> str | None:
        """Why it cannot work beside the other adapters of its module, if so; `company` holds all, in their order."""
        return None

    def start_shared(self, site: Site, model: Any, key: jax.Array) -> Start | None:
        """First values of the leaves that all its places, `site.members`, share; None where there are none."""
        return None

    def share(self, adapter: Adapter) -> Any:
        """What every place reads as `adapter.shared` during a call of the model, given the adapter of shared leaves."""
        return adapter

    def fold(self, adapter: Adapter) -> Folded | None:
        """The method that holds what this one, given its adapter of shared leaves, computes; or None."""
        return None

    def before(self, adapter: Adapter, base: Any, *inputs: Any) -> tuple[Any, ...]:
        """What goes into the base module in the place of `inputs`."""
        return inputs

    def after(self, adapter: Adapter, base: Any, y: Any, *inputs: Any) -> Any:
        """What comes out of the seam, given what the base module gave (`y`); `inputs` are the seam's own."""
        return y

    def attend(self, adapter: Adapter, base: Any, y: jax.Array, query: jax.Array) -> jax.Array:
        """As `after`, for an embedding read backwards as an output head: `y = query @ table.T`."""
        ((name, table),) = self.merge(adapter, base).items()
        own = getattr(base, name)[...]
        change = (table - own.astype(table.dtype)).astype(wide(query.dtype))
        return (y + query.astype(change.dtype) @ change.T).astype(y.dtype)

    def asked(self, adapter: Adapter, base: Any, query: jax.Array) -> jax.Array:
        """There, what the table and the adapters before this one are asked in the place of `query`: itself, or for a
        method that scales what they give together, the query scaled."""
        return query

    def steer(self, adapters: Mapping[str, Adapter]) -> "Steering | None":
        """What it does to every update, given its adapters by the path in front of their leaves; None for nothing."""
        return None

    def penalty(self, adapter: Adapter) -> jax.Array | None:
        """What the adapter's own leaves add to a training loss, a scalar over all layers; None where nothing."""
        return None

    def depends_on_layer(self, site: Site) -> bool:
        """Whether what it computes at a stacked `site` differs between layers by more than the leaves."""
        return False

    def merge(self, adapter: Adapter, base: Any) -> Mapping[str, jax.Array]:
        """New values for the base module's own leaves, by attribute, that do what the adapter does.

        Raises:
          ValueError: there are none.
        """
        raise ValueError(
            f"{adapter.site.path or 'the model'}: {type(self).__name__} computes what no weights of the base can, so "
            "it has no merged form; keep the adapter beside the base"
        )

    def padded(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple["Method", Mapping[str, Any]]:
        """How `adapter` stands beside others of its kind in a bank, where its leaves are padded with zeros to `shapes`.

        Returns:
          The method that runs all of them, in which no size or factor of a single one is left; and constants, with the
          site's leading axes, that tell it what the padded leaves mean. All zero, they mean that there is no adapter.
          By default the method as it is, for nothing in which its adapters could differ.
        """
        return self, {}

    def factors(self, adapter: Adapter, base: Any) -> tuple[jax.Array, jax.Array] | None:
        """`[*lead, d_in, n]` and `[*lead, n, d_out]`, whose product is all that `merge` adds to the kernel's matrix.

        None, the default, where the method has no such product; the change is then read off `merge`.
        """
        return None

    def on_the_way_in(self, site: Site) -> bool:
        """Whether it acts by `before`: of several methods the one that acts first is then merged last."""
        return False

    @abc.abstractmethod
    def count(self, site: Site) -> tuple[int, int]:
        """(trainable parameters, base parameters whose effective value changes) at `site`, by formula.

        Of the site of shared leaves (`site.seam == "model"`), where there is one, those leaves.
        """

    def __or__(self, other: "Method | Hybrid") -> "Hybrid":
        return Hybrid((self,)) | other


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """Several methods on one model, put there in this order: `LoRA(...) | PromptTuning(...)`."""

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        wrong = [method for method in self.methods if not isinstance(method, Method)]
        if wrong or not self.methods:
            raise TypeError(f"a hybrid is made of jpeft methods, got {wrong[0] if wrong else 'none'!r}")

    def __or__(self, other: "Method | Hybrid") -> "Hybrid":
        more = other.methods if isinstance(other, Hybrid) else (other,)
        return Hybrid((*self.methods, *more))

    def named(self, name: str | None) -> tuple[tuple[str, Method], ...]:
        """The methods with a name each: their kinds, after `name` where one is given, numbered where one repeats."""
        seen: dict[str, int] = {}
        named = []
        for method in self.methods:
            own = method.kind if name is None else f"{name}_{method.kind}"
            seen[own] = seen.get(own, 0) + 1
            named.append((own if seen[own] == 1 else f"{own}_{seen[own]}", method))
        return tuple(named)
