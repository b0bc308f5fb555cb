# SPDX-License-Identifier: Apache-2.0
"""(IA)³: learned vectors that scale keys, values and the feed-forward block (Liu et al. 2022, arXiv:2205.05638).

    a target:                 y = (x W + b) * l        l [d_out], the bias is scaled with the rest
    a feed-forward target:    y = (x * l) W + b        l [d_in]

All vectors start at one, exactly the base. The paper scales the hidden activation, `(gamma(x W1) * l) W2`, which is
the input of the second feed-forward projection. Where the vectors sit by default is a matter of `placement`:

  "peft"        PEFT's modules, by the model's type. For Llama and Mistral these are the paper's; for BERT and DeBERTa
                the input of the attention's output projection is scaled too, and for Qwen and Gemma queries in the
                place of keys.
  "paper"       keys, values, and the input of the second feed-forward projection alone.
  "adapterhub"  keys, values, and the output of the first feed-forward projection BEFORE the activation, so that
                `gamma((x W1 + b1) * l)`: another function, except in a gated block, whose up projection is linear.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import seams
from .._fields import names, one_of, selection
from .._matching import matches
from .._method import Method, Site, Start, Targets, wide

_LIKE_QWEN = ("qwen2", "qwen3", "gemma2", "gemma3_text")
_ENCODERS, _DECODERS = ("bert", "roberta", "xlm-roberta"), ("llama", "mistral", *_LIKE_QWEN)

#: What is scaled, by placement and model type.
TARGETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "peft": {
        **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
        **dict.fromkeys(_LIKE_QWEN, ("q_proj", "v_proj", "down_proj")),
        **dict.fromkeys(("bert", "roberta"), ("key", "value", "output.dense")),
        "deberta-v2": ("key_proj", "value_proj", "output.dense"),
        "gpt2": ("c_attn", "mlp.c_proj"),
        "t5": ("k", "v", "wo"),
    },
    "paper": {
        **dict.fromkeys(_DECODERS, ("k_proj", "v_proj", "down_proj")),
        **dict.fromkeys(_ENCODERS, ("key", "value", "layers/output/dense")),
        "deberta-v2": ("key_proj", "value_proj", "layers/output/dense"),
        "t5": ("k", "v", "wo"),
    },
    "adapterhub": {
        **dict.fromkeys(_DECODERS, ("k_proj", "v_proj", "up_proj")),
        **dict.fromkeys(_ENCODERS, ("key", "value", "intermediate.dense")),
        "deberta-v2": ("key_proj", "value_proj", "intermediate.dense"),
    },
}

#: Second projections of feed-forward blocks, in the models above (with PEFT's `output.dense`, the attention's too).
FEEDFORWARD = ("down_proj", "output.dense", "mlp.c_proj", "wo")


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Learned vectors on keys, values and the feed-forward block, with PEFT's meanings and defaults.

    Args:
      targets: what is scaled, as of `jpeft.LoRA`; None for the default of the model's type and `placement`.
      feedforward: those of the targets whose input is scaled, and not their output; () for none. None for those that
        are the second projection of a feed-forward block in the models whose defaults are known.
      placement: `"peft"`, `"paper"` or `"adapterhub"`: which defaults.
      layers, exclude, modules_to_save: as of `jpeft.LoRA`.

    Example:
      >>> jpeft.IA3()
      >>> jpeft.IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"])
    """

    kind: ClassVar[str] = "ia3"

    targets: Any = None
    feedforward: Any = None
    placement: str = "peft"
    layers: Any = None
    exclude: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        selection(self)
        object.__setattr__(self, "feedforward", names("feedforward", self.feedforward))
        one_of("IA3", "placement", self.placement, TARGETS)
        if self.placement != "peft" and self.targets is not None and self.feedforward is not None:
            raise ValueError(f"placement={self.placement!r} picks defaults, and targets= and feedforward= leave none")
        if isinstance(self.feedforward, str) and "/" in self.feedforward:
            raise ValueError(
                f"feedforward as a regular expression is one for names, got the path {self.feedforward!r}; list paths"
            )
        if self.targets is not None:
            self._check_feedforward(self.targets)

    def select(self, model_type: str | None) -> Targets:
        known = TARGETS[self.placement]
        unknown = "targets=" if self.targets is None else "feedforward=" if self.feedforward is None else ""
        if unknown and model_type not in known:
            raise ValueError(
                f"IA3 knows no default {unknown[:-1]} of placement {self.placement!r} for model type {model_type!r} "
                f"(it does for {', '.join(known)}); pass {unknown}"
            )
        targets = known[model_type] if self.targets is None else self.targets  # type: ignore[index]
        self._check_feedforward(targets)
        patterns = (self.feedforward,) if isinstance(self.feedforward, str) else ()
        return Targets(targets, self.exclude, self.layers, self.modules_to_save, patterns=patterns)

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        projection = seams.projection(base)
        size = site.d_in if self.on_the_way_in(site) else site.d_out
        if self.on_the_way_in(site) and not isinstance(projection, seams.Matmul):
            raise ValueError(
                f"{site.path} is a {type(projection).__name__.lower()}, whose input is no vector to be scaled; leave "
                "it out of feedforward="
            )
        return Start({"scale": jnp.ones((*site.lead, size), wide(getattr(base, projection.kernel).dtype))})

    def before(self, adapter: Any, base: Any, *inputs: Any) -> tuple[Any, ...]:
        if not self.on_the_way_in(adapter.site):
            return inputs
        x = jnp.asarray(inputs[0])
        scaled = seams.projection(base).scale_input(base, x.astype(wide(x.dtype)), self._running(adapter))
        return scaled.astype(x.dtype), *inputs[1:]

    def after(self, adapter: Any, base: Any, y: jax.Array, *inputs: Any) -> Float[Array, "..."]:
        if self.on_the_way_in(adapter.site):
            return y
        scaled = seams.projection(base).scale_output(base, y.astype(wide(y.dtype)), self._running(adapter))
        return scaled.astype(y.dtype)

    def asked(self, adapter: Any, base: Any, query: jax.Array) -> Float[Array, "..."]:
        return self.after(adapter, base, query)

    def attend(self, adapter: Any, base: Any, y: jax.Array, query: jax.Array) -> Float[Array, "..."]:
        return y  # of the scaled query

    def merge(self, adapter: Any, base: Any) -> Mapping[str, jax.Array]:
        site, projection = adapter.site, seams.projection(base)
        active = jnp.asarray(site.active).reshape(*site.lead, 1)
        scale = jnp.where(active, adapter.scale[...], 1.0)
        matrix, bias = projection.read(base), projection.read_bias(base)
        matrix = matrix.astype(wide(matrix.dtype))
        if self.on_the_way_in(site):
            return {projection.kernel: projection.unmatrix(base, matrix * scale[..., None])}
        merged = {projection.kernel: projection.unmatrix(base, matrix * scale[..., None, :])}
        if bias is not None:
            merged[str(projection.bias)] = bias.astype(scale.dtype) * _like_bias(site, base, bias, scale)
        return merged

    def on_the_way_in(self, site: Site) -> bool:
        """Whether the input is scaled: `site` is a feed-forward target."""
        wanted = self._feedforward()
        inside = {matches(wanted, n, site.path) for n, on in zip(site.names, site.active, strict=True) if on}
        if len(inside) > 1:
            raise ValueError(
                f"feedforward={wanted!r} matches {site.path} in some of its layers only; adapt these by a second IA3"
            )
        return inside == {True}

    def depends_on_layer(self, site: Site) -> bool:
        return not all(site.active)

    def count(self, site: Site) -> tuple[int, int]:
        inward, layers = self.on_the_way_in(site), sum(site.active)
        bias = site.d_out if site.bias and not inward else 0
        return layers * (site.d_in if inward else site.d_out), layers * (site.d_in * site.d_out + bias)

    def _feedforward(self) -> Any:
        if self.feedforward is None:
            return () if self.placement == "adapterhub" else FEEDFORWARD
        return self.feedforward

    def _check_feedforward(self, targets: Any) -> None:
        """Every listed entry of `feedforward` is one of the listed targets, as in PEFT."""
        listed = isinstance(targets, tuple) and isinstance(self.feedforward, tuple)
        odd = [entry for entry in self.feedforward if entry not in targets] if listed else []
        if odd:
            raise ValueError(f"feedforward {odd[0]!r} is none of the targets {', '.join(targets)}; name it there too")

    def _running(self, adapter: Any) -> jax.Array:
        """The vector of the running layer; ones where the layer is not adapted."""
        scale, active = adapter.scale[...], adapter.site.active
        return scale if all(active) else jnp.where(jnp.asarray(active)[adapter.layer], scale, 1.0)


def _like_bias(site: Site, base: Any, bias: jax.Array, scale: jax.Array) -> jax.Array:
    """`scale` `[*lead, d_out]` in the layout and shape of `bias`."""
    if bias.size != scale.size:
        raise ValueError(
            f"{site.path} adds a bias of {bias.size} entries to {scale.size} outputs, and IA3 scales every output by "
            "its own factor, so it has no merged form"
        )

    def laid(scale: jax.Array) -> jax.Array:
        return seams.projection(base).scale_output(base, jnp.ones((), scale.dtype), scale)

    for _ in site.lead:
        laid = jax.vmap(laid)
    return laid(scale).reshape(bias.shape)
