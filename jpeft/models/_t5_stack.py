# SPDX-License-Identifier: Apache-2.0
"""T5's two stacks, and their layers: attention with a relative bias, attention across the stacks, an MLP."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from .. import _stack
from .._scope import dropout
from .._wide import widened
from ..seams import InputEmbedding, KeyValues, Residual
from . import _encoder_decoder
from ._cache import KV
from ._encoder_decoder import Context, Memory
from ._layers import ACTIVATIONS, RMSNorm, gated, token_table
from ._linear import Linear
from ._relative import relative_buckets
from ._t5_config import Config


class Attention(_encoder_decoder.Attention):
    """softmax(Q Kᵀ + bias) V: scores are not scaled."""

    projections = ("q", "k", "v", "o")

    def __init__(self, config: Config, block: str, path: str, *, rngs: nnx.Rngs, dtype: Any):
        d_model, d_kv, heads, factor = config.d_model, config.d_kv, config.num_heads, config.initializer_factor
        self.scale, self.dropout_rate, self.path = 1.0, config.dropout_rate, path
        self.q = linear(d_model, heads * d_kv, factor * (d_model * d_kv) ** -0.5, rngs, dtype)
        self.k = linear(d_model, heads * d_kv, factor * d_model**-0.5, rngs, dtype)
        self.v = linear(d_model, heads * d_kv, factor * d_model**-0.5, rngs, dtype)
        self.o = linear(heads * d_kv, d_model, factor * (heads * d_kv) ** -0.5, rngs, dtype)
        self.keys_values = KeyValues(d_model, heads, d_kv, block)


class SelfAttentionLayer(nnx.Module):
    """Attention to the stack's own tokens, on the normalised stream and added to it."""

    def __init__(self, config: Config, causal: bool, path: str, *, rngs: nnx.Rngs, dtype: Any):
        self.causal, self.dropout_rate, self.path = causal, config.dropout_rate, path
        self.SelfAttention = Attention(config, "attention", path, rngs=rngs, dtype=dtype)
        self.layer_norm = norm(config, dtype)
        self.residual = Residual(config.d_model, "attention")

    def __call__(
        self, x: Float[Array, "batch seq d_model"], context: Context, past: KV | None
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        h = self.layer_norm(x)
        new = self.SelfAttention.read(h)
        h = self.SelfAttention(h, new, context.mask, context.bias, self.causal, past, (context.segments, None))
        return checkpoint_name(self.residual(dropout(h, self.dropout_rate, self.path), x), "attention_output"), new


class CrossAttentionLayer(nnx.Module):
    """Attention to the encoder's states, on the normalised stream and added to it."""

    def __init__(self, config: Config, path: str, *, rngs: nnx.Rngs, dtype: Any):
        self.dropout_rate, self.path = config.dropout_rate, path
        self.EncDecAttention = Attention(config, "cross_attention", path, rngs=rngs, dtype=dtype)
        self.layer_norm = norm(config, dtype)
        self.residual = Residual(config.d_model, "cross_attention")

    def __call__(
        self, x: Float[Array, "batch seq d_model"], context: Context, memory: Memory
    ) -> Float[Array, "batch seq d_model"]:
        h = self.EncDecAttention.across(self.layer_norm(x), context, memory)
        return checkpoint_name(self.residual(dropout(h, self.dropout_rate, self.path), x), "attention_output")


class Dense(nnx.Module):
    """wo(activation(wi(x))), or wo(activation(wi_0(x)) · wi_1(x))."""

    def __init__(self, config: Config, path: str, *, rngs: nnx.Rngs, dtype: Any):
        d_model, d_ff, factor = config.d_model, config.d_ff, config.initializer_factor
        self.config, self.path = config, path
        if config.is_gated:
            self.wi_0 = linear(d_model, d_ff, factor * d_model**-0.5, rngs, dtype)
            self.wi_1 = linear(d_model, d_ff, factor * d_model**-0.5, rngs, dtype)
        else:
            self.wi = linear(d_model, d_ff, factor * d_model**-0.5, rngs, dtype)
        self.wo = linear(d_ff, d_model, factor * d_ff**-0.5, rngs, dtype)

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        config = self.config
        if config.is_gated:
            h = gated(config.activation, self.wi_0(x), self.wi_1(x))
        else:
            h = ACTIVATIONS[config.activation](self.wi(x))
        return self.wo(dropout(h, config.dropout_rate, f"{self.path}/wi_dropout"))


class MLPLayer(nnx.Module):
    """The MLP, on the normalised stream and added to it."""

    def __init__(self, config: Config, path: str, *, rngs: nnx.Rngs, dtype: Any):
        self.dropout_rate, self.path = config.dropout_rate, path
        self.DenseReluDense = Dense(config, path, rngs=rngs, dtype=dtype)
        self.layer_norm = norm(config, dtype)
        self.residual = Residual(config.d_model, "mlp")

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        h = dropout(self.DenseReluDense(self.layer_norm(x)), self.dropout_rate, self.path)
        return checkpoint_name(self.residual(h, x), "mlp_output")


class Block(nnx.Module):
    """Self-attention, in a decoder cross-attention, and an MLP."""

    def __init__(self, config: Config, decoder: bool, path: str, *, rngs: nnx.Rngs, dtype: Any):
        layers: list[Any] = [SelfAttentionLayer(config, decoder, f"{path}/self", rngs=rngs, dtype=dtype)]
        if decoder:
            layers.append(CrossAttentionLayer(config, f"{path}/cross", rngs=rngs, dtype=dtype))
        layers.append(MLPLayer(config, f"{path}/mlp", rngs=rngs, dtype=dtype))
        self.layer = nnx.List(layers)

    def __call__(
        self, x: Float[Array, "batch seq d_model"], context: Context, memory: Memory
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        own, *cross, mlp = self.layer
        x, new = own(checkpoint_name(x, "block_input"), context, memory.past)
        for layer in cross:
            x = layer(x, context, memory)
        return mlp(x), new


class Stack(_encoder_decoder.Stack):
    """The encoder, or the decoder: all its blocks share one bias, a number per head and bucket of distances."""

    def __init__(self, config: Config, decoder: bool, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.decoder = config, decoder
        self.name = "decoder" if decoder else "encoder"
        self.input_embedding = InputEmbedding(config.d_model, self.name, causal=decoder, beyond=decoder)
        buckets, std = config.relative_attention_num_buckets, config.initializer_factor * config.d_model**-0.5
        self.relative_attention_bias = token_table(buckets, config.num_heads, std, None, rngs=rngs, dtype=dtype)
        path, depth = f"{self.name}/block", config.num_decoder_layers if decoder else config.num_layers
        self.block = _stack.stack(lambda r: Block(config, decoder, path, rngs=r, dtype=dtype), depth, rngs)
        self.final_layer_norm = norm(config, dtype)

    @property
    def stacked(self) -> Any:
        return self.block

    @property
    def sizes(self) -> tuple[int, int, int]:
        config = self.config
        depth = config.num_decoder_layers if self.decoder else config.num_layers
        return depth, config.num_heads, config.d_kv

    def crossing(self, layer: Any) -> Attention:
        return layer.layer[1].EncDecAttention

    def enter(self, x: Float[Array, "batch seq d_model"], places: Int[Array, "rows seq"]) -> Any:
        del places
        return dropout(x, self.config.dropout_rate, f"{self.name}/embed_dropout")

    def leave(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        return dropout(self.final_layer_norm(x), self.config.dropout_rate, f"{self.name}/final_dropout")

    def bias(self, places: Int[Array, "rows seq"], keys: Any = None) -> Float[Array, "rows heads seq keys"]:
        buckets = relative_buckets(
            places,
            keys,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
            causal=self.decoder,
        )
        return widened(jnp.moveaxis(self.relative_attention_bias(buckets), -1, 1))


def norm(config: Config, dtype: Any) -> RMSNorm:
    """The norm of a stream: scale, and no mean taken off."""
    return RMSNorm(config.d_model, config.layer_norm_epsilon, dtype=dtype, start=config.initializer_factor)


def linear(d_in: int, d_out: int, std: float, rngs: nnx.Rngs, dtype: Any) -> Linear:
    """A projection; none of T5's has a bias."""
    init = nnx.initializers.normal(std)
    return Linear(d_in, d_out, use_bias=False, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)
