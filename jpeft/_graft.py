# SPDX-License-Identifier: Apache-2.0
"""Grafting: a module object stays where it is, gains `adapters`, and its class becomes a subclass that runs them.

So base paths, `.kernel` and `isinstance` survive, and a model that nobody wrote for jpeft can be adapted. The
subclass is made once per class, which keeps graphdefs equal between models.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._method import Adapter
from ._scope import current, scope

#: The attribute that a grafted module gains.
ADAPTERS = "adapters"


#: The class attribute by which a grafted class remembers what it was.
_ORIGIN = "__grafted_from__"


#: Methods of a model, beside its call, in which its adapters run as well.
_ENTRIES = ("hidden", "logits", "pooled", "encode", "decode", "cache", "prefill", "step")


@functools.cache
def _grafted_type(base: type) -> type:
    """The subclass of `base` that runs adapters: in its call and, on an embedding, where its table is a head."""

    def __call__(self: Any, *inputs: Any, **options: Any) -> Any:
        acting = [adapter for adapter in adapters(self).values() if adapter.acts]
        running = with_saved(self)
        plain = running if running is not self else replace_leaves(self, {})  # what a method may call again
        with sharing(self, options.get("key")):
            if not acting:
                return base.__call__(running, *inputs, **options)
            bound = _signature(base).bind(self, *inputs, **options)  # an input may come by its keyword
            inputs = given = bound.args[1:]
            for adapter in acting:
                given = adapter.where_on(adapter.method.before(adapter, plain, *given), given)
            y = base.__call__(running, *given, **bound.kwargs)
            for adapter in acting:
                y = adapter.where_on(adapter.method.after(adapter, plain, y, *inputs), y)
            return y

    def attend(self: Any, query: jax.Array, *args: Any, **options: Any) -> jax.Array:
        plain = with_saved(self)
        acting, queries = [adapter for adapter in adapters(self).values() if adapter.acts], [query]
        for adapter in reversed(acting):  # what scales the table with all that stands before it scales their query
            query = queries[-1]
            queries.append(adapter.where_on(adapter.method.asked(adapter, plain, query), query))
        y = base.attend(plain, queries.pop(), *args, **options)  # type: ignore[attr-defined]
        for adapter in acting:
            y = adapter.where_on(adapter.method.attend(adapter, plain, y, queries.pop()), y)
        return y

    def entry(name: str) -> Any:
        def call(self: Any, *inputs: Any, **options: Any) -> Any:
            with sharing(self, options.get("key")):
                return getattr(base, name)(with_saved(self), *inputs, **options)

        return functools.wraps(getattr(base, name))(call)

    def __reduce__(self: Any) -> Any:
        return _rebuild, (base, dict(vars(self)))

    members = {_ORIGIN: base, "__call__": __call__, "__reduce__": __reduce__, "__module__": base.__module__}
    members |= {name: entry(name) for name in _ENTRIES if callable(getattr(base, name, None))}
    if hasattr(base, "attend"):
        members["attend"] = attend
    # One base class alone: with a mixin beside it the object layouts differ, and the class could not be swapped.
    return type(f"Grafted{base.__name__}", (base,), members)


@contextlib.contextmanager
def sharing(module: Any, key: Any = None) -> Iterator[None]:
    """Runs the block with what the adapters at `module`, a model's root, share between their places.

    `key` is the call's dropout key, where it has one of its own.
    """
    roots = {name: adapter for name, adapter in module.adapters.items() if adapter.site.seam == "model"}
    outer = current().shared
    if not roots or roots.keys() <= outer.keys():  # an inner entry of the same call
        yield
        return
    with scope(key=key):
        shared = {name: adapter.method.share(adapter) for name, adapter in roots.items()}
    with scope(shared={**outer, **shared}):
        yield


@functools.cache
def _signature(base: type) -> inspect.Signature:
    return inspect.signature(base.__call__)


def _rebuild(base: type, attributes: dict[str, Any]) -> Any:
    module = object.__new__(_grafted_type(base))
    vars(module).update(attributes)
    return module


def is_grafted(module: Any) -> bool:
    """Whether `module` carries adapters."""
    return _ORIGIN in vars(type(module))


def adapters(module: Any) -> Mapping[str, Adapter]:
    """The adapters that `module` carries, in the order in which they were put on, by name.

    NNX sorts what it rebuilds by name, so each adapter keeps its own number. None where the module has an attribute
    `adapters` of its own.
    """
    if not is_grafted(module):
        return {}
    return dict(sorted(module.adapters.items(), key=lambda item: item[1].order))


def base_type(module: Any) -> type:
    """The class that `module` had before any graft."""
    return vars(type(module)).get(_ORIGIN, type(module))


def graft(module: Any, name: str, adapter: Adapter) -> None:
    """Adds `adapter` under `name` to `module`, in place."""
    if not is_grafted(module):
        if hasattr(module, ADAPTERS):
            raise ValueError(
                f"{type(module).__name__} has an attribute {ADAPTERS!r} of its own, which a graft would hide; rename it"
            )
        setattr(module, ADAPTERS, nnx.Dict())
        _become(module, _grafted_type(type(module)))
    adapter.order = 1 + max((other.order for other in module.adapters.values()), default=-1)
    module.adapters[name] = adapter


def ungraft(module: Any) -> None:
    """Takes all adapters off `module`, in place, leaving no trace."""
    _become(module, base_type(module))
    attributes = vars(module)
    attributes.pop(ADAPTERS, None)
    nodes = attributes["_pytree__nodes"]  # NNX's own record of which attributes hold arrays
    attributes["_pytree__nodes"] = type(nodes)({name: node for name, node in nodes.items() if name != ADAPTERS})


def rebase(module: Any, new: type) -> None:
    """Gives `module` another class below its adapters, in place."""
    _become(module, _grafted_type(new) if is_grafted(module) else new)


def grafts(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of every grafted module."""
    for path, module in list(nnx.iter_modules(model)):
        if is_grafted(module):
            yield "/".join(map(str, path)), module


def with_saved(module: Any) -> Any:
    """The base module with its saved leaves in place; `module` itself where nothing is saved."""
    leaves = saved_leaves(module, running=True)
    return replace_leaves(module, leaves) if leaves else module


def saved_leaves(module: Any, *, running: bool) -> dict[str, jax.Array]:
    """What stands in for `module`'s own leaves: of one layer while a stack is running, else of all at once."""
    return {name: _in_its_layers(module, a, name, running) for a in module.adapters.values() for name in a.saved}


def _in_its_layers(module: Any, adapter: Adapter, name: str, running: bool) -> jax.Array:
    own, layers, lead = getattr(module, name)[...], adapter.saved_layers[name], adapter.site.lead
    saved = adapter.where_on(adapter.blend(own, adapter.saved[name][...]), own)
    if all(layers):
        return saved
    mask = adapter.site.running(layers, adapter.layer) if running else jnp.array(layers).reshape(lead)
    mask = mask.reshape(mask.shape + (1,) * (own.ndim - mask.ndim))
    return jnp.where(mask, saved, own.astype(saved.dtype))


def replace_leaves(module: Any, leaves: Mapping[str, jax.Array]) -> Any:
    """A shallow, ungrafted copy of `module` with these leaves, each in the dtype of the one that it stands for."""
    plain = object.__new__(type(module))
    vars(plain).update(vars(module))
    ungraft(plain)
    for name, value in leaves.items():
        leaf = getattr(module, name)
        vars(plain)[name] = leaf.replace(value.astype(leaf.dtype))
    return plain


def _become(module: Any, new: type) -> None:
    object.__setattr__(module, "__class__", new)  # past NNX, which would record it as an attribute
