# SPDX-License-Identifier: Apache-2.0
"""The modules that BERT and RoBERTa are made of, small to large.

DeBERTa's layers are the same around another self-attention; its Config has the same names for what they read.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from .._given import Given
from .._scope import dropout
from ..seams import KeyValues, Residual
from ._attention import attention
from ._bert_config import Config
from ._layer_norm import LayerNorm
from ._layers import ACTIVATIONS, token_table
from ._linear import Linear


def linear(config: Any, d_in: int, d_out: int, rngs: nnx.Rngs, dtype: Any, *, use_bias: bool = True) -> Linear:
    """A projection with first values as transformers draws them."""
    init = nnx.initializers.normal(config.initializer_range)
    return Linear(d_in, d_out, use_bias=use_bias, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)


class Embeddings(nnx.Module):
    """Words, positions and token types, summed and normalised."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):

        def table(rows: int, pad: int | None) -> nnx.Embed:
            return token_table(rows, config.hidden_size, config.initializer_range, pad, rngs=rngs, dtype=dtype)

        self.config = config
        self.word_embeddings = table(config.vocab_size, config.pad_token_id)
        padding = config.pad_token_id if config.is_roberta else None
        self.position_embeddings = table(config.max_position_embeddings, padding)
        self.token_type_embeddings = table(config.type_vocab_size, None)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)

    def words(self, input_ids: Int[Given, "batch seq"]) -> Float[Array, "batch seq d_model"]:
        """The tokens' own vectors."""
        return self.word_embeddings(jnp.asarray(input_ids))

    def __call__(
        self, e: Float[Array, "batch seq d_model"], positions: Int[Given, "..."], token_type_ids: Int[Array, "..."]
    ) -> Float[Array, "batch seq d_model"]:
        rows = jnp.asarray(positions) + self.config.first_position
        e = e + self.token_type_embeddings(token_type_ids) + self.position_embeddings(rows)
        return dropout(self.LayerNorm(e), self.config.hidden_dropout_prob, "embeddings/dropout")


class SelfAttention(nnx.Module):
    """softmax(Q Kᵀ / √d_head) V, every token to every token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        d_model = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout_rate = config.attention_probs_dropout_prob
        self.query = linear(config, d_model, d_model, rngs, dtype)
        self.key = linear(config, d_model, d_model, rngs, dtype)
        self.value = linear(config, d_model, d_model, rngs, dtype)
        self.keys_values = KeyValues(d_model, self.num_heads, d_model // self.num_heads)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        mask: Shaped[Given, "batch seq"] | None,
        segment_ids: Int[Given, "batch seq"] | None,
    ) -> Float[Array, "batch seq d_model"]:
        q, k, v = (self._heads(y) for y in (self.query(x), self.key(x), self.value(x)))
        k, v, mask = self.keys_values(k, v, mask, x)
        y = attention(
            q,
            k,
            v,
            causal=False,
            mask=mask,
            segment_ids=segment_ids,
            scale=q.shape[-1] ** -0.5,
            dropout=self.dropout_rate,
            path="layers/attention/self/dropout",
        )
        return y.reshape(x.shape)

    def _heads(self, y: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq heads d_head"]:
        return y.reshape(*y.shape[:2], self.num_heads, -1)


class Output(nnx.Module):
    """The end of a block: back to d_model, and onto the stream, which is normalised after."""

    def __init__(self, config: Any, d_in: int, path: str, block: str, *, rngs: nnx.Rngs, dtype: Any):
        self.dropout_rate = config.hidden_dropout_prob
        self.path = path
        self.dense = linear(config, d_in, config.hidden_size, rngs, dtype)
        norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)
        self.residual = Residual(config.hidden_size, block, norm)

    def __call__(self, h: Float[Array, "batch seq d_in"], x: Float[Array, "batch seq d_model"]) -> Any:
        return self.residual(dropout(self.dense(h), self.dropout_rate, self.path), x)


class Attention(nnx.Module):
    """The first block of a layer."""

    def __init__(self, config: Any, attend: Any, *, rngs: nnx.Rngs, dtype: Any):
        self.self = attend(config, rngs=rngs, dtype=dtype)
        path = "layers/attention/output/dropout"
        self.output = Output(config, config.hidden_size, path, "attention", rngs=rngs, dtype=dtype)


class Intermediate(nnx.Module):
    """The wide half of the MLP."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs, dtype: Any):
        self.hidden_act = config.hidden_act
        self.dense = linear(config, config.hidden_size, config.intermediate_size, rngs, dtype)

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_ff"]:
        return ACTIVATIONS[self.hidden_act](self.dense(x))


class Layer(nnx.Module):
    """Self-attention, then an MLP; each is added to the stream and normalised.

    `attend` is the class of the former, which is called with the stream and whatever else the layer is.
    """

    def __init__(self, config: Any, attend: Any = SelfAttention, *, rngs: nnx.Rngs, dtype: Any):
        self.attention = Attention(config, attend, rngs=rngs, dtype=dtype)
        self.intermediate = Intermediate(config, rngs=rngs, dtype=dtype)
        path = "layers/output/dropout"
        self.output = Output(config, config.intermediate_size, path, "mlp", rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "batch seq d_model"], *context: Any) -> Float[Array, "batch seq d_model"]:
        x = checkpoint_name(x, "block_input")
        h = self.attention.self(x, *context)
        x = checkpoint_name(self.attention.output(h, x), "attention_output")
        return checkpoint_name(self.output(self.intermediate(x), x), "mlp_output")


class Pooler(nnx.Module):
    """tanh of a projection of the first token's state."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.dense = linear(config, config.hidden_size, config.hidden_size, rngs, dtype)

    def __call__(self, hidden: Float[Array, "batch seq d_model"]) -> Float[Array, "batch d_model"]:
        return jnp.tanh(self.dense(hidden[:, 0]))


class ClassificationHead(nnx.Module):
    """RoBERTa's, on the first token's state: tanh of a projection of it, and another to the labels."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.dense = linear(config, config.hidden_size, config.hidden_size, rngs, dtype)
        self.out_proj = linear(config, config.hidden_size, config.num_labels, rngs, dtype)

    def __call__(self, x: Float[Array, "batch d_model"], rate: float) -> Float[Array, "batch labels"]:
        x = jnp.tanh(self.dense(dropout(x, rate, "classifier/dropout")))
        return self.out_proj(dropout(x, rate, "classifier/out_proj/dropout"))
