# SPDX-License-Identifier: Apache-2.0
"""What methods with two factors, A [d_in, rank] and B [rank, d_out], have in common: LoRA, DoRA, AdaLoRA.

Ranks that differ between the layers of a stack are padded to the largest, and the padding is multiplied by zero: the
`table` of a site, `[layers, largest rank]`, holds the factor of every column of A, zero in the padding and in layers
that are not adapted.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import seams
from .._fields import by_name, extent, one_of, positive, rate, selection
from .._matching import pattern_value
from .._method import BIAS_CHOICES, Adapter, Site, Start, Targets, wide
from ._default_targets import default_targets
from ._lora_start import STARTS


def check_factors(method: Any) -> None:
    """Brings the fields of LoRA and DoRA into one form.

    Raises:
      ValueError, TypeError: one has a value that it cannot have.
    """
    check_selection(method)
    name = type(method).__name__
    for field in ("rank_pattern", "alpha_pattern"):
        object.__setattr__(method, field, by_name(name, field, getattr(method, field)))
    for rank in (method.rank, *method.rank_pattern.values()):
        extent(name, "rank", rank)
    for alpha in (method.alpha, *method.alpha_pattern.values()):
        positive(name, "alpha", alpha)
    one_of(name, "rslora", method.rslora, (True, False))
    one_of(name, "init", method.init, STARTS)


def check_selection(method: Any) -> None:
    """Brings the fields that say where such a method acts, and its dropout, into one form.

    Raises:
      ValueError, TypeError: one has a value that it cannot have.
    """
    selection(method)
    rate(type(method).__name__, "dropout", method.dropout)
    one_of(type(method).__name__, "bias", method.bias, BIAS_CHOICES)


def select(method: Any, model_type: str | None, patterns: tuple[str, ...] = ()) -> Targets:
    """`Method.select`, from the fields."""
    targets = default_targets(type(method).__name__, method.targets, model_type)
    return Targets(targets, method.exclude, method.layers, method.modules_to_save, method.bias, patterns)


def start(method: Any, site: Site, base: Any, key: jax.Array) -> Start:
    """The start that `init` names, in the adapters' dtype."""
    drawn = STARTS[method.init](site, base, key, ranks(method, site), scales(method, site))
    dtype = wide(getattr(base, seams.projection(base).kernel).dtype)
    parts = (drawn.trainable, drawn.constants)
    return Start(*({name: leaf.astype(dtype) for name, leaf in leaves.items()} for leaves in parts))


def ranks(method: Any, site: Site) -> tuple[int, ...]:
    """The rank in every layer; 0 where the layer is not adapted."""
    named = (pattern_value(method.rank_pattern, name, method.rank) for name in site.names)
    return tuple(rank if acts else 0 for rank, acts in zip(named, site.active, strict=True))


def scales(method: Any, site: Site) -> tuple[float, ...]:
    """The factor s = alpha / rank, or alpha / sqrt(rank), in every layer; 0 where the layer is not adapted."""
    alphas = (pattern_value(method.alpha_pattern, name, method.alpha) for name in site.names)
    roots = ((math.sqrt(rank) if method.rslora else rank) for rank in ranks(method, site))
    return tuple(alpha / root if root else 0.0 for alpha, root in zip(alphas, roots, strict=True))


def table(ranks: tuple[int, ...], scales: tuple[float, ...]) -> np.ndarray:
    """`[layers, largest rank]`: the factor of every column of A."""
    return np.where(np.arange(max(ranks)) < np.array(ranks)[:, None], np.array(scales)[:, None], 0.0)


def uniform(table: np.ndarray) -> bool:
    """Whether all layers are alike, without padding."""
    return bool((table == table[0, 0]).all())


def factors(adapter: Any, scale: Any) -> tuple[jax.Array, jax.Array]:
    """Two matrices of which the product is the change of the kernel, the scale in the first.

    With a start A0, B0 to subtract they are `s [A - A0 | A0]` and `[B ; B - B0]`, twice as long: no large terms cancel,
    and while A and B are the start, the product is exactly zero.
    """
    a, b = adapter.A[...], adapter.B[...]
    if hasattr(adapter, "A0"):
        a0, b0 = adapter.A0[...], adapter.B0[...]
        return jnp.concatenate([(a - a0) * scale, a0 * scale], -1), jnp.concatenate([b, b - b0], -2)
    return a * scale, b


def running_scale(adapter: Any, table: np.ndarray) -> Any:
    """The factors of the running layer: a number, or `[1, rank]`; in a slot of a bank they are a leaf."""
    if hasattr(adapter, "scale"):
        return adapter.scale[...][..., None, :]
    if uniform(table):
        return float(table[0, 0])
    return adapter.site.running(jnp.asarray(table, adapter.A.dtype), adapter.layer)[..., None, :]


def scale_of_all(adapter: Any, table: np.ndarray) -> jax.Array:
    """The factors of all layers at once, `[*lead, 1, rank]`."""
    if hasattr(adapter, "scale"):
        return adapter.scale[...][..., None, :]
    return jnp.asarray(table, adapter.A.dtype).reshape(*adapter.site.lead, 1, -1)


def padded(method: Any, adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, dict[str, jax.Array]]:
    """`Method.padded`: one rank for all, and the factors, zero in the padding, as the leaf `scale` `[*lead, rank]`."""
    scale, rank = scale_of_all(adapter, method.table(adapter.site))[..., 0, :], shapes["A"][-1]
    padding = [(0, 0)] * (scale.ndim - 1) + [(0, rank - scale.shape[-1])]
    plain = {"rank": rank, "alpha": rank, "rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return dataclasses.replace(method, **plain), {"scale": jnp.pad(scale, padding)}


def dropped(adapter: Adapter, base: Any, x: Any, rate: float) -> tuple[jax.Array, bool]:
    """What A reads, the input in the adapters' dtype with entries dropped, and whether any are; ids stay ids."""
    x = jnp.asarray(x)
    if isinstance(seams.projection(base), seams.Lookup):
        return x, False
    x = x.astype(wide(x.dtype))
    kept = adapter.dropout(x, rate)
    return kept, kept is not x


def change(base: Any, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The input times `a b` in the kernel's place, `[..., d_out]`."""
    projection = seams.projection(base)
    return projection.expand(base, projection.contract(base, x, a), b)
