# SPDX-License-Identifier: Apache-2.0
"""Putting methods on a model and taking them off: `adapt`, `merge`, `strip`. Each returns a new model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._graft import adapters, graft, grafts, saved_leaves, ungraft
from ._method import Adapter, AdapterConstant, Method, Site, Start, wide
from ._scope import fold_path
from ._targets import Planned, plan
from ._walk import dims


def adapt(model: nnx.Module, method: Method, *, key: jax.Array, name: str | None = None) -> Any:
    """`model` with `method` on it: a new model that shares the base's arrays; the given one is untouched.

    The frozen half of the result is the base, leaf for leaf. Every leaf's first value depends on `key` and its own
    path alone, so another target changes no other's start. Adapting an adapted model composes, in order.

    Args:
      model: any NNX model: jpeft's own, or one made of `nnx.Linear`, `LinearGeneral`, `Einsum`, `Embed`, `Conv` or
        types told to `jpeft.register`.
      method: `jpeft.LoRA(...)` and its like.
      key: PRNG key of the start.
      name: the adapter's name in leaf paths; the method's kind by default. Give one to put two of a kind on a model.

    Raises:
      ValueError: the selection matches nothing, in part, or something that the method does not fit; the name is
        taken.

    Example:
      >>> model = jpeft.adapt(model, jpeft.LoRA(rank=16, alpha=32, targets=["q_proj", "v_proj"]), key=jax.random.key(0))
    """
    if not isinstance(method, Method):
        raise TypeError(f"adapt takes a jpeft method such as jpeft.LoRA(...), got {method!r}")
    if not isinstance(model, nnx.Module):
        raise TypeError(f"adapt takes an nnx.Module, got {type(model).__name__}")
    name = _checked_name(method.kind if name is None else name)
    model = nnx.clone(model)
    for planned in plan(model, method):
        found = planned.found
        if name in adapters(found.module):
            raise ValueError(
                f"{found.path} already has an adapter {name!r}; pass another name= to put a second one there"
            )
        graft(found.module, name, _adapter(planned, method, name, fold_path(key, f"{found.path}/{name}")))
    return model


def merge(model: nnx.Module) -> Any:
    """The plain model that computes what the adapted one does, with no trace of jpeft left in it.

    Kernels are summed in float32 and keep the base's dtype: a bfloat16 base rounds the change to its own 8 bits.

    Raises:
      ValueError: a method on the model has no merged form.
    """
    model = nnx.clone(model)
    for _, module in grafts(model):
        for name, value in saved_leaves(module, running=False).items():
            _set(getattr(module, name), value)
        for adapter in module.adapters.values():
            if adapter.acts:
                for name, value in adapter.method.merge(adapter, module).items():
                    _set(getattr(module, name), value)
        ungraft(module)
    return model


def strip(model: nnx.Module) -> Any:
    """The base model, bit for bit, with every adapter left out."""
    model = nnx.clone(model)
    for _, module in grafts(model):
        ungraft(module)
    return model


def _adapter(planned: Planned, method: Method, name: str, key: jax.Array) -> Adapter:
    found, acts = planned.found, any(planned.active)
    lead, d_in, d_out = dims(found) if acts and method.seam == "projection" else (found.lead, 0, 0)
    site = Site(found.path, found.names, planned.active, lead, d_in, d_out, found.scanned, name)
    start = method.start(site, found.module, key) if acts else Start({})
    saved = {leaf: _widened(getattr(found.module, leaf)[...]) for leaf in planned.saved}
    adapter = Adapter(method, site, start, saved, planned.saved)
    partly = not all(all(layers) for layers in planned.saved.values())
    if lead and not found.scanned and (partly or (acts and method.depends_on_layer(site))):
        adapter.layer_index = AdapterConstant(jnp.arange(len(site.names)).reshape(lead))
    return adapter


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
