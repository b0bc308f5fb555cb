# SPDX-License-Identifier: Apache-2.0
"""Adapters brought to one make: padded to the largest, with constants for what else they differ in.

Padded and equal in everything static, they are slots of one program (`_bank`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._graft import grafts
from ._method import Adapter, AdapterConstant, AdapterParam, Method, Start
from ._partition import GraphDef

#: Options that say where a method acts and how it starts: read off the model's sites, and so no part of a slot.
_BEFORE = ("targets", "exclude", "layers", "modules_to_save", "bias", "init")

#: Where an adapter stands: path of its module, and its name there.
Place = tuple[str, str]
Places = dict[Place, Adapter]

#: Of every place, the shape of each leaf.
Shapes = Mapping[Place, Mapping[str, tuple[int, ...]]]


def slots(models: list[nnx.Module]) -> list[nnx.Module]:
    """The slots of a bank: `models[0]` with its adapters switched off, then every model with its own, all of one make.

    Raises:
      ValueError: as `jpeft.bank`.
    """
    found = [_places(model) for model in models]
    _check_places(found)
    shapes = {at: _largest([place[at] for place in found]) for at in found[0]}

    def slot(model: nnx.Module, on: bool) -> nnx.Module:
        model = nnx.clone(model)
        place = _places(model)
        made = {at: _joint(adapter, shapes[at], found[0][at].method) for at, adapter in place.items()}
        roots = {at[1]: made[at] for at, adapter in place.items() if adapter.site.seam == "model"}
        for path, module in grafts(model):
            for name in [*module.adapters]:
                at = (path, name)
                method, constants = made[at]
                if name in roots:  # the sizes are those of the leaves that all places share
                    method = roots[name][0]
                _check_left_out(place[at], {**constants, **roots.get(name, ({}, {}))[1]})
                module.adapters[name] = _padded(
                    place[at], method, constants, shapes[at], [other[at] for other in found], on
                )
        return model

    return [slot(models[0], False), *(slot(model, True) for model in models)]


def _places(model: nnx.Module) -> Places:
    """The adapters of a model."""
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


def _joint(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], like: Method) -> tuple[Method, Mapping[str, Any]]:
    """`Method.padded`; where only copies are trained no method runs, and any will do."""
    if not adapter.acts and adapter.site.seam != "model":
        return like, {}
    method, constants = adapter.method.padded(adapter, shapes)
    return _placed(method, like), constants


def _check_left_out(adapter: Adapter, constants: Mapping[str, Any]) -> None:
    if adapter.site.seam in ("keys_values", "input") and adapter.acts and not constants:
        raise ValueError(
            f"{type(adapter.method).__name__} does not say how its {adapter.site.seam} are left out of some rows of a "
            "batch (Method.padded), so it cannot stand in a bank"
        )


def _padded(
    adapter: Adapter,
    method: Method,
    constants: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    others: list[Adapter],
    on: bool,
) -> Adapter:
    """`adapter` as it stands in a slot."""
    site = adapter.site
    extra = {"on": jnp.full(site.layers, on), **{n: v if on else jnp.zeros_like(v) for n, v in constants.items()}}
    trainable, kept = ({n: _pad(v, shapes[n]) for n, v in _leaves(adapter, kind).items()}
                       for kind in (AdapterParam, AdapterConstant))  # fmt: skip
    if "layer_index" in shapes and "layer_index" not in kept:  # another of them depends on the layer
        extra["layer_index"] = next(other.layer_index[...] for other in others if hasattr(other, "layer_index"))
    if "strength" in shapes and "strength" not in kept:
        extra["strength"] = jnp.ones(shapes["strength"])
    saved = {name: leaf[...] for name, leaf in adapter.saved.items()}
    slot = Adapter(method, site, Start(trainable, {**kept, **extra}), saved, adapter.saved_layers, dict(adapter.parts))
    slot.order = adapter.order
    return slot


def _placed(method: Any, like: Method) -> Method:
    """`method` with the options that chose its places and start as `like` has them."""
    fields = {field.name for field in dataclasses.fields(method)} & {*_BEFORE}
    return dataclasses.replace(method, **{name: getattr(like, name) for name in fields})


def _pad(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if leaf.shape == shape:
        return leaf
    return jnp.pad(leaf, [(0, n - size) for size, n in zip(leaf.shape, shape, strict=True)])


def _check_places(found: list[Places]) -> None:
    """All adapters are of the same methods at the same places."""
    first = found[0]
    if not first:
        raise ValueError("the first model carries no adapter; adapt it first (the base itself is slot 0 of every bank)")
    for i, other in enumerate(found[1:], 1):
        odd = sorted({*first} ^ {*other})
        if odd:
            path, name = odd[0]
            raise ValueError(
                f"the adapters 0 and {i} act at different places: {path or 'the root'} has {name!r} in one alone; a "
                "bank takes adapters of the same targets and names"
            )
        for at, adapter in other.items():
            if type(adapter.method) is not type(first[at].method):
                kinds = type(first[at].method).__name__, type(adapter.method).__name__
                raise ValueError(f"the adapters 0 and {i} are of different methods, {' and '.join(kinds)}")
            if adapter.site != first[at].site or adapter.saved_layers != first[at].saved_layers:
                raise ValueError(
                    f"the adapters 0 and {i} act in different layers of {at[0]}, or train copies of different leaves "
                    "of it; a bank takes adapters of the same targets, layers, bias and modules_to_save"
                )


def check_make(graphdefs: list[GraphDef]) -> None:
    """All padded models are of one make."""
    first = graphdefs[0]
    for i, other in enumerate(graphdefs[1:], 1):
        if other == first:
            continue
        methods: Any = [[n.method for _, m in grafts(_shell(g)) for n in m.adapters.values()] for g in (first, other)]
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
            f"the adapters 0 and {i} are not of one make: "
            + (f"one alone has {odd[0]}" if odd else "their bases differ")
        )


def _shell(graphdef: GraphDef) -> Any:
    """The model of a graphdef with nothing in it."""
    return nnx.graph.unflatten(graphdef.nnx, [np.zeros(0)] * len(graphdef.paths))
