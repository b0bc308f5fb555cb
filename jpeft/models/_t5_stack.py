# SPDX-License-Identifier: Apache-2.0
"""T5's two stacks, and their layers: attention with a relative bias, attention across the stacks, an MLP."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from .. import _stack
from .._scope import dropout, scope
from ..seams import InputEmbedding, KeyValues, Residual
from ._attention import attention
from ._cache import KV, Cache, extended, filled, in_cache, or_nan, reach, step_scope
from ._layers import ACTIVATIONS, RMSNorm, gated, in_front, token_table
from ._relative import relative_buckets
from ._step_attention import step_attention
from ._t5_config import Config


class Encoded(NamedTuple):
    """What a decoder reads of the encoder: its states, virtual tokens among them, and which of them it sees."""

    states: Float[Array, "batch seq d_model"]
    mask: Shaped[Array, "batch seq"] | None


class Context(NamedTuple):
    """What the layers of a stack have in common.

    Attributes:
      mask, bias: of the stack's own tokens as keys: which are seen, and what is added to their scores.
      states, seen: in a decoder, the encoder's states (None where their keys and values are given), and which are seen.
    """

    mask: Any
    bias: Float[Array, "rows heads seq keys"]
    states: Any
    seen: Any


class Memory(NamedTuple):
    """Keys and values that a block, or with a leading axis a stack of them, is given.

    Attributes:
      past: of the tokens before the running ones.
      cross: of the encoder's states; None where the block is to compute them. As made by an attention, or where there
        is a past, as they lie in a cache.
    """

    past: KV | None = None
    cross: KV | None = None


class Attention(nnx.Module):
    """softmax(Q Kᵀ + bias) V: scores are not scaled."""

    def __init__(self, config: Config, block: str, path: str, *, rngs: nnx.Rngs, dtype: Any):
        d_model, d_kv, heads, factor = config.d_model, config.d_kv, config.num_heads, config.initializer_factor
        self.num_heads, self.dropout_rate, self.path = heads, config.dropout_rate, path
        self.q = linear(d_model, heads * d_kv, factor * (d_model * d_kv) ** -0.5, rngs, dtype)
        self.k = linear(d_model, heads * d_kv, factor * d_model**-0.5, rngs, dtype)
        self.v = linear(d_model, heads * d_kv, factor * d_model**-0.5, rngs, dtype)
        self.o = linear(heads * d_kv, d_model, factor * (heads * d_kv) ** -0.5, rngs, dtype)
        self.keys_values = KeyValues(d_model, heads, d_kv, block)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        kv: KV,
        mask: Any,
        bias: Any = None,
        causal: bool = False,
        past: KV | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        q = self._heads(self.q(x))
        if past is not None:
            y = step_attention(self.keys_values, q, past, kv, x, seen=mask, scale=1.0, bias=bias)
            return self.o(y.reshape(*y.shape[:2], -1))
        k, v, mask = self.keys_values(*kv, mask, x)
        rate, path = self.dropout_rate, f"{self.path}/attention_dropout"
        y = attention(q, k, v, causal=causal, scale=1.0, mask=mask, bias=bias, dropout=rate, path=path)
        return self.o(y.reshape(*y.shape[:2], -1))

    def read(self, states: Float[Array, "batch keys d_model"]) -> KV:
        """Their keys and values."""
        return KV(self._heads(self.k(states)), self._heads(self.v(states)))

    def none(self, x: Float[Array, "batch seq d_model"]) -> KV:
        """Keys and values of no token, where all are in a cache."""
        empty = self._heads(jnp.zeros((len(x), 0, self.q.out_features), x.dtype))
        return KV(empty, empty)

    def _heads(self, y: Float[Array, "batch seq d_out"]) -> Float[Array, "batch seq heads d_head"]:
        return y.reshape(*y.shape[:2], self.num_heads, self.keys_values.d_head)


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
        h = self.SelfAttention(h, new, context.mask, context.bias, self.causal, past)
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
        attend, past = self.EncDecAttention, None
        if memory.cross is None:
            kv = attend.read(context.states)
        elif memory.past is None:
            kv = memory.cross
        else:
            kv, past = attend.none(x), memory.cross
        h = attend(self.layer_norm(x), kv, context.seen, past=past)
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


class Stack(nnx.Module):
    """The encoder, or the decoder: all its blocks share one bias, a number per head and bucket of distances.

    The `options` of its methods are those of the scan.
    """

    def __init__(self, config: Config, decoder: bool, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.decoder = config, decoder
        self.name = "decoder" if decoder else "encoder"
        self.input_embedding = InputEmbedding(config.d_model, self.name, causal=decoder)
        buckets, std = config.relative_attention_num_buckets, config.initializer_factor * config.d_model**-0.5
        self.relative_attention_bias = token_table(buckets, config.num_heads, std, None, rngs=rngs, dtype=dtype)
        path, depth = f"{self.name}/block", config.num_decoder_layers if decoder else config.num_layers
        self.block = _stack.stack(lambda r: Block(config, decoder, path, rngs=r, dtype=dtype), depth, rngs)
        self.final_layer_norm = norm(config, dtype)

    def __call__(
        self,
        e: Float[Array, "batch seq d_model"],
        mask: Any,
        positions: Any,
        encoded: Encoded | None = None,
        **options: Any,
    ) -> Encoded:
        """The normalised last states and their mask, with virtual tokens in front."""
        x, places, whole, _ = self.input_embedding(e, _counted(positions, e), mask, None)
        states, seen = (None, None) if encoded is None else encoded
        with scope(**in_front(x.shape[1] - e.shape[1], e.shape[:2], mask, None)):
            x, _ = self._run(x, Context(whole, self._bias(places), states, seen), Memory(), False, options)
        return Encoded(x, whole)

    def prefill(
        self,
        cache: Cache,
        e: Float[Array, "batch seq d_model"],
        mask: Any,
        positions: Any,
        encoded: Encoded,
        **options: Any,
    ) -> tuple[Float[Array, "batch keys d_model"], Cache]:
        """As a call: the states, and the cache with these tokens and the encoder's states in it."""
        positions = _counted(positions, e)
        x, places, whole, _ = self.input_embedding(e, positions, mask, None)
        context = Context(whole, self._bias(places), None, encoded.mask)
        with scope(**in_front(x.shape[1] - e.shape[1], e.shape[:2], mask, None)):
            cross = self._cross(encoded.states)
            x, new = self._run(x, context, Memory(cross=cross), True, options)
        cache = filled(cache, new, whole, places, positions)
        return x, cache._replace(cross=in_cache(cross), cross_mask=encoded.mask)

    def step(
        self, cache: Cache, e: Float[Array, "batch 1 d_model"], **options: Any
    ) -> tuple[Float[Array, "batch 1 d_model"], Cache]:
        """The state of the next token of every row, and the cache with it."""
        with scope(**step_scope(len(e))):
            x, places, _, _ = self.input_embedding(e, cache.next[:, None], None, None)
            bias = self._bias(places, jnp.concatenate([cache.places, places], 1))
            context = Context(reach(cache), bias, None, cache.cross_mask)
            x, new = self._run(x, context, Memory(cache.kv, cache.cross), True, options)
        return or_nan(x, cache), extended(cache, new, places)

    def _run(
        self, x: jax.Array, context: Context, memory: Memory, keep: bool, options: Mapping[str, Any]
    ) -> tuple[jax.Array, Any]:
        """The normalised last states and, if they are to be kept, all blocks' keys and values of `x`."""

        def body(block: Block, x: jax.Array, memory: Memory) -> tuple[jax.Array, KV | None]:
            x, new = block(x, context, memory)
            return x, new if keep else None

        rate = self.config.dropout_rate
        x = dropout(x, rate, f"{self.name}/embed_dropout")
        x, new = _stack.scan(self.block, body, x, memory, **options)
        return dropout(self.final_layer_norm(x), rate, f"{self.name}/final_dropout"), new

    def _cross(self, states: Float[Array, "batch keys d_model"]) -> KV:
        """Keys and values of the encoder's states, of all blocks."""

        def body(block: Block, carry: None, _: None) -> tuple[None, KV]:
            return carry, block.layer[1].EncDecAttention.read(states)

        return _stack.scan(self.block, body, None)[1]

    def _bias(self, positions: Int[Array, "rows seq"], keys: Any = None) -> Float[Array, "rows heads seq keys"]:
        buckets = relative_buckets(
            positions,
            keys,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
            causal=self.decoder,
        )
        return jnp.moveaxis(self.relative_attention_bias(buckets), -1, 1).astype(jnp.float32)


def _counted(positions: Any, e: jax.Array) -> Int[Array, "rows seq"]:
    return jnp.arange(e.shape[1])[None] if positions is None else positions


def norm(config: Config, dtype: Any) -> RMSNorm:
    """The norm of a stream: scale, and no mean taken off."""
    return RMSNorm(config.d_model, config.layer_norm_epsilon, dtype=dtype, start=config.initializer_factor)


def linear(d_in: int, d_out: int, std: float, rngs: nnx.Rngs, dtype: Any) -> nnx.Linear:
    """A projection; none of T5's has a bias."""
    init = nnx.initializers.normal(std)
    return nnx.Linear(d_in, d_out, use_bias=False, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)
