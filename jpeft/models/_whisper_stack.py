# SPDX-License-Identifier: Apache-2.0
"""Whisper's two stacks, and their layers: attention within and across, an MLP, all of the normalised stream."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from .. import _stack
from .._given import Given
from .._scope import dropout
from ..seams import InputEmbedding, KeyValues, Residual
from . import _encoder_decoder
from ._cache import KV
from ._encoder_decoder import Context, Memory
from ._layer_norm import LayerNorm
from ._layers import ACTIVATIONS, token_table
from ._linear import Linear
from ._whisper_config import Config
from ._windows import Windows

_EPS = 1e-5


class Attention(_encoder_decoder.Attention):
    """softmax(Q Kᵀ / √d_head) V; keys have no bias."""

    projections = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: Config, heads: int, block: str, path: str, *, rngs: nnx.Rngs, dtype: Any):
        d_model = config.d_model
        self.scale, self.dropout_rate, self.path = (d_model // heads) ** -0.5, config.attention_dropout, path
        self.q_proj = linear(config, d_model, d_model, rngs, dtype)
        self.k_proj = linear(config, d_model, d_model, rngs, dtype, bias=False)
        self.v_proj = linear(config, d_model, d_model, rngs, dtype)
        self.out_proj = linear(config, d_model, d_model, rngs, dtype)
        self.keys_values = KeyValues(d_model, heads, d_model // heads, block)


class Layer(nnx.Module):
    """Self-attention, in a decoder cross-attention, and an MLP."""

    encoder_attn: Attention

    def __init__(self, config: Config, decoder: bool, path: str, *, rngs: nnx.Rngs, dtype: Any):
        heads = config.decoder_attention_heads if decoder else config.encoder_attention_heads
        d_model, d_ff = config.d_model, config.decoder_ffn_dim if decoder else config.encoder_ffn_dim
        self.config, self.decoder, self.path = config, decoder, path
        self.self_attn_layer_norm = LayerNorm(d_model, _EPS, dtype=dtype)
        self.self_attn = Attention(config, heads, "attention", f"{path}/self", rngs=rngs, dtype=dtype)
        self.self_attn_residual = Residual(d_model, "attention")
        if decoder:
            self.encoder_attn_layer_norm = LayerNorm(d_model, _EPS, dtype=dtype)
            self.encoder_attn = Attention(config, heads, "cross_attention", f"{path}/cross", rngs=rngs, dtype=dtype)
            self.encoder_attn_residual = Residual(d_model, "cross_attention")
        self.final_layer_norm = LayerNorm(d_model, _EPS, dtype=dtype)
        self.fc1 = linear(config, d_model, d_ff, rngs, dtype)
        self.fc2 = linear(config, d_ff, d_model, rngs, dtype)
        self.mlp_residual = Residual(d_model, "mlp")

    def __call__(
        self, x: Float[Array, "batch seq d_model"], context: Context, memory: Memory
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        x = checkpoint_name(x, "block_input")
        h = self.self_attn_layer_norm(x)
        new = self.self_attn.read(h)
        h = self._dropped(self.self_attn(h, new, context.mask, None, self.decoder, memory.past), "self")
        x = checkpoint_name(self.self_attn_residual(h, x), "attention_output")
        if self.decoder:
            h = self._dropped(self.encoder_attn.across(self.encoder_attn_layer_norm(x), context, memory), "cross")
            x = checkpoint_name(self.encoder_attn_residual(h, x), "attention_output")
        h = ACTIVATIONS[self.config.activation_function](self.fc1(self.final_layer_norm(x)))
        h = dropout(h, self.config.activation_dropout, f"{self.path}/activation")
        return checkpoint_name(self.mlp_residual(self._dropped(self.fc2(h), "mlp"), x), "mlp_output"), new

    def _dropped(self, h: Float[Array, "batch seq d_model"], name: str) -> Float[Array, "batch seq d_model"]:
        return dropout(h, self.config.dropout, f"{self.path}/{name}")


class Sinusoids(nnx.Module):
    """Vectors of the encoder's places: sines, then cosines, of frequencies from 1 down to 1/10000; never trained."""

    def __init__(self, config: Config, *, dtype: Any):
        half = config.d_model // 2
        rates = np.exp(-math.log(10000) / (half - 1) * np.arange(half))
        angles = np.arange(config.max_source_positions)[:, None] * rates[None]
        self.embedding = nnx.Param(jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], 1), dtype))

    def __call__(self) -> Float[Array, "1 seq d_model"]:
        return jax.lax.stop_gradient(self.embedding[...])[None]


class Stack(_encoder_decoder.Stack):
    """What the encoder and the decoder have in common: layers, and a norm behind them."""

    def __init__(self, config: Config, decoder: bool, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.decoder = config, decoder
        self.name = "decoder" if decoder else "encoder"
        self.input_embedding = InputEmbedding(
            config.d_model, self.name, decoder, config.max_target_positions if decoder else None, beyond=decoder
        )
        path = f"{self.name}/layers"
        self.layers = _stack.stack(lambda r: Layer(config, decoder, path, rngs=r, dtype=dtype), self.sizes[0], rngs)
        self.layer_norm = LayerNorm(config.d_model, _EPS, dtype=dtype)

    @property
    def stacked(self) -> Any:
        return self.layers

    @property
    def sizes(self) -> tuple[int, int, int]:
        config = self.config
        layers = config.decoder_layers if self.decoder else config.encoder_layers
        heads = config.decoder_attention_heads if self.decoder else config.encoder_attention_heads
        return layers, heads, config.d_model // heads

    def crossing(self, layer: Any) -> Attention:
        return layer.encoder_attn

    def enter(self, x: Float[Array, "batch seq d_model"], places: Int[Array, "rows seq"]) -> Any:
        del places
        return dropout(x, self.config.dropout, f"{self.name}/embed_dropout")

    def leave(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        return self.layer_norm(x)


class Encoder(Stack):
    """Two convolutions over the frames, and the layers."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        super().__init__(config, False, rngs=rngs, dtype=dtype)
        self.conv1 = _convolution(config, config.num_mel_bins, 1, rngs, dtype)
        self.conv2 = _convolution(config, config.d_model, 2, rngs, dtype)
        self.embed_positions = Sinusoids(config, dtype=dtype)

    def heard(self, features: Float[Given, "batch mels frames"]) -> Float[Array, "batch seq d_model"]:
        """Vectors of the sound, with those of their places."""
        gelu = ACTIVATIONS["gelu"]
        x = gelu(self.conv1(jnp.swapaxes(features, 1, 2)))
        return gelu(self.conv2(x)) + self.embed_positions()


class Decoder(Stack):
    """Tokens with learned vectors of their places, and the layers."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        super().__init__(config, True, rngs=rngs, dtype=dtype)
        size, std = config.d_model, config.init_std
        self.embed_tokens = token_table(config.vocab_size, size, std, config.pad_token_id, rngs=rngs, dtype=dtype)
        self.embed_positions = token_table(config.max_target_positions, size, std, None, rngs=rngs, dtype=dtype)

    def enter(self, x: Float[Array, "batch seq d_model"], places: Int[Array, "rows seq"]) -> Any:
        if x.shape[1] > self.config.max_target_positions:
            raise ValueError(
                f"{x.shape[1]} tokens are more than the {self.config.max_target_positions} positions this model's "
                "decoder has; cut them"
            )
        return super().enter(x + self.embed_positions(places), places)


def linear(config: Config, d_in: int, d_out: int, rngs: nnx.Rngs, dtype: Any, bias: bool = True) -> Linear:
    """A projection, with first values as transformers draws them."""
    init = nnx.initializers.normal(config.init_std)
    return Linear(d_in, d_out, use_bias=bias, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)


def _convolution(config: Config, d_in: int, stride: int, rngs: nnx.Rngs, dtype: Any) -> Windows:
    init = nnx.initializers.normal(config.init_std)
    return Windows(
        d_in,
        config.d_model,
        (3,),
        strides=(stride,),
        padding=((1, 1),),
        dtype=dtype,
        param_dtype=dtype,
        kernel_init=init,
        rngs=rngs,
    )
