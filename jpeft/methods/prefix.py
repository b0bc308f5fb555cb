# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190): keys and values before the text's.

  attention(q, [k_l; k], [v_l; v])                  k_l, v_l [num_tokens, kv_heads, d_head], of layer l

With a projection they are computed, once per call: `linear(tanh(linear(e)))`, `e [num_tokens, kv_heads · d_head]`.
`jpeft.fold` evaluates it away. All layers' stand in one table, as PEFT has it: `[num_tokens, 2 · layers, kv_heads,
d_head]`, of layer l the keys at 2l and the values at 2l + 1, the keys as they are after the rotary embedding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._fields import extent, indices, names, one_of
from .._method import Adapter, Folded, Method, Site, Start, Targets
from .._scope import current, fold_path
from .._text import check_gate, gate
from ._packed import each
from ._virtual_tokens import Virtual, apply_linear, chosen, in_front, linear, moved, padded, places


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Method):
    """Prefix tuning: every query of a layer sees trained keys and values, whatever its segment or window.

    One prefix serves all the examples of a packed row, exactly; with a gate, which is each example's own, each has a
    copy (in a compiled program `jpeft.max_segments` says for how many there is room). The text's positions stay what
    they are.

    Args:
      num_tokens: length of the prefix.
      projection: compute all layers' keys and values by a network of two layers.
      hidden_size: its inner width; None for kv_heads · d_head, as PEFT.
      init: `"normal"` (std 1; the network as torch's) or `"zero"` (keys and values zero: still no identity, for a zero
        key takes its share of the attention).
      gate: times a number per example, the mean over its text of sigmoid(x · w + b), as in UniPELT; of each layer its
        own.
      shift_positions: move the text's positions up by num_tokens, as PEFT does, whose prefix counts as a past.
      blocks: of which attentions: `"attention"`, `"cross_attention"`, or both; None for all.
      layers, modules_to_save: as of `jpeft.LoRA`.

    Example:
      >>> jpeft.PrefixTuning(num_tokens=20, projection=True, hidden_size=512)
    """

    kind: ClassVar[str] = "prefix_tuning"

    num_tokens: int = 20
    projection: bool = False
    hidden_size: int | None = None
    init: str = "normal"
    gate: bool = False
    shift_positions: bool = False
    blocks: Any = ("attention",)
    layers: Any = None
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        extent("PrefixTuning", "num_tokens", self.num_tokens)
        one_of("PrefixTuning", "init", self.init, ("normal", "zero"))
        for field in ("projection", "gate", "shift_positions"):
            one_of("PrefixTuning", field, getattr(self, field), (True, False))
        if self.hidden_size is not None:
            extent("PrefixTuning", "hidden_size", self.hidden_size)
            if not self.projection:
                raise ValueError("PrefixTuning's hidden_size is of the projection; pass projection=True")
        blocks = chosen("PrefixTuning", self.blocks, ("attention", "cross_attention"))
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "layers", indices(self.layers))
        object.__setattr__(self, "modules_to_save", names("modules_to_save", self.modules_to_save))

    def select(self, model_type: str | None) -> tuple[Targets, ...]:
        keys_values = Targets(
            ".*", layers=self.layers, modules_to_save=self.modules_to_save, seam="keys_values", blocks=self.blocks
        )
        return (keys_values, Targets(".*", seam="input")) if self.shift_positions else (keys_values,)

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        if not self.gate or site.seam != "keys_values":
            return Start({})
        weight = 0.02 * jax.random.normal(key, (*site.lead, site.d_in, 1))
        return Start({"gate_weight": weight, "gate_bias": jnp.zeros((*site.lead, 1))})

    def start_shared(self, site: Site, model: Any, key: jax.Array) -> Start:
        if self.gate:
            check_gate(model)
        layers, width, heads = places(site, "keys_values")
        size = 2 * layers * width
        if not self.projection:
            prefix = jax.random.normal(key, (self.num_tokens, 2 * layers, heads, width // heads))
            return Start({"prefix": jnp.zeros_like(prefix) if self.init == "zero" else prefix})
        hidden = self.hidden_size or width
        leaves = {"embedding": jax.random.normal(fold_path(key, "embedding"), (self.num_tokens, width))}
        up = linear(key, "up", hidden, size)
        if self.init == "zero":
            up = jax.tree.map(jnp.zeros_like, up)
        return Start(leaves | linear(key, "down", width, hidden) | up)

    def share(self, adapter: Any) -> Virtual:
        """Tokens `[layers, tokens, 2, kv_heads, d_head]`."""
        table = self._table(adapter)
        tokens, _, heads, d_head = table.shape
        both = table.reshape(tokens, -1, 2, heads, d_head).swapaxes(0, 1)
        return Virtual(both, adapter.present[...] if hasattr(adapter, "present") else None)

    def before(self, adapter: Adapter, base: Any, *inputs: Any) -> tuple[Any, ...]:
        if adapter.site.seam != "input":
            return inputs
        e, positions, mask, segments = inputs
        return e, moved(positions, adapter.shared, base, e.shape[1], segments), mask, segments

    def after(self, adapter: Any, base: Any, y: Any, *inputs: Any) -> Any:
        if adapter.site.seam != "keys_values":
            return y
        k, v, mask = y
        virtual = adapter.shared
        prefix = virtual.tokens[adapter.index].swapaxes(0, 1)[:, None]  # [2, 1, tokens, kv_heads, d_head]
        seen = jnp.ones((len(k), 1), bool)
        if self.gate:
            x = inputs[3]
            gates = gate(x, adapter.gate_weight[...], adapter.gate_bias[...])
            gates, seen = (gates[..., 0], seen) if current().segments is None else _of_examples(gates)
            prefix = prefix[:, :, None] * gates[None, :, :, None, None, None]  # [2, batch, copies, tokens, ...]
            prefix = prefix.reshape(2, len(k), -1, *prefix.shape[4:])
        front = (jnp.broadcast_to(p.astype(k.dtype), (len(k), *p.shape[1:])) for p in prefix)
        seen = jnp.repeat(seen, self.num_tokens, -1)
        hidden = virtual.present is not None or not all(adapter.site.active)
        if virtual.present is not None:
            copies = seen.shape[-1] // self.num_tokens
            seen &= jnp.broadcast_to(jnp.tile(virtual.present, copies), seen.shape)
        if not all(adapter.site.active):
            seen &= jnp.array(adapter.site.active)[adapter.layer]
        if mask is None and (hidden or seen.ndim > 2):
            mask = jnp.ones(k.shape[:2], bool)
        mask = in_front(*_alike(mask, seen))
        return *(jnp.concatenate(pair, 1) for pair in zip(front, (k, v), strict=True)), mask

    def padded(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        if adapter.site.seam != "model":
            return self, {}
        return padded(self, adapter, shapes["embedding" if self.projection else "prefix"][0])

    def depends_on_layer(self, site: Site) -> bool:
        return site.seam == "keys_values"

    def fold(self, adapter: Any) -> Folded | None:
        if not self.projection:
            return None
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        simpler = options | {"projection": False, "hidden_size": None}
        return Folded(self.kind, simpler, Start({"prefix": self._table(adapter)}))

    def count(self, site: Site) -> tuple[int, int]:
        if site.seam == "keys_values":
            return sum(site.active) * (site.d_in + 1) * self.gate, 0
        if site.seam != "model":
            return 0, 0
        _, width, _ = places(site, "keys_values")
        size = 2 * width * sum(sum(member.active) for member in site.members if member.seam == "keys_values")
        if not self.projection:
            return self.num_tokens * size, 0
        hidden = self.hidden_size or width
        return self.num_tokens * width + (width + 1) * hidden + (hidden + 1) * size, 0

    def _table(self, adapter: Any) -> Float[Array, "tokens layers kv_heads d_head"]:
        """All layers' keys and values, in PEFT's layout."""
        if not self.projection:
            return adapter.prefix[...]
        flat = apply_linear(adapter, "up", jnp.tanh(apply_linear(adapter, "down", adapter.embedding[...])))
        layers, _, heads = places(adapter.site, "keys_values")
        return flat.reshape(self.num_tokens, 2 * layers, heads, -1)


def _of_examples(
    gates: Float[Array, "batch seq 1"],
) -> tuple[Float[Array, "batch copies"], Bool[Array, "batch seq copies"]]:
    """The gates of a packed row's examples, of those of its tokens; and which tokens see the prefix of which example.

    In a compiled program, a row with more examples than `jpeft.max_segments` says has NaN for gates.
    """
    segments, text = current().segments, current().text
    owners = each(segments, text)
    own = (segments[:, :, None] == owners.ids[:, None]) & owners.there[:, None]
    found = jnp.take_along_axis(gates[..., 0], jnp.argmax(own & text[:, :, None], 1), 1)
    return jnp.where(owners.whole[:, None], found, jnp.nan), own


def _alike(mask: Any, seen: jax.Array) -> tuple[Any, jax.Array]:
    """Both `[batch, keys]`, or both `[batch, seq, keys]`."""
    if mask is None or mask.ndim == seen.ndim:
        return mask, seen
    if mask.ndim < seen.ndim:
        return jnp.broadcast_to(mask[:, None], (*seen.shape[:2], mask.shape[-1])), seen
    return mask, jnp.broadcast_to(seen[:, None], (*mask.shape[:2], seen.shape[-1]))
