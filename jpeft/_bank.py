# SPDX-License-Identifier: Apache-2.0
"""Many adapters of one base: stacked, picked by id, and run with another one for every row of a batch.

  bank = jpeft.bank([model_a, model_b])                     # slot 0 is the base, slot 1 model_a, slot 2 model_b
  y = jpeft.apply_bank(bank, ids, lambda model, x: model(x), x)          # row i by the adapter ids[i]

Adapters of different sizes (ranks, numbers of virtual tokens) are padded with zeros to the largest. What they differ
in beyond that, such as alpha, becomes a constant of each slot (`Method.padded`), so that one program runs all of them;
what is padding is multiplied by zero, and has no gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import core
from jaxtyping import Array, Float, Int

from ._graft import ADAPTERS, grafts
from ._method import Adapter, AdapterConstant, AdapterParam, Frozen, Method, Start
from ._partition import GraphDef, Leaves, combine, partition
from ._scope import scope

#: Options that say where a method acts and how it starts: read off the model's sites, and so no part of a bank.
_BEFORE = ("targets", "exclude", "layers", "modules_to_save", "bias", "init")

#: Where an adapter stands: path of its module, and its name there.
Place = tuple[str, str]

#: Of every place, the shape of each leaf.
Shapes = Mapping[Place, Mapping[str, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Own:
    """One adapter as it was before it came into the bank: its graphdef, and the shapes of its leaves, by path."""

    graphdef: GraphDef
    shapes: Frozen


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("trainable", "constants", "frozen"),
    meta_fields=("graphdef", "own"),
)
@dataclasses.dataclass(frozen=True)
class Bank:
    """Adapters of one base, a pytree: pass it through `jax.jit`, differentiate with respect to `trainable`.

    Attributes:
      graphdef: of the padded model that all slots share.
      trainable: leaves of the adapters by path, `[slots, ...]`.
      constants: what the adapters need and never train, `[slots, ...]`.
      frozen: the base, and constants that all adapters have in common; without a slot axis.
      own: what each adapter was, slot 0 left out.
    """

    graphdef: GraphDef
    trainable: Leaves
    constants: Leaves
    frozen: Leaves
    own: tuple[Own, ...]

    def __len__(self) -> int:
        return len(self.own) + 1

    def __repr__(self) -> str:
        return f"Bank({len(self)} slots, {len(self.trainable)} trainable leaves each)"

    def with_trainable(self, trainable: Leaves) -> "Bank":
        """The same bank with these leaves in the place of its own, as for `jax.grad`."""
        return dataclasses.replace(self, trainable=trainable)

    def combine(self, trainable: Leaves, constants: Leaves) -> Any:
        """The model of one slot, given its leaves as `select` picks them."""
        return combine(self.graphdef, trainable, {**self.frozen, **constants})

    def model(self, slot: int) -> Any:
        """The adapted model of one slot as it came, with its own method and sizes, and the bank's numbers.

        Raises:
          IndexError: there is no such slot, or it is slot 0, which holds no adapter.
        """
        if not 0 < slot < len(self):
            raise IndexError(f"adapters stand in the slots 1 to {len(self) - 1} of this bank (0 is the base), not {slot}")
        own = self.own[slot - 1]
        leaves = {**self.frozen, **{p: v[slot] for half in (self.trainable, self.constants) for p, v in half.items()}}
        cut = {path: leaves[path][tuple(map(slice, shape))] for path, shape in own.shapes.items()}
        cut = {path: cut.get(path, leaves.get(path)) for path in own.graphdef.paths}
        trained = own.graphdef.trainable
        halves = ({p: v for p, v in cut.items() if (p in trained) == half} for half in (True, False))
        return combine(own.graphdef, *halves)


def bank(adapters: Sequence[Any], frozen: Leaves | None = None) -> Bank:
    """Adapters of one base in one `Bank`: slot 0 is the base without any, slot i the i-th of them.

    They are of the same method (or the same composition) at the same places, and may differ in size and scale: LoRAs in
    rank and alpha, prompts in their number of tokens. Each slot computes exactly what its adapter does alone.

    Args:
      adapters: adapted models, or `(graphdef, trainable)` of `jpeft.partition`.
      frozen: the frozen half that goes with such pairs.

    Raises:
      ValueError: they differ in their places, in an option that one program cannot have twice, or in their base; a
        method cannot be left out in some rows of a batch.

    Example:
      >>> bank = jpeft.bank([model_a, model_b])
    """
    models = [_model(adapter, frozen) for adapter in adapters]
    if not models:
        raise ValueError("a bank needs at least one adapter")
    places = [_places(model) for model in models]
    _check_places(places)
    shapes = {at: _largest([place[at] for place in places]) for at in places[0]}
    slots = [partition(_slot(model, place, shapes, places)) for model, place in zip(models, places, strict=True)]
    _check_make([graphdef for graphdef, _, _ in slots])
    empty = partition(_slot(models[0], places[0], shapes, places, on=False))
    trainable = _stack([empty[1], *(own for _, own, _ in slots)])
    constants, common = _constants([empty[2], *(kept for _, _, kept in slots)])
    return Bank(slots[0][0], trainable, constants, common, tuple(map(_own, models)))


def select(bank: Bank, ids: Any) -> tuple[Leaves, Leaves]:
    """`(trainable, constants)` of the slots `ids`: of one, or with the leading axes of an array of them.

    What `bank.combine` takes; with an axis, under a `jax.vmap` over both. The gradient is added into the bank.

    Args:
      ids: slots, 0 for no adapter. Where they are traced they cannot be checked, and the leaves of one that is out of
        range are NaN.

    Raises:
      IndexError: there are no such slots.
      TypeError: they are no integers.

    Example:
      >>> model = bank.combine(*jpeft.select(bank, 2))
    """
    ids = _checked(ids, len(bank))
    halves = ({p: leaf.at[ids].get(mode="fill") for p, leaf in half.items()} for half in (bank.trainable, bank.constants))
    trainable, constants = halves
    return trainable, constants


def apply_bank(
    bank: Bank, ids: Int[Any, " batch"], call: Callable[..., Any], *inputs: Any, key: jax.Array | None = None
) -> Any:
    """`call(model, *row)` for every row of a batch, each with the adapter `ids` says; the base is not copied.

    Args:
      bank: as of `jpeft.bank`.
      ids: slot of every row, `[batch]`; 0 for the base alone.
      call: (model, *inputs) -> outputs, as for a batch of one row; trees of arrays with the batch axis first.
      *inputs: of all rows.
      key: turns dropout on; every row draws masks of its own.

    Raises:
      IndexError, TypeError: as `select`.
      ValueError: the inputs have another number of rows.

    Example:
      >>> logits = jpeft.apply_bank(bank, ids, lambda model, tokens: model(tokens), tokens)
    """
    trainable, constants = select(bank, ids)
    rows = {int(leaf.shape[0]) if leaf.ndim else 1 for leaf in jax.tree.leaves(inputs)} | {len(ids)}
    if len(rows) > 1 or jnp.ndim(ids) != 1:
        raise ValueError(
            f"one id for every row: ids has shape {jnp.shape(ids)}, the inputs have "
            f"{sorted({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)})} rows"
        )
    keys = None if key is None else jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(ids)))

    def one(trainable: Leaves, constants: Leaves, key: Any, row: Any) -> Any:
        with scope(key=key):
            out = call(bank.combine(trainable, constants), *jax.tree.map(lambda x: x[None], row))
        return jax.tree.map(lambda y: y[0], out)

    return jax.vmap(one)(trainable, constants, keys, inputs)


def vote(logits: Float[Array, "adapters *batch classes"], how: str = "majority") -> Int[Array, "*batch"]:
    """The class that several adapters agree on, as for an ensemble of prompts (Lester et al. 2021).

    Args:
      logits: of every adapter for the same examples.
      how: `"majority"`: the class that most adapters put first, the likelier one where two have as many; `"mean"`: the
        class with the highest mean probability.
    """
    if how not in ("majority", "mean"):
        raise ValueError(f"how must be majority or mean, got {how!r}")
    mean = jax.nn.softmax(logits.astype(jnp.float32)).mean(0)
    if how == "mean":
        return mean.argmax(-1)
    votes = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    return jnp.where(votes == votes.max(-1, keepdims=True), mean, -1.0).argmax(-1)


def _model(adapter: Any, frozen: Leaves | None) -> nnx.Module:
    if isinstance(adapter, nnx.Module):
        return adapter
    if isinstance(adapter, tuple) and len(adapter) == 2 and isinstance(adapter[0], GraphDef):
        if frozen is None:
            raise ValueError("pairs (graphdef, trainable) need the frozen half too: bank(pairs, frozen)")
        return combine(*adapter, frozen)
    raise TypeError(f"a bank takes adapted models, or (graphdef, trainable) pairs; got {type(adapter).__name__}")


def _places(model: nnx.Module) -> dict[Place, Adapter]:
    return {(path, name): adapter for path, module in grafts(model) for name, adapter in module.adapters.items()}


def _leaves(adapter: Adapter, kind: type = nnx.Variable) -> dict[str, jax.Array]:
    return {name: leaf[...] for name, leaf in vars(adapter).items() if isinstance(leaf, kind)}


def _largest(adapters: list[Adapter]) -> dict[str, tuple[int, ...]]:
    """The shapes to which the leaves of one place are padded.

    Raises:
      ValueError: a leaf has another number of axes in one of them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in adapters:
        for name, leaf in _leaves(adapter).items():
            other = shapes.setdefault(name, leaf.shape)
            if len(other) != leaf.ndim:
                raise ValueError(f"{adapter.site.path}: {name} has the shapes {other} and {leaf.shape}")
            shapes[name] = tuple(map(max, other, leaf.shape))
    return shapes


def _slot(
    model: nnx.Module, place: Mapping[Place, Adapter], shapes: Shapes, places: list[dict[Place, Adapter]], on: bool = True
) -> nnx.Module:
    """`model` with its adapters as they stand in a bank; without their effect where not `on`."""
    model = nnx.clone(model)
    for path, module in grafts(model):
        for name in module.adapters:
            at = (path, name)
            module.adapters[name] = _padded(place[at], shapes[at], [other[at] for other in places], on)
    return model


def _padded(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], others: list[Adapter], on: bool) -> Adapter:
    site = adapter.site
    method, constants = others[0].method, {}  # where only copies are trained, no method runs
    if adapter.acts or site.seam == "model":
        method, constants = adapter.method.padded(adapter, shapes)
    if site.seam in ("keys_values", "input") and adapter.acts and not constants:
        raise ValueError(
            f"{type(method).__name__} does not say how its {site.seam} are left out of some rows of a batch "
            "(Method.padded), so it cannot stand in a bank"
        )
    method = _placed(method, others[0])
    extra = {"on": jnp.full(site.lead, on), **{n: v if on else jnp.zeros_like(v) for n, v in constants.items()}}
    trainable, kept = ({n: _pad(v, shapes[n]) for n, v in _leaves(adapter, kind).items()}
                       for kind in (AdapterParam, AdapterConstant))  # fmt: skip
    if "layer_index" in shapes and "layer_index" not in kept:  # another of them depends on the layer
        extra["layer_index"] = next(other.layer_index[...] for other in others if hasattr(other, "layer_index"))
    saved = {name: leaf[...] for name, leaf in adapter.saved.items()}
    return Adapter(method, site, Start(trainable, {**kept, **extra}), saved, adapter.saved_layers, dict(adapter.parts))


def _placed(method: Method, like: Adapter) -> Method:
    """`method` with the options that chose its places and start as `like` has them."""
    fields = {field.name for field in dataclasses.fields(method)} & {*_BEFORE}
    return dataclasses.replace(method, **{name: getattr(like.method, name) for name in fields})


def _pad(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(leaf, [(0, n - size) for size, n in zip(leaf.shape, shape, strict=True)])


def _check_places(places: list[dict[Place, Adapter]]) -> None:
    """All adapters are of the same methods at the same places."""
    first = places[0]
    if not first:
        raise ValueError("the first model carries no adapter; adapt it first (the base itself is slot 0 of every bank)")
    for i, other in enumerate(places[1:], 1):
        odd = sorted({*first} ^ {*other})
        if odd:
            path, name = odd[0]
            raise ValueError(
                f"the adapters 0 and {i} act at different places: {path or 'the root'} has {name!r} in one alone; a bank "
                "takes adapters of the same targets and names"
            )
        for at, adapter in other.items():
            if type(adapter.method) is not type(first[at].method):
                kinds = type(first[at].method).__name__, type(adapter.method).__name__
                raise ValueError(f"the adapters 0 and {i} are of different methods, {' and '.join(kinds)}")
            if adapter.site != first[at].site or adapter.saved_layers != first[at].saved_layers:
                raise ValueError(
                    f"the adapters 0 and {i} act in different layers of {at[0]}, or train copies of different leaves of "
                    "it; a bank takes adapters of the same targets, layers, bias and modules_to_save"
                )


def _check_make(graphdefs: list[GraphDef]) -> None:
    """All padded models are of one make."""
    first = graphdefs[0]
    for i, other in enumerate(graphdefs[1:], 1):
        if other == first:
            continue
        methods = [[n.method for _, m in grafts(_shell(g)) for n in m.adapters.values()] for g in (first, other)]
        for mine, theirs in zip(*methods, strict=True):
            for field in dataclasses.fields(mine) if mine != theirs else ():
                values = getattr(mine, field.name), getattr(theirs, field.name)
                if values[0] != values[1]:
                    raise ValueError(
                        f"the adapters 0 and {i} differ in {type(mine).__name__}'s {field.name} ({values[0]!r} and "
                        f"{values[1]!r}), which a bank has once for all"
                    )
        odd = sorted({*first.paths} ^ {*other.paths})
        raise ValueError(
            f"the adapters 0 and {i} are not of one make: " + (f"one alone has {odd[0]}" if odd else "their bases differ")
        )


def _shell(graphdef: GraphDef) -> Any:
    """The model of a graphdef with nothing in it."""
    return nnx.graph.unflatten(graphdef.nnx, [np.zeros(0)] * len(graphdef.paths))


def _stack(slots: list[Leaves]) -> Leaves:
    return {path: jnp.stack([slot[path] for slot in slots]) for path in slots[0]}


def _constants(slots: list[Leaves]) -> tuple[Leaves, Leaves]:
    """(adapters' constants, stacked; the base and the constants that are equal in all slots).

    Raises:
      ValueError: the bases differ.
    """
    stacked, common = {}, {}
    for path, value in slots[0].items():
        values = [slot[path] for slot in slots]
        if all(_same(value, other) for other in values):
            common[path] = value
        elif ADAPTERS in path.split("/"):
            stacked[path] = jnp.stack(values)
        else:
            raise ValueError(f"the adapters stand on different bases: {path} differs; load the base once for all of them")
    return stacked, common


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, core.Tracer) or isinstance(b, core.Tracer):
        raise ValueError("a bank is made of arrays, outside of jax.jit")
    return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())


def _own(model: nnx.Module) -> Own:
    graphdef, trainable, frozen = partition(model)
    leaves = {**trainable, **frozen}
    return Own(graphdef, Frozen({p: v.shape for p, v in leaves.items() if ADAPTERS in p.split("/")}))


def _checked(ids: Any, size: int) -> jax.Array:
    """Ids of slots, those out of range beyond the end."""
    found = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(f"ids of a bank's slots are integers, got {found.dtype}")
    if not isinstance(found, core.Tracer):
        wrong = np.asarray(found)[(np.asarray(found) < 0) | (np.asarray(found) >= size)]
        if wrong.size:
            raise IndexError(f"the bank has the slots 0 to {size - 1} (0 is the base); got {sorted({*wrong.tolist()})[:5]}")
    return jnp.where(found < 0, size, found)
