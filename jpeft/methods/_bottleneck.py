# SPDX-License-Identifier: Apache-2.0
"""What bottleneck adapters have in common: what they read, where their output goes, and the options of AdapterHub.

With h the block's output, x the residual stream, `norm` that of a post-norm model (in a pre-norm one the identity):

    z = norm(h + x)  or  h  or  x             what the adapter reads
    u = scale * (act(z down + b) up + c)      down [d_model, m], up [m, d_model]
    y = norm(r + u + x)                       r = h, or another residual around the adapter
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import _text
from .._fields import Frozen, indices, names, one_of, rate, several
from .._matching import layer_of
from .._method import Adapter, Method, Site, Start, Targets, wide
from .._scope import fold_path
from ..seams import rows_times
from ._lora_start import per_layer

#: Standard deviation of weights that start near zero.
NEAR_ZERO = 0.02
#: Of an adapter's own norms (torch's default).
EPS = 1e-5
#: The blocks whose output meets the residual stream.
BLOCKS = ("attention", "cross_attention", "mlp")

Linears = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5))),
    "gelu_new": jax.nn.gelu,
    "swish": jax.nn.silu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "leakyrelu": jax.nn.leaky_relu,
    "linear": lambda x: x,
}


@dataclasses.dataclass(frozen=True)
class Bottleneck(Method):
    """A two-layer network of small width at residual joins; what is adapted where, and how, its kinds say."""

    PARALLEL: ClassVar[bool] = False
    INITS: ClassVar[tuple[str, ...]] = ("bert", "mam", "houlsby")

    reduction_factor: Any = 16
    non_linearity: str = "relu"
    blocks: Any = ("mlp",)
    scaling: Any = 1.0
    dropout: float = 0.0
    init: str = "bert"
    gate: bool = False
    ln_before: bool = False
    ln_after: bool = False
    adapter_residual_before_ln: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: Any = True
    cross: bool = False
    invertible: str | None = None
    invertible_reduction_factor: float = 2
    layers: Any = None
    leave_out: Any = ()
    modules_to_save: Any = None

    def __post_init__(self) -> None:
        own = type(self).__name__
        object.__setattr__(self, "reduction_factor", _factors(own, self.reduction_factor))
        object.__setattr__(self, "blocks", several(own, "blocks", self.blocks))
        object.__setattr__(self, "layers", indices(self.layers))
        none = isinstance(self.leave_out, (tuple, list)) and not self.leave_out
        object.__setattr__(self, "leave_out", () if none else indices(self.leave_out, "leave_out") or ())
        object.__setattr__(self, "modules_to_save", names("modules_to_save", self.modules_to_save))
        one_of(own, "non_linearity", self.non_linearity, ACTIVATIONS)
        one_of(own, "init", self.init, self.INITS)
        one_of(own, "invertible", self.invertible, (None, "nice"))
        rate(own, "dropout", self.dropout)
        _positive(own, "invertible_reduction_factor", self.invertible_reduction_factor)
        if not isinstance(self.scaling, str) or self.scaling not in ("learned", "channel"):
            _positive(own, "scaling", self.scaling, " or 'learned' or 'channel'")
        for block in self.blocks:
            one_of(own, "blocks", block, BLOCKS)
        if not self.blocks:
            raise ValueError(f"{own}'s blocks is empty, so nothing would be adapted; name one of {', '.join(BLOCKS)}")
        for field in ("gate", "ln_before", "ln_after", "original_ln_before", "original_ln_after", "cross"):
            one_of(own, field, getattr(self, field), (True, False))
        self._check_residual(own)

    def _check_residual(self, own: str) -> None:
        one_of(own, "residual_before_ln", self.residual_before_ln, (True, False, "post_add"))
        one_of(own, "adapter_residual_before_ln", self.adapter_residual_before_ln, (True, False))
        if self.PARALLEL and (self.original_ln_before or self.residual_before_ln is not True):
            raise ValueError(
                f"{own} reads the stream itself and has no residual of its own; original_ln_before and "
                "residual_before_ln are of adapters that read a block's output (jpeft.Houlsby, jpeft.Pfeiffer)"
            )
        if self.residual_before_ln is not True and not self.original_ln_before:
            raise ValueError(
                f"{own}'s residual_before_ln={self.residual_before_ln!r} needs original_ln_before=True: without it the "
                "adapter reads the block's output, which is its residual"
            )
        if self.adapter_residual_before_ln and (self.PARALLEL or not self.ln_after):
            raise ValueError(
                f"{own}'s adapter_residual_before_ln=True needs an adapter with ln_after=True that is not parallel"
            )

    # Where ----------------------------------------------------------------------------------------------------------

    def select(self, model_type: str | None) -> tuple[Targets, ...]:
        blocks = dict.fromkeys((*self.blocks, *(("cross_attention",) if self.cross else ())))
        found = [
            Targets(
                ".*", layers=self.layers, modules_to_save=self.modules_to_save, seam="residual", blocks=(block,),
                leave_out=self.leave_out,
            )
            for block in blocks
        ]  # fmt: skip
        return (*found, *((Targets(".*", seam="input"),) if self.invertible else ()))

    def widths(self, site: Site) -> tuple[int, ...]:
        """The bottleneck's width m in every layer, `d_model // reduction_factor`; 0 where the layer is not adapted."""
        factors = [self._factor(name) if acts else math.inf for name, acts in zip(site.names, site.active, strict=True)]
        return tuple(max(1, int(site.d_in // f)) if f < math.inf else 0 for f in factors)

    def _factor(self, name: str) -> float:
        if not isinstance(self.reduction_factor, Frozen):
            return self.reduction_factor
        layer = layer_of(name)
        if layer not in self.reduction_factor and "default" not in self.reduction_factor:
            raise ValueError(f"reduction_factor has no entry for layer {layer} ({name}); add one, or a 'default'")
        return self.reduction_factor[layer if layer in self.reduction_factor else "default"]

    # Start ----------------------------------------------------------------------------------------------------------

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        if site.seam == "input":
            return Start(self._start_coupling(site, key))
        leaves = {**self.start_linears(site, key)}
        if isinstance(self.scaling, str):
            leaves["scale"] = jnp.ones((*site.lead, 1 if self.scaling == "learned" else site.d_in))
        for name, own in (("before", self.ln_before), ("after", self.ln_after)):
            if own:
                leaves |= {f"{name}_scale": jnp.ones((*site.lead, site.d_in))}
                leaves |= {f"{name}_bias": jnp.zeros((*site.lead, site.d_in))}
        if self.gate:
            key = fold_path(key, "gate_weight")
            leaves["gate_weight"] = NEAR_ZERO * jax.random.normal(key, (*site.lead, site.d_in, 1))
            leaves["gate_bias"] = jnp.zeros((*site.lead, 1))
        return Start(leaves)

    def start_linears(self, site: Site, key: jax.Array) -> Mapping[str, jax.Array]:
        """The first values of `down`, `down_bias`, `up`, `up_bias`, or of what they are made of."""
        widths, d = self.widths(site), site.d_in
        draw_down, draw_up = _DRAWS[self.init]
        return {
            "down": per_layer(site, fold_path(key, "down"), widths, lambda k, m: draw_down(k, (d, m)), axis=-1),
            "down_bias": jnp.zeros((*site.lead, max(widths))),
            "up": per_layer(site, fold_path(key, "up"), widths, lambda k, m: draw_up(k, (m, d)), axis=-2),
            "up_bias": jnp.zeros((*site.lead, d)),
        }

    def start_shared(self, site: Site, model: Any, key: jax.Array) -> Start | None:
        known = {layer_of(name) for member in site.members for name in member.names}
        keys = self.reduction_factor if isinstance(self.reduction_factor, Frozen) else ()
        unknown = [layer for layer in keys if layer != "default" and layer not in known]
        if unknown:
            raise ValueError(
                f"reduction_factor names layer {unknown[0]}, and the adapter stands in none of that number"
            )
        if self.gate:
            _text.check_gate(model)
        if self.invertible and getattr(model, "task", None) == "CAUSAL_LM" and not getattr(model, "head", ()):
            raise ValueError(
                "invertible='nice' changes the embedded input, and would have to be inverted before a head that is "
                "tied to the embedding, which is not supported; untie the head, or leave invertible= out"
            )
        return None

    def _start_coupling(self, site: Site, key: jax.Array) -> dict[str, jax.Array]:
        """Of F and G, each a linear layer to `inner` and one back."""
        first, second = site.d_in // 2, site.d_in - site.d_in // 2
        leaves = {}
        for net, d_in, d_out in (("F", second, first), ("G", first, second)):
            inner = max(1, int(d_in // self.invertible_reduction_factor))
            for name, shape in ((f"{net}_down", (d_in, inner)), (f"{net}_up", (inner, d_out))):
                leaves[name] = NEAR_ZERO * jax.random.normal(fold_path(key, name), (*site.lead, *shape))
                leaves[f"{name}_bias"] = jnp.zeros((*site.lead, shape[1]))
        return leaves

    # Forward --------------------------------------------------------------------------------------------------------

    def before(self, adapter: Adapter, base: Any, *inputs: Any) -> tuple[Any, ...]:
        if adapter.site.seam == "input":
            return self._coupled(adapter, inputs[0]), *inputs[1:]
        if not self.original_ln_after:
            return inputs
        h, x = inputs
        z, residual = self.read(h, x, lambda: base(h, x))
        return only_where_active(adapter, self._around(adapter, z, residual), h), x

    def after(self, adapter: Adapter, base: Any, y: Any, *inputs: Any) -> Any:
        if adapter.site.seam == "input" or self.original_ln_after:
            return y
        h, x = inputs
        z, residual = self.read(h, x, lambda: y)
        return only_where_active(adapter, self._around(adapter, z, residual), y)

    def read(self, h: Any, x: Any, normed: Callable[[], Any]) -> tuple[jax.Array, jax.Array]:
        """(what the adapter reads, what its output is added to), given `norm(h + x)` when called for."""
        if self.PARALLEL:
            return x, h
        z = normed() if self.original_ln_before else h
        residual: Any = {True: h, False: z}.get(self.residual_before_ln)
        return z, h + x if residual is None else residual

    def change(self, adapter: Any, z: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        """u: the adapter's output before dropout, gate and residual, in float32."""
        z = z.astype(wide(z.dtype))
        if self.ln_before:
            z = _norm(z, adapter.before_scale[...], adapter.before_bias[...])
        down, down_bias, up, up_bias = self.linears(adapter)
        hidden = ACTIVATIONS[self.non_linearity](plus(rows_times(z, down), down_bias))
        used = self._used(adapter)
        u = plus(rows_times(hidden if used is None else times(hidden, used), up), up_bias)
        return times(u, adapter.scale[...]) if isinstance(self.scaling, str) else u * self.scaling

    def linears(self, adapter: Any) -> Linears:
        """`down` `[d_model, m]` and `up` `[m, d_model]` of the running layer, each with its bias."""
        return adapter.down[...], adapter.down_bias[...], adapter.up[...], adapter.up_bias[...]

    def _around(self, adapter: Any, z: jax.Array, residual: jax.Array) -> jax.Array:
        """The adapter's output with the residual around it."""
        u = adapter.dropout(self.change(adapter, z), self.dropout)
        if self.gate:
            u = u * _text.gate(z, adapter.gate_weight[...], adapter.gate_bias[...].reshape((1,) * z.ndim))
        if self.ln_after:
            u = u + residual if self.adapter_residual_before_ln else u
            u = _norm(u, adapter.after_scale[...], adapter.after_bias[...])
        y = u if self.adapter_residual_before_ln else residual + u
        return y.astype(residual.dtype)

    def _used(self, adapter: Any) -> jax.Array | None:
        """Which of the padded columns the running layer uses; None where none is padding."""
        if hasattr(adapter, "used"):  # in a slot of a bank
            return adapter.used[...]
        widths = self.widths(adapter.site)
        if len({*widths} - {0}) == 1:
            return None
        return jnp.asarray(np.arange(max(widths)) < np.array(widths)[:, None], jnp.float32)[adapter.layer]

    def _coupled(self, adapter: Any, e: jax.Array) -> jax.Array:
        """NICE (Dinh et al. 2014) on halves: a' = a + F(b), b' = b + G(a')."""
        half = e.shape[-1] // 2
        a, b = jnp.split(e.astype(wide(e.dtype)), [half], axis=-1)

        def net(name: str, x: jax.Array) -> jax.Array:
            down, down_bias, up, up_bias = (
                getattr(adapter, f"{name}_{leaf}")[...] for leaf in ("down", "down_bias", "up", "up_bias")
            )
            hidden = ACTIVATIONS[self.non_linearity](plus(rows_times(x, down), down_bias))
            return plus(rows_times(hidden, up), up_bias)

        a = a + net("F", b)
        return jnp.concatenate([a, b + net("G", a)], -1).astype(e.dtype)

    # Answers --------------------------------------------------------------------------------------------------------

    def padded(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Method, Mapping[str, Any]]:
        lead = adapter.site.lead
        if adapter.site.seam != "residual":  # the coupling keeps its input's shape
            return self, {"used": jnp.ones((*lead, 1), jnp.float32)}
        if "down" not in shapes:
            return self, {}
        used = np.arange(shapes["down"][-1]) < np.array(self.widths(adapter.site))[:, None]
        return dataclasses.replace(self, reduction_factor=1), {
            "used": jnp.asarray(used, jnp.float32).reshape(*lead, -1)
        }

    def depends_on_layer(self, site: Site) -> bool:
        return self.dropout > 0 or len({*self.widths(site)}) > 1 if site.seam == "residual" else False

    def on_the_way_in(self, site: Site) -> bool:
        return True

    def count(self, site: Site) -> tuple[int, int]:
        if site.seam == "input":
            return sum(math.prod(shape) for shape in _shapes(self._start_coupling, site)), 0
        if site.seam != "residual":
            return 0, 0
        vectors = {"learned": 1, "channel": site.d_in}.get(str(self.scaling), 0)
        vectors += (2 * self.ln_before + 2 * self.ln_after) * site.d_in + self.gate * (site.d_in + 1)
        biases = sum(m + site.d_in + vectors for m in self.widths(site) if m)
        return self.weights(site) + biases, 0

    def weights(self, site: Site) -> int:
        """Entries of the two matrices alone, over all layers: `count` without biases, scales, norms and gates."""
        return sum(2 * site.d_in * m for m in self.widths(site)) if site.seam == "residual" else 0

    @property
    def placement(self) -> tuple[Any, ...]:
        """What adapters must have in common to be fused: what they read and how they are added."""
        return self.PARALLEL, self.original_ln_before, self.residual_before_ln, self.original_ln_after


def only_where_active(adapter: Adapter, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new`, in a layer of a stack that is not adapted `old`."""
    active = adapter.site.active
    return new if all(active) else jnp.where(jnp.asarray(active)[adapter.layer], new, old)


def plus(x: jax.Array, vector: jax.Array) -> jax.Array:
    """`x + vector`, along the last axis."""
    return x + vector.reshape((1,) * (x.ndim - 1) + (-1,))


def times(x: jax.Array, vector: jax.Array) -> jax.Array:
    """`x * vector`, along the last axis."""
    return x * vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Layer norm over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return plus(times(x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + EPS), scale), bias)


def _shapes(function: Callable[..., Any], site: Site) -> list[tuple[int, ...]]:
    leaves = jax.eval_shape(lambda key: function(site, key), jax.random.key(0))
    return [leaf.shape for leaf in leaves.values()]


def _near_zero(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return NEAR_ZERO * jax.random.normal(key, shape)


def _kaiming(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _truncated(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 0.01 * jax.random.truncated_normal(key, -2.0, 2.0, shape)


#: First values of `down` and `up`, by `init=`.
_DRAWS: Mapping[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "bert": (_near_zero, _near_zero),
    "mam": (_kaiming, lambda key, shape: jnp.zeros(shape)),
    "houlsby": (_truncated, _truncated),
}


def _factors(own: str, value: Any) -> Any:
    """`reduction_factor` as a number, or as a `Frozen` of numbers by layer and `"default"`."""
    if not isinstance(value, Mapping):
        return _positive(own, "reduction_factor", value, " or a mapping from layers to such numbers")
    found = {}
    for layer, factor in value.items():
        layer = int(layer) if isinstance(layer, str) and layer.isdigit() else layer
        if layer != "default" and (not isinstance(layer, int) or isinstance(layer, bool)):
            raise ValueError(f"{own}'s reduction_factor takes indices of layers and 'default', got {layer!r}")
        found[layer] = _positive(own, "reduction_factor", factor)
    return Frozen(found)


def _positive(own: str, field: str, value: Any, also: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{own}'s {field} must be a positive number{also}, got {value!r}")
    return value
