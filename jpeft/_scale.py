# SPDX-License-Identifier: Apache-2.0
"""Adapters turned off, and turned up and down: `disable` and `scale`. Each returns a new model."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from . import seams
from ._adapt import strip
from ._graft import grafts, ungraft
from ._method import Adapter, AdapterConstant, Method, Site, wide

#: Seams at which methods add tokens, of which there is no part.
_ADDING = ("input", "keys_values")


def disable(model: nnx.Module, *names: str) -> Any:
    """`model` without these adapters, or without any.

    Raises:
      ValueError: it has no adapter of a name.

    Example:
      >>> base = jpeft.disable(model)
      >>> jpeft.disable(model, "lora")
    """
    if not names:
        return strip(model)
    model = nnx.clone(model)
    _check_names(model, names)
    for _, module in grafts(model):
        for name in names:
            module.adapters.pop(name, None)
        if not module.adapters:
            ungraft(module)
    return model


def scale(model: nnx.Module, factor: float | jax.Array, *names: str) -> Any:
    """`model` with the effect of these adapters, or of all, times `factor`.

    What an adapter makes of an input or output y becomes `y + factor (changed - y)`, and so do its merged weights and
    its copies of the base's leaves: 1 is the adapter and 0 the base, bit for bit. The factor is a frozen leaf, so a
    compiled program runs again with another. It replaces one that was set before.

    Args:
      model: an adapted model.
      factor: any finite number, or a scalar array.
      *names: of adapters; none for all.

    Raises:
      ValueError: it has no such adapter; the adapter puts tokens into the input, of which there is no part; the factor
        is no number.

    Example:
      >>> half = jpeft.scale(model, 0.5)
      >>> jpeft.scale(model, -1.0, "toxic")
    """
    value = _checked(factor)
    model = nnx.clone(model)
    _check_names(model, names)
    for path, module in grafts(model):
        for name, adapter in module.adapters.items():
            if not names or name in names:
                _scale(path, name, adapter, value)
    return model


@dataclasses.dataclass(frozen=True)
class Scaled(Method):
    """Another method, whose effect is multiplied by the adapter's `strength`.

    Args:
      method: that other.
    """

    kind: ClassVar[str] = "scaled"

    method: Method

    def select(self, model_type: str | None) -> Any:
        raise ValueError("an adapter is scaled by jpeft.scale, once it is on a model")

    def share(self, adapter: Adapter) -> Any:
        return self.method.share(adapter)

    def before(self, adapter: Adapter, base: Any, *inputs: Any) -> tuple[Any, ...]:
        return _blended(adapter, inputs, self.method.before(adapter, base, *inputs))

    def after(self, adapter: Adapter, base: Any, y: Any, *inputs: Any) -> Any:
        return _blended(adapter, y, self.method.after(adapter, base, y, *inputs))

    def attend(self, adapter: Adapter, base: Any, y: jax.Array, query: jax.Array) -> jax.Array:
        return _blended(adapter, y, self.method.attend(adapter, base, y, query))

    def asked(self, adapter: Adapter, base: Any, query: jax.Array) -> jax.Array:
        return _blended(adapter, query, self.method.asked(adapter, base, query))

    def padded(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        method, constants = self.method.padded(adapter, shapes)
        return Scaled(method), constants

    def depends_on_layer(self, site: Site) -> bool:
        return self.method.depends_on_layer(site)

    def merge(self, adapter: Adapter, base: Any) -> Mapping[str, jax.Array]:
        merged = self.method.merge(adapter, base)
        return {name: adapter.blend(getattr(base, name)[...], value) for name, value in merged.items()}

    def on_the_way_in(self, site: Site) -> bool:
        return self.method.on_the_way_in(site)

    def count(self, site: Site) -> tuple[int, int]:
        return self.method.count(site)


def _scale(path: str, name: str, adapter: Adapter, value: jax.Array) -> None:
    site = adapter.site
    if adapter.acts and site.seam in _ADDING:
        raise ValueError(
            f"the adapter {name!r} acts at a {seams.KINDS[site.seam]}, {path}: what it adds are tokens, and there is "
            "no part of a token; scale the others by name, or disable this one"
        )
    if not isinstance(adapter.method, Scaled):
        adapter.method = Scaled(adapter.method)
    adapter.strength = AdapterConstant(jnp.broadcast_to(value, site.layers))


def _blended(adapter: Adapter, old: Any, new: Any) -> Any:
    """`new` as far as the adapter's strength says; what is no array of numbers must be as it was."""
    if isinstance(old, tuple):
        return tuple(_blended(adapter, *pair) for pair in zip(old, new, strict=True))
    if new is old:
        return old
    if jnp.shape(old) != jnp.shape(new) or not jnp.issubdtype(jnp.result_type(new), jnp.floating):
        raise ValueError(
            f"the adapter {adapter.site.adapter!r} at {adapter.site.path or 'the model'} changes more than the values "
            "of what passes, and there is no part of that; it cannot be scaled"
        )
    return adapter.blend(old, new).astype(new.dtype)


def _check_names(model: nnx.Module, names: tuple[str, ...]) -> None:
    there = sorted({name for _, module in grafts(model) for name in module.adapters})
    unknown = [name for name in names if name not in there]
    if unknown or not there:
        wanted = f"adapter {unknown[0]!r}" if unknown else "adapter"
        raise ValueError(f"the model has no {wanted}; it has {', '.join(there) or 'none'}")


def _checked(factor: Any) -> jax.Array:
    if isinstance(factor, (bool, str)) or factor is None:
        raise ValueError(f"the factor must be a number, got {factor!r}")
    if isinstance(factor, (int, float)) and not math.isfinite(factor):
        raise ValueError(f"the factor must be finite, got {factor!r}")
    value = jnp.asarray(factor)
    if value.ndim:
        raise ValueError(f"the factor must be one number, got an array of the shape {list(value.shape)}")
    return value.astype(wide(value.dtype))
