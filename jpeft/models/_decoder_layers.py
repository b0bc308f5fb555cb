# SPDX-License-Identifier: Apache-2.0
"""The modules that decoders with rotary embedding are made of: attention, gated MLP, and the layer of both.

Axes: batch, seq, heads, kv_heads, d_head (head_dim), d_model (hidden_size), d_ff (intermediate_size).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from .._given import Given
from .._scope import dropout
from ..seams import KeyValues, Residual
from ._attention import attention
from ._cache import KV
from ._decoder_config import DecoderConfig
from ._layers import RMSNorm, gated
from ._linear import Linear
from ._rope import rotate
from ._step_attention import step_attention


def linear(config: DecoderConfig, d_in: int, d_out: int, bias: bool, rngs: nnx.Rngs, dtype: Any) -> Linear:
    """A projection, with first values as transformers draws them."""
    init = nnx.initializers.normal(config.initializer_range)
    return Linear(d_in, d_out, use_bias=bias, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)


def norm(config: DecoderConfig, features: int, dtype: Any) -> RMSNorm:
    """A norm over `features` numbers."""
    return RMSNorm(features, config.rms_norm_eps, dtype=dtype, offset=config.norm_offset, start=1 - config.norm_offset)


class Attention(nnx.Module):
    """softmax(Q Kᵀ / √d_head) V over the tokens before, with Q and K turned by their positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any):
        d_model, d_head = config.hidden_size, config.d_head
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        bias, o_bias, _ = config.biases
        self.d_head, self.heads, self.kv_heads = d_head, heads, kv_heads
        self.dropout_rate, self.scale, self.cap = config.attention_dropout, config.scale, config.score_cap
        if config.fused:
            self.qkv_proj = linear(config, d_model, (heads + 2 * kv_heads) * d_head, bias, rngs, dtype)
        else:
            self.q_proj = linear(config, d_model, heads * d_head, bias, rngs, dtype)
            self.k_proj = linear(config, d_model, kv_heads * d_head, bias, rngs, dtype)
            self.v_proj = linear(config, d_model, kv_heads * d_head, bias, rngs, dtype)
        self.o_proj = linear(config, heads * d_head, d_model, o_bias, rngs, dtype)
        if config.head_norms:
            self.q_norm = norm(config, d_head, dtype)
            self.k_norm = norm(config, d_head, dtype)
        self.keys_values = KeyValues(d_model, kv_heads, d_head)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        rope: tuple[jax.Array, jax.Array],
        mask: Shaped[Given, "batch keys"] | None,
        segment_ids: Int[Given, "batch seq"] | None,
        window: Any,
        places: Any,
        past: Any = None,
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        q, k, v = self._projected(x)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        new = KV(rotate(k, rope), v)
        q, scores = rotate(q, rope), {"scale": self.scale, "cap": self.cap}
        if past is not None:
            y = step_attention(self.keys_values, q, past, new, x, seen=mask, **scores)
            return self.o_proj(y.reshape(*y.shape[:2], -1)), new
        k, v, mask = self.keys_values(*new, mask, x)
        limits = {"mask": mask, "segment_ids": segment_ids, "window": window, "places": places}
        rate, path = self.dropout_rate, "layers/self_attn/dropout"
        y = attention(q, k, v, causal=True, dropout=rate, path=path, **scores, **limits)
        return self.o_proj(y.reshape(*y.shape[:2], -1)), new

    def _projected(self, x: Float[Array, "batch seq d_model"]) -> tuple[jax.Array, ...]:
        """Queries, keys and values by heads."""
        if hasattr(self, "qkv_proj"):
            return tuple(jnp.split(self._heads(self.qkv_proj(x)), [self.heads, self.heads + self.kv_heads], axis=2))
        return tuple(self._heads(y) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))

    def _heads(self, y: Float[Array, "batch seq d_out"]) -> Float[Array, "batch seq heads d_head"]:
        return y.reshape(*y.shape[:2], -1, self.d_head)


class MLP(nnx.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any):
        d_model, d_ff, bias = config.hidden_size, config.intermediate_size, config.biases[2]
        self.activation = config.activation
        if config.fused:
            self.gate_up_proj = linear(config, d_model, 2 * d_ff, bias, rngs, dtype)
        else:
            self.gate_proj = linear(config, d_model, d_ff, bias, rngs, dtype)
            self.up_proj = linear(config, d_model, d_ff, bias, rngs, dtype)
        self.down_proj = linear(config, d_ff, d_model, bias, rngs, dtype)

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        if hasattr(self, "gate_up_proj"):
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gated(self.activation, gate, up))


class Layer(nnx.Module):
    """Attention, then an MLP, each on the normalised stream and added to it."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.dropout_rate = config.block_dropout
        self.input_layernorm = norm(config, config.hidden_size, dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
        self.attention_residual = Residual(config.hidden_size, "attention")
        self.post_attention_layernorm = norm(config, config.hidden_size, dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)
        self.mlp_residual = Residual(config.hidden_size, "mlp")

    def __call__(
        self, x: Float[Array, "batch seq d_model"], *context: Any
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        x = checkpoint_name(x, "block_input")
        h, new = self.self_attn(self.input_layernorm(x), *context)
        h = dropout(h, self.dropout_rate, "layers/attention_residual/dropout")
        x = checkpoint_name(self.attention_residual(h, x), "attention_output")
        h = dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout_rate, "layers/mlp_residual/dropout")
        return checkpoint_name(self.mlp_residual(h, x), "mlp_output"), new
