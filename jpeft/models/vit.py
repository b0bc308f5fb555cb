# SPDX-License-Identifier: Apache-2.0
"""ViT: an image as a row of patches, read by a bidirectional encoder (Dosovitskiy et al., https://arxiv.org/abs/2010.11929).

Computes what transformers' `ViTModel` and `ViTForImageClassification` do. Axes: batch, channels, height, width of an
image, seq (a class token and the patches, row by row), heads, d_head, d_model (hidden_size), d_ff, labels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped

from .. import _stack
from .._given import Given
from .._scope import dropout, scope
from .._wide import widened
from ..seams import InputEmbedding, KeyValues, Residual
from ._attention import attention
from ._bicubic import resized
from ._layer_norm import LayerNorm
from ._layers import ACTIVATIONS, in_front
from ._linear import Linear
from ._table import COPY, TRANSPOSE, Entry, How, Ignore, Rule, module_names
from ._vit_config import PRESETS, Config
from ._windows import Windows

__all__ = ["HEADS", "OPTIONAL", "PREFIXES", "PRESETS", "TASKS", "WEIGHTS", "Config", "ViT"]

TASKS = ("IMAGE_CLS", "FEATURE_EXTRACTION")
#: What a checkpoint with a head puts before the backbone's names.
PREFIXES = ("vit.",)
#: Modules that some tasks have and others lack; `decoder` is a pretraining head, which no task here has.
HEADS = ("pooler", "classifier", "decoder")
#: What a checkpoint of its own task may lack: transformers makes models without it (`add_pooling_layer=False`).
OPTIONAL = ("pooler",)


class PatchEmbeddings(nnx.Module):
    """A vector for every patch: a convolution whose windows do not overlap."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.projection = Windows(
            config.num_channels,
            config.hidden_size,
            config.patch,
            strides=config.patch,
            padding="VALID",
            dtype=dtype,
            param_dtype=dtype,
            kernel_init=_normal(config),
            rngs=rngs,
        )

    def __call__(self, pixel_values: Float[Given, "batch channels height width"]) -> Float[Array, "..."]:
        """`[batch, rows, columns, d_model]`; what is left over at the right and below is not read."""
        return self.projection(jnp.moveaxis(pixel_values, 1, -1))


class Embeddings(nnx.Module):
    """The class token and the patches, each with a vector of its place."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.dtype = config, dtype
        d_model, (rows, columns) = config.hidden_size, config.grid
        init = nnx.initializers.truncated_normal(config.initializer_range)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, d_model), dtype))
        self.position_embeddings = nnx.Param(init(rngs.params(), (1, 1 + rows * columns, d_model), dtype))
        self.patch_embeddings = PatchEmbeddings(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, pixel_values: Float[Given, "batch channels height width"], interpolate: bool
    ) -> Float[Array, "batch seq d_model"]:
        self._check(pixel_values.shape, interpolate)
        patches = self.patch_embeddings(pixel_values.astype(self.dtype))
        batch, rows, columns, d_model = patches.shape
        first = jnp.broadcast_to(self.cls_token[...], (batch, 1, d_model))
        x = jnp.concatenate([first, patches.reshape(batch, -1, d_model)], 1) + self._places((rows, columns))
        return dropout(x, self.config.hidden_dropout_prob, "embeddings/dropout")

    def _places(self, grid: tuple[int, int]) -> Float[Array, "1 seq d_model"]:
        """The vectors of places, those of the patches on a grid of this size."""
        table = self.position_embeddings[0]
        places = resized(table[1:].reshape(*self.config.grid, -1), grid)
        return jnp.concatenate([table[:1], places.reshape(-1, table.shape[1])])[None]

    def _check(self, shape: tuple[int, ...], interpolate: bool) -> None:
        config = self.config
        size = config.num_channels, *config.image
        if len(shape) != 4 or shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values are [batch, channels, height, width] with {config.num_channels} channels; got {shape}"
            )
        if not interpolate and shape[1:] != size:
            raise ValueError(
                f"this model has places for images of {size}, and got {shape[1:]}; resize them, or ask for places in "
                "between with interpolate_pos_encoding=True"
            )
        if shape[2] < config.patch[0] or shape[3] < config.patch[1]:
            raise ValueError(f"an image of {shape[2:]} holds no patch of {config.patch}")


class Attention(nnx.Module):
    """softmax(Q Kᵀ / √d_head) V, every token to every token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        d_model = config.hidden_size
        self.num_heads, self.dropout_rate = config.num_attention_heads, config.attention_probs_dropout_prob
        self.q_proj = _linear(config, d_model, d_model, rngs, dtype, config.qkv_bias)
        self.k_proj = _linear(config, d_model, d_model, rngs, dtype, config.qkv_bias)
        self.v_proj = _linear(config, d_model, d_model, rngs, dtype, config.qkv_bias)
        self.o_proj = _linear(config, d_model, d_model, rngs, dtype)
        self.keys_values = KeyValues(d_model, self.num_heads, d_model // self.num_heads)

    def __call__(self, x: Float[Array, "batch seq d_model"], mask: Any) -> Float[Array, "batch seq d_model"]:
        q, k, v = (self._heads(y) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        k, v, mask = self.keys_values(k, v, mask, x)
        rate, path = self.dropout_rate, "layers/attention/dropout"
        y = attention(q, k, v, causal=False, mask=mask, scale=q.shape[-1] ** -0.5, dropout=rate, path=path)
        return self.o_proj(y.reshape(x.shape))

    def _heads(self, y: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq heads d_head"]:
        return y.reshape(*y.shape[:2], self.num_heads, -1)


class MLP(nnx.Module):
    """fc2(activation(fc1(x)))"""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.hidden_act = config.hidden_act
        self.fc1 = _linear(config, config.hidden_size, config.intermediate_size, rngs, dtype)
        self.fc2 = _linear(config, config.intermediate_size, config.hidden_size, rngs, dtype)

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class Layer(nnx.Module):
    """Self-attention, then an MLP, each of the normalised stream and added to it."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        d_model, eps = config.hidden_size, config.layer_norm_eps
        self.dropout_rate = config.hidden_dropout_prob
        self.layernorm_before = LayerNorm(d_model, eps, dtype=dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.attention_residual = Residual(d_model, "attention")
        self.layernorm_after = LayerNorm(d_model, eps, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)
        self.mlp_residual = Residual(d_model, "mlp")

    def __call__(self, x: Float[Array, "batch seq d_model"], mask: Any) -> Float[Array, "batch seq d_model"]:
        x = checkpoint_name(x, "block_input")
        h = dropout(self.attention(self.layernorm_before(x), mask), self.dropout_rate, "layers/attention/output")
        x = checkpoint_name(self.attention_residual(h, x), "attention_output")
        h = dropout(self.mlp(self.layernorm_after(x)), self.dropout_rate, "layers/mlp/output")
        return checkpoint_name(self.mlp_residual(h, x), "mlp_output")


class Pooler(nnx.Module):
    """An activation of a projection of the class token's state."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.pooler_act = config.pooler_act
        self.dense = _linear(config, config.hidden_size, config.pooler_size, rngs, dtype)

    def __call__(self, hidden: Float[Array, "batch seq d_model"]) -> Float[Array, "batch d_pooled"]:
        return ACTIVATIONS[self.pooler_act](self.dense(hidden[:, 0]))


class ViT(nnx.Module):
    """ViT for one task: `IMAGE_CLS` or `FEATURE_EXTRACTION`.

    Attributes:
      head: paths of the task's own output layers.
      remat, unroll: how the layers are run, see `jpeft.models.load`.
    """

    def __init__(
        self,
        config: Config,
        task: str,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        remat: str = "none",
        unroll: bool = False,
    ):
        self.config, self.task, self.remat, self.unroll = config, task, remat, unroll
        self.head = ("classifier",) if task == "IMAGE_CLS" else ()
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.input_embedding = InputEmbedding(config.hidden_size, "encoder", False)
        self.layers = _stack.stack(lambda r: Layer(config, rngs=r, dtype=dtype), config.num_hidden_layers, rngs)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)
        if self.head:
            self.classifier = _linear(config, config.hidden_size, config.num_labels, rngs, dtype)
        else:
            self.pooler = Pooler(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        pixel_values: Float[Given, "batch channels height width"],
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        key: jax.Array | None = None,
    ) -> Float[Array, "..."]:
        """Logits `[batch labels]`, or the hidden states `[batch seq d_model]`, by task.

        Args:
          pixel_values: images, normalised as the checkpoint's processor does it.
          attention_mask: 0 for a patch that nobody sees, with the class token counted in, as the first; None where all
            are seen.
          interpolate_pos_encoding: takes images of any size, whose patches get vectors of places between those that
            the model has (bicubic, on the grid of its own images).
          key: turns dropout on; the same key gives the same masks. None is deterministic.

        Raises:
          ValueError: images of another size or other channels.
        """
        with scope(key=key):
            return self.logits(
                self.hidden(pixel_values, attention_mask, interpolate_pos_encoding=interpolate_pos_encoding)
            )

    def hidden(
        self,
        pixel_values: Float[Given, "batch channels height width"],
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch out d_model"]:
        """The last layer's normalised states; arguments as in a call.

        Virtual tokens that a method puts in front have no place in the image, and are left out again.
        """
        with scope(key=key):
            e = self.embeddings(pixel_values, interpolate_pos_encoding)
            shape = e.shape[:2]
            if attention_mask is not None and attention_mask.shape != shape:
                raise ValueError(
                    f"attention_mask is of a class token and the patches, {shape}; got {attention_mask.shape}"
                )
            x, _, mask, _ = self.input_embedding(e, jnp.arange(shape[1])[None], attention_mask, None)

            def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return layer(x, mask), None

            with scope(**in_front(x.shape[1] - shape[1], shape, attention_mask, None)):
                x = _stack.scan(self.layers, body, x, remat_policy=self.remat, unroll=self.unroll)[0]
            return self.layernorm(x[:, x.shape[1] - shape[1] :])

    def logits(
        self, hidden: Float[Array, "batch seq d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "..."]:
        """What the task's head makes of the class token in `hidden`, in float32 or wider; without one, `hidden`."""
        del attention_mask, key
        return widened(self.classifier(hidden[:, 0]) if self.head else hidden)

    def pooled(self, hidden: Float[Array, "batch seq d_model"]) -> Float[Array, "batch d_pooled"]:
        """The pooler's output, of FEATURE_EXTRACTION."""
        if not hasattr(self, "pooler"):
            raise ValueError(f"{self.task} of a vit model has no pooler; it has one for FEATURE_EXTRACTION")
        return self.pooler(hidden)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one image: channels, height, width."""
        return self.config.num_channels, *self.config.image

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of the stack."""
        return module_names(WEIGHTS(self.config, self.task), self.config.num_hidden_layers)


def _normal(config: Config) -> Any:
    return nnx.initializers.normal(config.initializer_range)


def _linear(config: Config, d_in: int, d_out: int, rngs: nnx.Rngs, dtype: Any, bias: bool = True) -> Linear:
    return Linear(d_in, d_out, use_bias=bias, dtype=dtype, param_dtype=dtype, kernel_init=_normal(config), rngs=rngs)


#: torch's `Conv2d.weight` [out, in, height, width] as a kernel [height, width, in, out].
_CONVOLUTION = How((2, 3, 1, 0), (3, 2, 0, 1))

#: What files call the projections of a layer, by transformers' own names for them.
_LINEARS = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def WEIGHTS(config: Config, task: str) -> tuple[Entry, ...]:
    """The table of weights for `task`."""
    prefix, head = (PREFIXES[0], "classifier") if task == "IMAGE_CLS" else ("", "pooler.dense")
    patches = "embeddings.patch_embeddings.projection"
    entries: list[Entry] = [
        Rule(f"{prefix}embeddings.cls_token", "embeddings/cls_token"),
        Rule(f"{prefix}embeddings.position_embeddings", "embeddings/position_embeddings"),
        Rule(f"{prefix}{patches}.weight", f"{patches.replace('.', '/')}/kernel", _CONVOLUTION),
        Rule(f"{prefix}{patches}.bias", f"{patches.replace('.', '/')}/bias"),
        Ignore("...embeddings.mask_token"),  # of masked pretraining alone
        *_rules(f"{prefix}layernorm", "layernorm", "scale"),
        *_rules(head, head.replace(".", "/"), "kernel"),
    ]
    for name, saved in _LINEARS.items():
        bias = config.qkv_bias or name[-6:] not in ("q_proj", "k_proj", "v_proj")
        entries += _in_layers(prefix, name, saved, "kernel")[: 1 + bias]
    for name in ("layernorm_before", "layernorm_after"):
        entries += _in_layers(prefix, name, name, "scale")
    return tuple(entries)


def _in_layers(prefix: str, name: str, saved: str, weight: str) -> list[Rule]:
    hf, file = f"{prefix}layers.{{i}}.{name}", f"{prefix}encoder.layer.{{i}}.{saved}"
    return _rules(hf, f"layers/{name.replace('.', '/')}", weight, file)


def _rules(hf: str, path: str, weight: str, file: str = "") -> list[Rule]:
    how = TRANSPOSE if weight == "kernel" else COPY
    files = (f"{file}.weight", f"{file}.bias") if file else ("", "")
    return [
        Rule(f"{hf}.weight", f"{path}/{weight}", how, files[0]),
        Rule(f"{hf}.bias", f"{path}/bias", file=files[1]),
    ]
