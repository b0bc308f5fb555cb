# SPDX-License-Identifier: Apache-2.0
"""What LoHa and LoKr have in common (LyCORIS): ranks and alphas by name, starts, and dropout of outputs.

Ranks that differ between the layers of a stack are padded to the largest, and the padding is multiplied by zero.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._fields import by_name, extent, positive, rate, selection
from .._matching import pattern_value
from .._method import Adapter, Site, Targets
from .._scope import fold_path
from ._default_targets import default_targets
from ._lora_start import per_layer


def check(method: Any) -> None:
    """Brings the common fields of `method`, which is being made, into one form.

    Raises:
      TypeError, ValueError: one of them is wrong.
    """
    name = type(method).__name__
    selection(method)
    for field in ("rank_pattern", "alpha_pattern"):
        object.__setattr__(method, field, by_name(name, field, getattr(method, field)))
    for rank in (method.rank, *method.rank_pattern.values()):
        extent(name, "rank", rank)
    for alpha in (method.alpha, *method.alpha_pattern.values()):
        positive(name, "alpha", alpha)
    for field in ("rank_dropout", "module_dropout"):
        rate(name, field, getattr(method, field))


def select(method: Any, model_type: str | None) -> Targets:
    """`Method.select` of both."""
    targets = default_targets(type(method).__name__, method.targets, model_type)
    patterns = (*method.rank_pattern, *method.alpha_pattern)
    return Targets(targets, method.exclude, method.layers, method.modules_to_save, patterns=patterns)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Rank and factor (alpha / rank) of every layer at a site; both 0 where the layer is not adapted."""

    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def alike(self) -> bool:
        """Whether all layers have the same."""
        return len({*self.ranks}) == len({*self.scales}) == 1

    def running(self, adapter: Any, dtype: Any) -> tuple[Any, Any]:
        """(factor, `[1, largest rank]` with 1 for a column and 0 for padding) of the running layer."""
        if hasattr(adapter, "scale"):  # in a slot of a bank
            scale = adapter.scale[...].astype(dtype)
            return scale.max(), (scale != 0).astype(dtype)[None]
        if self.alike:
            return self.scales[0], 1.0
        scales, columns = self._tables(dtype)
        return scales[adapter.layer], columns[adapter.layer][None]

    def stacked(self, adapter: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The same of all layers at once: `[*lead, 1, 1]` and `[*lead, 1, largest rank]`."""
        if hasattr(adapter, "scale"):
            scale = adapter.scale[...].astype(dtype)[..., None, :]
            return scale.max(-1, keepdims=True), (scale != 0).astype(dtype)
        scales, columns = self._tables(dtype)
        lead = adapter.site.lead
        return scales.reshape(*lead, 1, 1), columns.reshape(*lead, 1, -1)

    def _tables(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        used = np.arange(max(self.ranks)) < np.array(self.ranks)[:, None]
        return jnp.asarray(self.scales, dtype), jnp.asarray(used, dtype)


def ranks(method: Any, site: Site) -> Ranks:
    """Those of `method` at `site`."""
    named = (pattern_value(method.rank_pattern, name, method.rank) for name in site.names)
    alphas = (pattern_value(method.alpha_pattern, name, method.alpha) for name in site.names)
    kept = tuple(rank if acts else 0 for rank, acts in zip(named, site.active, strict=True))
    return Ranks(kept, tuple(alpha / rank if rank else 0.0 for alpha, rank in zip(alphas, kept, strict=True)))


def padded(method: Any, adapter: Adapter, rank: int) -> tuple[Any, dict[str, jax.Array]]:
    """`Method.padded`: one rank for all, and the factors, zero in the padding, as the leaf `scale` `[*lead, rank]`."""
    found = method.ranks(adapter.site)
    table = np.where(np.arange(rank) < np.array(found.ranks)[:, None], np.array(found.scales)[:, None], 0.0)
    plain = dataclasses.replace(method, rank=rank, alpha=rank, rank_pattern={}, alpha_pattern={})
    return plain, {"scale": jnp.asarray(table, jnp.float32).reshape(*adapter.site.lead, rank)}


def draw(site: Site, key: jax.Array, name: str, sizes: Sequence[int | None], fan_in: int | None, found: Ranks) -> Any:
    """The leaf `name`, uniform in ±1/sqrt(fan_in) (kaiming with a = sqrt 5), with the site's leading axes.

    Args:
      sizes: of a layer's matrix; None stands for the layer's rank, also as `fan_in`.
    """

    def one(key: jax.Array, rank: int) -> jax.Array:
        bound = (fan_in or rank) ** -0.5
        return jax.random.uniform(key, tuple(size or rank for size in sizes), minval=-bound, maxval=bound)

    padded = sizes.index(None) - 2 if None in sizes else None
    own = found.ranks if padded is not None else tuple(int(rank > 0) for rank in found.ranks)
    return per_layer(site, fold_path(key, name), own, one, -1 if padded is None else padded)


def dropped(method: Any, adapter: Adapter, delta: jax.Array, rescale: bool) -> jax.Array:
    """`delta` `[..., d_out]` without some of its outputs, the same ones for every token, or without all of them.

    Args:
      method: its `rank_dropout` is the probability for an output, its `module_dropout` for all together.
      rescale: divide by the part of the outputs that is kept.
    """
    if method.rank_dropout:
        ones = jnp.ones(delta.shape[-1:], delta.dtype)
        kept = (adapter.dropout(ones, method.rank_dropout, "outputs") > 0).astype(delta.dtype)
        kept = kept / jnp.maximum(kept.mean(), 1.0 / kept.size) if rescale else kept
        delta = delta * kept.reshape((1,) * (delta.ndim - 1) + (-1,))
    if method.module_dropout:
        delta = delta * (adapter.dropout(jnp.ones((), delta.dtype), method.module_dropout, "module") > 0)
    return delta
