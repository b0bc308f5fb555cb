# SPDX-License-Identifier: Apache-2.0
"""The modules that DeBERTa has and BERT has not: disentangled attention, its table, a convolution, its pooler."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .._given import Given
from .._scope import dropout, scope
from .._wide import widened
from ..seams import KeyValues
from ._attention import attention
from ._bert_layers import linear
from ._deberta_config import Config
from ._disentangled import Distances, content_to_position, distances, position_to_content
from ._layer_norm import LayerNorm
from ._layers import ACTIVATIONS, first_token, token_table


class Embeddings(nnx.Module):
    """Words and, where the model has them, positions and token types, summed, widened and normalised; 0 at padding."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        width, std = config.d_embedding, config.initializer_range

        def table(rows: int, pad: int | None) -> nnx.Embed:
            return token_table(rows, width, std, pad, rngs=rngs, dtype=dtype)

        self.config = config
        self.word_embeddings = table(config.vocab_size, config.pad_token_id)
        if config.position_biased_input:
            self.position_embeddings = table(config.max_position_embeddings, None)
        if config.type_vocab_size:
            self.token_type_embeddings = table(config.type_vocab_size, None)
        if width != config.hidden_size:
            self.embed_proj = linear(config, width, config.hidden_size, rngs, dtype, use_bias=False)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)

    def words(self, input_ids: Int[Given, "batch seq"]) -> Float[Array, "batch seq d_embedding"]:
        """The tokens' own vectors."""
        return self.word_embeddings(jnp.asarray(input_ids))

    def __call__(
        self,
        e: Float[Array, "batch seq d_embedding"],
        positions: Int[Given, "..."],
        token_type_ids: Int[Array, "..."],
        mask: Any,
    ) -> Float[Array, "batch seq d_model"]:
        config = self.config
        if config.position_biased_input:
            e = e + self.position_embeddings(jnp.asarray(positions))
        if config.type_vocab_size:
            e = e + self.token_type_embeddings(token_type_ids)
        if config.d_embedding != config.hidden_size:
            e = self.embed_proj(e)
        return dropout(masked(self.LayerNorm(e), mask), config.hidden_dropout_prob, "embeddings/dropout")


def masked(x: Float[Array, "batch seq d_model"], mask: Any) -> Float[Array, "batch seq d_model"]:
    """`x` with 0 at padding."""
    return x if mask is None else x * (mask != 0)[:, :, None].astype(x.dtype)


class RelativeTable(nnx.Module):
    """A vector for every bucket of distances."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        init = nnx.initializers.normal(config.initializer_range)
        self.embedding = nnx.Param(init(rngs.params(), (2 * config.span, config.hidden_size), dtype))

    def __call__(self) -> Float[Array, "rows d_model"]:
        return self.embedding[...]


class Relative(NamedTuple):
    """What all layers read of relative positions: the table's rows that are in use, and where each pair reads."""

    table: Float[Array, "rows d_model"]
    far: Distances


class RelativePositions(nnx.Module):
    """The table, normalised if the model has a norm for it, for tokens one apart or at given positions."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        self.rel_embeddings = RelativeTable(config, rngs=rngs, dtype=dtype)
        if config.norm_rel_ebd == "layer_norm":
            self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)

    def __call__(self, seq: int, positions: Int[Given, "rows seq"] | None) -> Relative:
        far = distances(self.config, seq, positions)
        table = self.rel_embeddings()[far.rows]
        return Relative(self.LayerNorm(table) if self.config.norm_rel_ebd == "layer_norm" else table, far)


class DisentangledAttention(nnx.Module):
    """softmax((Q Kᵀ + Q K'ᵀ + Q' Kᵀ) / √(parts · d_head)) V, where K' and Q' are of distances (`_disentangled`)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        d_model, heads = config.hidden_size, config.num_attention_heads
        self.config = config
        self.query_proj = linear(config, d_model, d_model, rngs, dtype)
        self.key_proj = linear(config, d_model, d_model, rngs, dtype)
        self.value_proj = linear(config, d_model, d_model, rngs, dtype)
        if config.relates("c2p") and not config.share_att_key:
            self.pos_key_proj = linear(config, d_model, d_model, rngs, dtype)
        if config.relates("p2c") and not config.share_att_key:
            self.pos_query_proj = linear(config, d_model, d_model, rngs, dtype)
        self.keys_values = KeyValues(d_model, heads, d_model // heads)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        mask: Any,
        segment_ids: Int[Given, "batch seq"] | None,
        relative: Relative | None,
    ) -> Float[Array, "batch seq d_model"]:
        q, k, v = (self._heads(y) for y in (self.query_proj(x), self.key_proj(x), self.value_proj(x)))
        k, v, mask = self.keys_values(k, v, mask, x)
        tables = {} if relative is None else self._projected(relative.table)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, tables: dict[str, jax.Array]) -> jax.Array:
            return attention(
                q,
                k,
                v,
                causal=False,
                mask=mask,
                segment_ids=segment_ids,
                scale=self.config.score_scale,
                bias=self._bias(q, k, tables, relative),
                dropout=self.config.attention_probs_dropout_prob,
                path="layers/attention/self/dropout",
            )

        # Kept, the scores of positions are seq x seq numbers a head and layer: where these are more than two arrays of
        # the stream, the backward pass computes them again.
        if x.shape[1] > 2 * q.shape[-1]:
            attend = jax.checkpoint(attend, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
        return attend(q, k, v, tables).reshape(x.shape)

    def _projected(self, table: Float[Array, "rows d_model"]) -> dict[str, Float[Array, "rows heads d_head"]]:
        """The table as keys of queries (c2p) and as queries of keys (p2c), times the scale of scores."""
        config = self.config
        keys, queries = ("key_proj", "query_proj") if config.share_att_key else ("pos_key_proj", "pos_query_proj")
        table = dropout(table, config.hidden_dropout_prob, "layers/attention/self/pos_dropout")[None]
        found = {}
        with scope(text=None, segments=None):  # its rows are no tokens
            for kind, name in {"c2p": keys, "p2c": queries}.items():
                if config.relates(kind):
                    y = self._heads(getattr(self, name)(table))[0]
                    found[kind] = (widened(y) * config.score_scale).astype(y.dtype)
        return found

    def _bias(self, q: jax.Array, k: jax.Array, tables: dict[str, jax.Array], relative: Relative | None) -> Any:
        """What scores get for relative positions; None for none. Keys in front of the tokens' own have no position."""
        parts = []
        if relative is not None and "c2p" in tables:
            parts.append(content_to_position(relative.far, q, tables["c2p"]))
        if relative is not None and "p2c" in tables:
            parts.append(position_to_content(relative.far, k[:, k.shape[1] - q.shape[1] :], tables["p2c"]))
        return jnp.swapaxes(sum(parts), 0, 1) if parts else None

    def _heads(self, y: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq heads d_head"]:
        return y.reshape(*y.shape[:2], self.config.num_attention_heads, -1)


class ConvLayer(nnx.Module):
    """A convolution over the embedded text, which joins the stream behind the first layer."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        d_model = config.hidden_size
        self.config = config
        self.conv = nnx.Conv(
            d_model,
            d_model,
            kernel_size=(config.conv_kernel_size,),
            padding="VALID",
            feature_group_count=config.conv_groups,
            dtype=dtype,
            param_dtype=dtype,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        self.LayerNorm = LayerNorm(d_model, config.layer_norm_eps, dtype=dtype)

    def read(
        self, e: Float[Array, "batch seq d_model"], mask: Any, segment_ids: Int[Given, "batch seq"] | None
    ) -> Float[Array, "batch seq d_model"]:
        """What it makes of the text; in a packed row the neighbours in other segments count as 0."""
        side = self.config.conv_kernel_size // 2
        around = jnp.pad(e, ((0, 0), (side, side), (0, 0)))
        h = self.conv(around if segment_ids is None else self._windows(around, segment_ids)).reshape(e.shape)
        h = dropout(masked(h, mask), self.config.hidden_dropout_prob, "conv/dropout")
        return ACTIVATIONS[self.config.conv_act](h)

    def join(
        self, h: Float[Array, "batch seq d_model"], mask: Any, x: Float[Array, "batch seq d_model"]
    ) -> Float[Array, "batch seq d_model"]:
        """The stream `x` with what was read."""
        return masked(self.LayerNorm(x + h), mask)

    def _windows(self, around: jax.Array, segment_ids: Given) -> Float[Array, "tokens window d_model"]:
        """Each token with its neighbours."""
        seq, size = segment_ids.shape[1], self.config.conv_kernel_size
        side = size // 2
        own = jnp.pad(segment_ids, ((0, 0), (side, side)))
        parts = [
            around[:, i : i + seq] * (own[:, i : i + seq] == segment_ids)[:, :, None].astype(around.dtype)
            for i in range(size)
        ]
        return jnp.stack(parts, 2).reshape(-1, size, around.shape[-1])


class ContextPooler(nnx.Module):
    """An activation of a projection of the first token's state."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        self.dense = linear(config, config.hidden_size, config.hidden_size, rngs, dtype)

    def __call__(self, hidden: Float[Array, "batch seq d_model"], mask: Any) -> Float[Array, "batch d_model"]:
        x = dropout(first_token(hidden, mask), self.config.pooler_dropout, "pooler/dropout")
        return ACTIVATIONS[self.config.pooler_hidden_act](self.dense(x))
