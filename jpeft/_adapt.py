# SPDX-License-Identifier: Apache-2.0
"""Putting methods on a model and taking them off: `adapt`, `merge`, `strip`, each giving a new model; `penalty`."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import seams
from ._graft import adapters, graft, grafts, is_grafted, saved_leaves, sharing, ungraft
from ._method import Adapter, AdapterConstant, Hybrid, Method, Site, Start, wide
from ._quantize import dequantize
from ._scope import fold_path
from ._targets import Planned, plan
from ._walk import seam_sizes
from .methods import METHODS


def adapt(model: nnx.Module, method: Method | Hybrid, *, key: jax.Array, name: str | None = None) -> Any:
    """`model` with `method` on it: a new model that shares the base's arrays; the given one is untouched.

    The frozen half of the result is the base, leaf for leaf. Every leaf's first value depends on `key` and its own
    path alone, so another target changes no other's start. Adapting an adapted model composes, in order.

    Args:
      model: any NNX model: jpeft's own, or one made of `nnx.Linear`, `LinearGeneral`, `Einsum`, `Embed`, `Conv` or
        types told to `jpeft.register`.
      method: `jpeft.LoRA(...)` and its like, or several: `jpeft.LoRA(...) | jpeft.PromptTuning(...)`.
      key: PRNG key of the start.
      name: the adapter's name in leaf paths; the method's kind by default. Give one to put two of a kind on a model.

    Raises:
      TypeError: it is no model, no method or no key.
      ValueError: the selection matches nothing, in part, or something that the method does not fit; the name is
        taken.

    Example:
      >>> model = jpeft.adapt(model, jpeft.LoRA(rank=16, alpha=32, targets=["q_proj", "v_proj"]), key=jax.random.key(0))
    """
    if not isinstance(method, Method | Hybrid):
        several = "; of several make one: a | b" if isinstance(method, list | tuple) else ""
        raise TypeError(f"adapt takes a jpeft method such as jpeft.LoRA(...), got {method!r}{several}")
    if not isinstance(model, nnx.Module):
        raise TypeError(f"adapt takes an nnx.Module, got {type(model).__name__}")
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(f"adapt takes a PRNG key, as jax.random.key(0) is one, got {key!r}")
    model = nnx.clone(model)
    parts = ((method.kind if name is None else name, method),) if isinstance(method, Method) else method.named(name)
    for own, part in parts:
        for kind, options in part.beside():
            _put_on(model, METHODS[kind](**options), key, own)
        _put_on(model, part, key, own)
    return model


def _put_on(model: Any, method: Method, key: jax.Array, name: str) -> None:
    """Grafts `method` onto `model`, in place."""
    name = _checked_name(name)
    planned = plan(model, method)
    for at in planned:
        if name in adapters(at.found.module):
            raise ValueError(
                f"{at.found.path} already has an adapter {name!r}; pass another name= to put a second one there, or "
                "leave it out of targets="
            )
    sites = _sites(planned, name)
    for at, site in zip(planned, sites, strict=True):
        module = at.found.module
        parts = {part: adapters(module)[part] for part in at.absorbed}
        adapter = _adapter(at, site, method, fold_path(key, f"{site.path}/{name}"), parts)
        for part in parts:
            module.adapters.pop(part)
        graft(module, name, adapter)
        _check_company(module)
    for part in {part for at in planned for part in at.absorbed} & {*adapters(model)}:
        order = model.adapters[part].order
        model.adapters[part] = model.adapters[part].frozen()  # what its places share
        model.adapters[part].order = order
    members = tuple(site for site in sites if any(site.active))
    root = Site("", ("",), (False,), adapter=name, seam="model", members=members)
    start = method.start_shared(root, model, fold_path(key, name)) if members else None
    if start is not None:
        if name in adapters(model):
            raise ValueError(f"the model's root already has an adapter {name!r}; pass another name=")
        graft(model, name, Adapter(method, root, start, {}, {}))


def _check_company(module: Any) -> None:
    """Asks every adapter that acts on `module` whether it can work beside the others."""
    company = tuple(adapters(module).values())
    for adapter in company:
        reason = adapter.method.objection(adapter, module, company) if adapter.acts else None
        if reason is not None:
            raise ValueError(f"{adapter.site.path or 'the model'}: {reason}")


def merge(model: nnx.Module) -> Any:
    """The plain model that computes what the adapted one does, with no trace of jpeft left in it.

    Kernels are summed in float32 and keep the base's dtype: a bfloat16 base rounds the change to its own 8 bits. A
    quantized base is dequantized, with no code left: what the adapters were trained beside, not what it was before.

    Raises:
      ValueError: a method on the model has no merged form.
    """
    model = dequantize(model)
    with sharing(model) if is_grafted(model) else contextlib.nullcontext():
        for _, module in grafts(model):
            for name, value in saved_leaves(module, running=False).items():
                _set(getattr(module, name), value)
            for adapter in _merging_order(module):
                for name, value in adapter.method.merge(adapter, module).items():
                    _set(getattr(module, name), value)
    return strip(model)


def strip(model: nnx.Module) -> Any:
    """The base model, bit for bit, with every adapter left out."""
    model = nnx.clone(model)
    for _, module in grafts(model):
        ungraft(module)
    return model


def penalty(model: nnx.Module) -> jax.Array | None:
    """What the methods on `model` add to a training loss, such as AdapterFusion's regulariser; None where nothing.

    `jpeft.train.step.make_step` adds it to its loss, once per update; a loop of your own must.

    Example:
      >>> loss = lm_loss(model, batch) + (jpeft.penalty(model) or 0)
    """
    terms = [
        term
        for _, module in grafts(model)
        for adapter in adapters(module).values()
        if (term := adapter.method.penalty(adapter)) is not None
    ]
    return sum(terms[1:], terms[0]) if terms else None


def _sites(planned: list[Planned], name: str) -> list[Site]:
    """The sites of one adapter, in the model's order, each with the number of places before it."""
    places: dict[str, int] = {}
    sites = []
    for at in planned:
        found, acts = at.found, any(at.active)
        kind = seams.kind(found.module) or ""
        sizes = seam_sizes(found) if acts else seams.Sizes(found.lead, 0, 0)
        site = Site(
            found.path, found.names, at.active, sizes.lead, sizes.d_in, sizes.d_out, found.scanned, name,
            kind, sizes.block, sizes.heads, places.get(kind, 0), bias=acts and _has_bias(found.module),
            beside=seams.beside(found.module),
        )  # fmt: skip
        places[kind] = places.get(kind, 0) + len(found.names) * acts
        sites.append(site)
    return sites


def _has_bias(module: Any) -> bool:
    return seams.kind(module) == "projection" and seams.projection(module).read_bias(module) is not None


def _adapter(planned: Planned, site: Site, method: Method, key: jax.Array, parts: Mapping[str, Adapter]) -> Adapter:
    found, acts = planned.found, any(planned.active)
    start = method.start(site, found.module, key) if acts else Start({})
    saved = {leaf: _widened(getattr(found.module, leaf)[...]) for leaf in planned.saved}
    adapter = Adapter(method, site, start, saved, planned.saved, parts)
    partly = not all(all(layers) for layers in planned.saved.values())
    if site.layers and not found.scanned and (partly or (acts and method.depends_on_layer(site))):
        adapter.layer_index = AdapterConstant(jnp.arange(math.prod(site.layers)).reshape(site.layers))
    return adapter


def _merging_order(module: Any) -> list[Adapter]:
    """The acting adapters as they meet the kernel: those on the way in from the last to the first, then the rest."""
    acting = [adapter for adapter in adapters(module).values() if adapter.acts]
    inner = [adapter for adapter in acting if adapter.method.on_the_way_in(adapter.site)]
    return inner[::-1] + [adapter for adapter in acting if adapter not in inner]


def _widened(value: jax.Array) -> jax.Array:
    return value.astype(wide(value.dtype))


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"an adapter's name must be an identifier, for it is a part of leaf paths; got {name!r}")
    if hasattr(nnx.Dict, name):
        raise ValueError(
            f"an adapter cannot be named {name!r}, which means something else to an nnx.Dict; choose another"
        )
    return name


def _set(leaf: nnx.Variable, value: jax.Array) -> None:
    leaf.set_value(value.astype(leaf.dtype))
