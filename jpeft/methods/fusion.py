# SPDX-License-Identifier: Apache-2.0
"""AdapterFusion: attention over adapters that were trained before (Pfeiffer et al. 2021, arXiv 2005.00247).

With z what the adapters A_n read, u_n = A_n(z) without residual, r their residual and x the stream:

    a_n = softmax_n((z Q + q) · (u_n K + k))          Q, K, V [d_model, d_model]; no 1 / sqrt(d_model)
    y   = norm((sum_n a_n u_n) V + r + x)             V starts as the identity, with 1e-6 beside the diagonal

The second of two stages: the adapters are on the model already and are constants from here on. `penalty` pulls V to
the identity: regularization * ||I - V||², over all places, is part of the loss of `jpeft.train`, and for a loop of
your own `jpeft.penalty(model)` is to be added to the loss. V is not decayed: weight decay would pull it to zero.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._fields import indices, is_list, names, one_of, rate
from .._method import Adapter, Method, Site, Start, Targets, wide
from .._scope import fold_path
from ..seams import rows_times
from ._bottleneck import NEAR_ZERO, Bottleneck, only_where_active, plus, times

#: What V starts with beside its diagonal.
OFF_DIAGONAL = 1e-6


@dataclasses.dataclass(frozen=True)
class AdapterFusion(Method):
    """Attention over bottleneck adapters.

    Args:
      adapters: names of at least two adapters on the model, of one placement (Houlsby's with Houlsby's); their widths
        may differ.
      dynamic: mix by a trained value matrix V as well; False ("static") leaves it out.
      regularization: factor of ||I - V||²; 0 for none.
      dropout: probability of dropping a score before the softmax while training. (AdapterHub takes that of the base's
        attention, and cannot turn it off.)
      layers: indices of the layers to fuse; None for all. They must be those that the adapters act in.
      modules_to_save: as of `jpeft.LoRA`; a head that one of the adapters trains stays with it.

    Raises:
      ValueError: from `adapt`, where the adapters are missing, stand at different places, are no bottleneck adapters,
        or do more than fusion can keep (a gate, a norm behind, an invertible part).

    Example:
      >>> model = jpeft.adapt(model, jpeft.Pfeiffer(), name="nli", key=key)
      >>> model = jpeft.adapt(model, jpeft.Pfeiffer(), name="sentiment", key=key)      # fill in what was trained
      >>> model = jpeft.adapt(model, jpeft.AdapterFusion(adapters=("nli", "sentiment")), key=key)
    """

    kind: ClassVar[str] = "adapter_fusion"

    adapters: Any = ()
    dynamic: bool = True
    regularization: float = 0.01
    dropout: float = 0.0
    layers: Any = None
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        found = tuple(self.adapters) if is_list(self.adapters) else (self.adapters,)
        if len(found) < 2 or len({*found}) < len(found) or not all(isinstance(name, str) for name in found):
            raise ValueError(f"AdapterFusion's adapters must be two or more names of adapters, got {self.adapters!r}")
        object.__setattr__(self, "adapters", found)
        object.__setattr__(self, "layers", indices(self.layers))
        object.__setattr__(self, "modules_to_save", names("modules_to_save", self.modules_to_save))
        one_of("AdapterFusion", "dynamic", self.dynamic, (True, False))
        rate("AdapterFusion", "dropout", self.dropout)
        factor = self.regularization
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < float("inf"):
            raise ValueError(f"AdapterFusion's regularization must be a number of at least 0, got {factor!r}")

    def select(self, model_type: str | None) -> Targets:
        return Targets(
            ".*", layers=self.layers, modules_to_save=self.modules_to_save, seam="residual", absorb=self.adapters
        )

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        self._check([base.adapters[name] for name in self.adapters], site)
        square = (*site.lead, site.d_in, site.d_in)
        leaves = {}
        for name in ("query", "key"):
            leaves[name] = NEAR_ZERO * jax.random.normal(fold_path(key, name), square)
            leaves[f"{name}_bias"] = jnp.zeros(square[:-1])
        if self.dynamic:
            identity = jnp.eye(site.d_in)
            leaves["value"] = jnp.broadcast_to(jnp.where(identity == 1, 1.0, OFF_DIAGONAL), square)
        return Start(leaves)

    def _check(self, parts: list[Adapter], site: Site) -> None:
        for part in parts:
            name, method = part.site.adapter, part.method
            if not isinstance(method, Bottleneck):
                raise ValueError(f"AdapterFusion mixes bottleneck adapters; {name!r} is of {type(method).__name__}")
            if method.gate or method.ln_after:
                raise ValueError(
                    f"AdapterFusion mixes outputs before gate and norm, so {name!r} cannot keep its "
                    f"{'gate' if method.gate else 'ln_after'}; train it without"
                )
            if part.site.active != site.active:
                raise ValueError(
                    f"{site.path}: {name!r} acts in the layers {_where(part.site.active)} and the fusion in "
                    f"{_where(site.active)}; pass layers=, and fuse adapters of the same layers"
                )
        placements = {part.site.adapter: part.method.placement for part in parts}  # type: ignore[attr-defined]
        if len({*placements.values()}) > 1:
            raise ValueError(f"adapters to be fused must read and add alike, got placements {placements}")

    def before(self, adapter: Adapter, base: Any, *inputs: Any) -> tuple[Any, ...]:
        h, x = inputs
        if not self._placed(adapter).original_ln_after:
            return inputs
        z, residual = self._placed(adapter).read(h, x, lambda: base(h, x))
        return only_where_active(adapter, self._mixed(adapter, z, residual), h), x

    def after(self, adapter: Adapter, base: Any, y: Any, *inputs: Any) -> Any:
        h, x = inputs
        if self._placed(adapter).original_ln_after:
            return y
        z, residual = self._placed(adapter).read(h, x, lambda: y)
        return only_where_active(adapter, self._mixed(adapter, z, residual), y)

    def _placed(self, adapter: Adapter) -> Any:
        """The method of one of the fused adapters; all are placed alike."""
        return adapter.parts[self.adapters[0]].method

    def _mixed(self, adapter: Any, z: jax.Array, residual: jax.Array) -> jax.Array:
        parts = [adapter.parts[name] for name in self.adapters]
        u = jnp.stack([part.method.change(part, z) for part in parts], axis=-2)  # [..., adapters, d_model]
        query = plus(rows_times(z.astype(wide(z.dtype)), adapter.query[...]), adapter.query_bias[...])
        # q · (u K + k) = u · (q Kᵀ) + q · k: one product with K for all adapters.
        scores = jnp.einsum("...nd,...d->...n", u, rows_times(query, adapter.key[...].T))
        scores = scores + times(query, adapter.key_bias[...]).sum(-1, keepdims=True)
        weights = jax.nn.softmax(adapter.dropout(scores, self.dropout), axis=-1)
        mixed = jnp.einsum("...n,...nd->...d", weights, u)
        if self.dynamic:
            mixed = rows_times(mixed, adapter.value[...])
        return (residual + mixed).astype(residual.dtype)

    def penalty(self, adapter: Any) -> jax.Array | None:
        if not self.dynamic or not self.regularization or not adapter.acts:
            return None
        value = adapter.value[...]
        squares = jnp.square(
            value - jnp.eye(value.shape[-1], dtype=value.dtype).reshape((1,) * (value.ndim - 2) + (*value.shape[-2:],))
        ).sum((-2, -1))
        active = jnp.asarray(adapter.site.active).reshape(adapter.site.lead)
        return self.regularization * jnp.where(active, squares, 0).sum()

    def depends_on_layer(self, site: Site) -> bool:
        return self.dropout > 0 or not all(site.active)

    def on_the_way_in(self, site: Site) -> bool:
        return True

    def count(self, site: Site) -> tuple[int, int]:
        d = site.d_in
        return sum(site.active) * ((3 if self.dynamic else 2) * d * d + 2 * d), 0


def _where(active: tuple[bool, ...]) -> list[int]:
    return [layer for layer, acts in enumerate(active) if acts]
