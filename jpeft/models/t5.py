# SPDX-License-Identifier: Apache-2.0
"""T5: an encoder and a decoder with relative positions (Raffel et al., https://arxiv.org/abs/1910.10683).

Computes what transformers' `T5Model` and `T5ForConditionalGeneration` do, for T5 and for T5 v1.1 and Flan-T5, whose
MLP is gated and whose head is no copy of the table. Axes: batch, seq (the encoder's tokens), out (the decoder's),
heads, d_head (d_kv), d_model, d_ff.
"""

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
from ._layers import ACTIVATIONS, RMSNorm, gated, in_front, token_table
from ._relative import relative_buckets
from ._t5_config import PRESETS, Config
from ._weights import TRANSPOSE, Entry, Ignore, Rule, Tied, module_names

__all__ = ["HEADS", "PREFIXES", "PRESETS", "T5", "TASKS", "WEIGHTS", "Config", "Encoded"]

TASKS = ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
#: Checkpoints with a head put nothing before the backbone's names.
PREFIXES = ()
#: Modules that some tasks have and others lack.
HEADS = ("lm_head",)


class Encoded(NamedTuple):
    """What a decoder reads of the encoder: its states, virtual tokens among them, and which of them it sees."""

    states: Float[Array, "batch seq d_model"]
    mask: Shaped[Array, "batch seq"] | None


class Context(NamedTuple):
    """What the layers of a stack have in common: visibility and bias of their own tokens, and the encoder's states."""

    mask: Any
    bias: Float[Array, "rows heads seq seq"]
    encoded: Encoded | None


class Attention(nnx.Module):
    """softmax(Q Kᵀ + bias) V: scores are not scaled."""

    def __init__(self, config: Config, block: str, path: str, *, rngs: nnx.Rngs, dtype: Any):
        d_model, d_kv, heads, factor = config.d_model, config.d_kv, config.num_heads, config.initializer_factor
        self.num_heads, self.dropout_rate, self.path = heads, config.dropout_rate, path
        self.q = _linear(d_model, heads * d_kv, factor * (d_model * d_kv) ** -0.5, rngs, dtype)
        self.k = _linear(d_model, heads * d_kv, factor * d_model**-0.5, rngs, dtype)
        self.v = _linear(d_model, heads * d_kv, factor * d_model**-0.5, rngs, dtype)
        self.o = _linear(heads * d_kv, d_model, factor * (heads * d_kv) ** -0.5, rngs, dtype)
        self.keys_values = KeyValues(d_model, heads, d_kv, block)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        states: Float[Array, "batch keys d_model"],
        mask: Any,
        bias: Any = None,
        causal: bool = False,
    ) -> Float[Array, "batch seq d_model"]:
        q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (self.q(x), self.k(states), self.v(states)))
        k, v, mask = self.keys_values(k, v, mask, x)
        rate, path = self.dropout_rate, f"{self.path}/attention_dropout"
        y = attention(q, k, v, causal=causal, scale=1.0, mask=mask, bias=bias, dropout=rate, path=path)
        return self.o(y.reshape(*y.shape[:2], -1))


class SelfAttentionLayer(nnx.Module):
    """Attention to the stack's own tokens, on the normalised stream and added to it."""

    def __init__(self, config: Config, causal: bool, path: str, *, rngs: nnx.Rngs, dtype: Any):
        self.causal, self.dropout_rate, self.path = causal, config.dropout_rate, path
        self.SelfAttention = Attention(config, "attention", path, rngs=rngs, dtype=dtype)
        self.layer_norm = _norm(config, dtype)
        self.residual = Residual(config.d_model, "attention")

    def __call__(self, x: Float[Array, "batch seq d_model"], context: Context) -> Float[Array, "batch seq d_model"]:
        h = self.layer_norm(x)
        h = self.SelfAttention(h, h, context.mask, context.bias, self.causal)
        return checkpoint_name(self.residual(dropout(h, self.dropout_rate, self.path), x), "attention_output")


class CrossAttentionLayer(nnx.Module):
    """Attention to the encoder's states, on the normalised stream and added to it."""

    def __init__(self, config: Config, path: str, *, rngs: nnx.Rngs, dtype: Any):
        self.dropout_rate, self.path = config.dropout_rate, path
        self.EncDecAttention = Attention(config, "cross_attention", path, rngs=rngs, dtype=dtype)
        self.layer_norm = _norm(config, dtype)
        self.residual = Residual(config.d_model, "cross_attention")

    def __call__(self, x: Float[Array, "batch seq d_model"], context: Context) -> Float[Array, "batch seq d_model"]:
        assert context.encoded is not None
        h = self.EncDecAttention(self.layer_norm(x), *context.encoded)
        return checkpoint_name(self.residual(dropout(h, self.dropout_rate, self.path), x), "attention_output")


class Dense(nnx.Module):
    """wo(activation(wi(x))), or wo(activation(wi_0(x)) · wi_1(x))."""

    def __init__(self, config: Config, path: str, *, rngs: nnx.Rngs, dtype: Any):
        d_model, d_ff, factor = config.d_model, config.d_ff, config.initializer_factor
        self.config, self.path = config, path
        if config.is_gated:
            self.wi_0 = _linear(d_model, d_ff, factor * d_model**-0.5, rngs, dtype)
            self.wi_1 = _linear(d_model, d_ff, factor * d_model**-0.5, rngs, dtype)
        else:
            self.wi = _linear(d_model, d_ff, factor * d_model**-0.5, rngs, dtype)
        self.wo = _linear(d_ff, d_model, factor * d_ff**-0.5, rngs, dtype)

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
        self.layer_norm = _norm(config, dtype)
        self.residual = Residual(config.d_model, "mlp")

    def __call__(self, x: Float[Array, "batch seq d_model"], context: Context) -> Float[Array, "batch seq d_model"]:
        del context
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

    def __call__(self, x: Float[Array, "batch seq d_model"], context: Context) -> Float[Array, "batch seq d_model"]:
        x = checkpoint_name(x, "block_input")
        for layer in self.layer:
            x = layer(x, context)
        return x


class Stack(nnx.Module):
    """The encoder, or the decoder: all its blocks share one bias, a number per head and bucket of distances."""

    def __init__(self, config: Config, decoder: bool, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.decoder = config, decoder
        self.name = "decoder" if decoder else "encoder"
        self.input_embedding = InputEmbedding(config.d_model, self.name, causal=decoder)
        buckets, std = config.relative_attention_num_buckets, config.initializer_factor * config.d_model**-0.5
        self.relative_attention_bias = token_table(buckets, config.num_heads, std, None, rngs=rngs, dtype=dtype)
        path, depth = f"{self.name}/block", config.num_decoder_layers if decoder else config.num_layers
        self.block = _stack.stack(lambda r: Block(config, decoder, path, rngs=r, dtype=dtype), depth, rngs)
        self.final_layer_norm = _norm(config, dtype)

    def __call__(
        self,
        e: Float[Array, "batch seq d_model"],
        mask: Any,
        positions: Any,
        encoded: Encoded | None = None,
        **options: Any,
    ) -> Encoded:
        """The normalised last states and their mask, with virtual tokens in front; `options` are those of the scan."""
        rate, seq = self.config.dropout_rate, e.shape[1]
        positions = jnp.arange(seq)[None] if positions is None else positions
        x, places, whole, _ = self.input_embedding(e, positions, mask, None)
        context = Context(whole, self._bias(places), encoded)

        def body(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x, context), None

        x = dropout(x, rate, f"{self.name}/embed_dropout")
        with scope(**in_front(x.shape[1] - seq, (*x.shape[:1], seq), mask, None)):
            x, _ = _stack.scan(self.block, body, x, **options)
        return Encoded(dropout(self.final_layer_norm(x), rate, f"{self.name}/final_dropout"), whole)

    def _bias(self, positions: Int[Array, "rows seq"]) -> Float[Array, "rows heads seq seq"]:
        buckets = relative_buckets(
            positions,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
            causal=self.decoder,
        )
        return jnp.moveaxis(self.relative_attention_bias(buckets), -1, 1).astype(jnp.float32)


class T5(nnx.Module):
    """T5 for one task: `SEQ_2_SEQ_LM` or `FEATURE_EXTRACTION` (the decoder's states).

    Attributes:
      head: paths of the task's own output layers; empty where the head is tied to the embedding.
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
        self.config, self.task, self.dtype = config, task, dtype
        self.remat, self.unroll = remat, unroll
        self.head = _head(config, task)
        factor = config.initializer_factor
        self.shared = token_table(config.vocab_size, config.d_model, factor, None, rngs=rngs, dtype=dtype)
        self.encoder = Stack(config, False, rngs=rngs, dtype=dtype)
        self.decoder = Stack(config, True, rngs=rngs, dtype=dtype)
        if self.head:
            self.lm_head = _linear(config.d_model, config.vocab_size, factor, rngs, dtype)

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"] | None = None,
        attention_mask: Shaped[Array, "batch seq"] | None = None,
        token_type_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        inputs_embeds: Float[Array, "batch seq d_model"] | None = None,
        *,
        decoder_input_ids: Int[Array, "batch out"],
        decoder_attention_mask: Shaped[Array, "batch out"] | None = None,
        decoder_positions: Int[Array, "batch out"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch out _"]:
        """Logits `[batch out vocab]`, or the decoder's states, by task.

        Args:
          input_ids: the encoder's tokens; or give `inputs_embeds` in their place.
          attention_mask: 1 where there is a token, 0 where there is padding; None where all are tokens.
          token_type_ids: must be None; T5 has none.
          segment_ids: must be None; an encoder and a decoder pack no rows.
          positions: of the encoder's tokens, of which differences alone count; None counts from 0.
          inputs_embeds: token embeddings.
          decoder_input_ids: what the decoder has written so far, from the start token on (see `decoder_inputs`).
          decoder_attention_mask, decoder_positions: as those of the encoder.
          key: turns dropout on; the same key gives the same masks. None is deterministic.
        """
        with scope(key=key):
            encoded = self.encode(input_ids, attention_mask, token_type_ids, segment_ids, positions, inputs_embeds)
            return self.logits(self.decode(encoded, decoder_input_ids, decoder_attention_mask, decoder_positions))

    def hidden(
        self,
        input_ids: Int[Array, "batch seq"] | None = None,
        attention_mask: Shaped[Array, "batch seq"] | None = None,
        token_type_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        inputs_embeds: Float[Array, "batch seq d_model"] | None = None,
        *,
        decoder_input_ids: Int[Array, "batch out"],
        decoder_attention_mask: Shaped[Array, "batch out"] | None = None,
        decoder_positions: Int[Array, "batch out"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch out d_model"]:
        """The decoder's normalised last states; arguments as in a call."""
        with scope(key=key):
            encoded = self.encode(input_ids, attention_mask, token_type_ids, segment_ids, positions, inputs_embeds)
            return self.decode(encoded, decoder_input_ids, decoder_attention_mask, decoder_positions)

    def encode(
        self,
        input_ids: Int[Array, "batch seq"] | None = None,
        attention_mask: Shaped[Array, "batch seq"] | None = None,
        token_type_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        inputs_embeds: Float[Array, "batch seq d_model"] | None = None,
    ) -> Encoded:
        """The encoder's states, for `decode`; virtual tokens that a method puts in front stay among them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        for name, value in {"token_type_ids": token_type_ids, "segment_ids": segment_ids}.items():
            if value is not None:
                raise ValueError(f"a t5 model has no token types and packs no rows; {name} must be None")
        e = inputs_embeds if input_ids is None else self.shared(input_ids)
        assert e is not None
        options = {"remat_policy": self.remat, "unroll": self.unroll}
        return self.encoder(e.astype(self.dtype), attention_mask, positions, **options)

    def decode(
        self,
        encoded: Encoded,
        decoder_input_ids: Int[Array, "batch out"],
        decoder_attention_mask: Shaped[Array, "batch out"] | None = None,
        decoder_positions: Int[Array, "batch out"] | None = None,
    ) -> Float[Array, "batch out d_model"]:
        """The decoder's states. Virtual tokens that a method puts in front of its own are left out."""
        options = {"remat_policy": self.remat, "unroll": self.unroll}
        e = self.shared(decoder_input_ids)
        x, _ = self.decoder(e, decoder_attention_mask, decoder_positions, encoded, **options)
        return x[:, x.shape[1] - decoder_input_ids.shape[1] :]

    def logits(
        self, hidden: Float[Array, "batch out d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "batch out _"]:
        """What the task's head makes of `hidden`, in float32; a tied head reads hidden / √d_model."""
        del attention_mask, key
        if self.task == "SEQ_2_SEQ_LM":
            hidden = self.lm_head(hidden) if self.head else self.shared.attend(hidden * self.config.d_model**-0.5)
        return hidden.astype(jnp.float32)

    def decoder_inputs(self, labels: Int[Array, "batch out"]) -> Int[Array, "batch out"]:
        """What the decoder reads to give `labels`: the start token, then all but the last; padding for ignored ones.

        Raises:
          ValueError: the config has neither a decoder_start_token_id nor a pad_token_id.
        """
        pad = self.config.pad_token_id
        start = pad if self.config.decoder_start_token_id is None else self.config.decoder_start_token_id
        if start is None or pad is None:
            raise ValueError("the config has no pad_token_id, which a decoder starts with and reads for ignored labels")
        shifted = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start)
        return jnp.where(shifted < 0, pad, shifted)

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of its stack."""
        entries = WEIGHTS(self.config, self.task)
        decoder = [entry for entry in entries if isinstance(entry, Rule) and entry.path.startswith("decoder/")]
        rest = [entry for entry in entries if entry not in decoder]
        depths = self.config.num_layers, self.config.num_decoder_layers
        return module_names(rest, depths[0]) | module_names(decoder, depths[1])


def _norm(config: Config, dtype: Any) -> RMSNorm:
    return RMSNorm(config.d_model, config.layer_norm_epsilon, dtype=dtype, start=config.initializer_factor)


def _linear(d_in: int, d_out: int, std: float, rngs: nnx.Rngs, dtype: Any) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(d_in, d_out, use_bias=False, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)


def _head(config: Config, task: str) -> tuple[str, ...]:
    return ("lm_head",) if task == "SEQ_2_SEQ_LM" and not config.tie_word_embeddings else ()


def WEIGHTS(config: Config, task: str) -> tuple[Entry, ...]:
    """The table of weights."""
    entries: list[Entry] = [
        Rule("shared.weight", "shared/embedding"),
        Tied("encoder.embed_tokens.weight", "shared/embedding", head=False),
        Tied("decoder.embed_tokens.weight", "shared/embedding", head=False),
        Ignore("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),  # which nothing reads
    ]
    for stack in ("encoder", "decoder"):
        # the first block's module holds the bias of all; it goes before the rule that names the stack itself
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        entries.append(Rule(f"{first}.weight", f"{stack}/relative_attention_bias/embedding"))
        entries += [rule for name in _block(config, stack) for rule in _rules(f"{stack}.block.{{i}}.layer.{name}")]
        entries.append(Rule(f"{stack}.final_layer_norm.weight", f"{stack}/final_layer_norm/scale"))
    if task == "SEQ_2_SEQ_LM" and config.tie_word_embeddings:
        entries.append(Tied("lm_head.weight", "shared/embedding"))
    elif task == "SEQ_2_SEQ_LM":
        entries.append(Rule("lm_head.weight", "lm_head/kernel", TRANSPOSE))
    return tuple(entries)


def _block(config: Config, stack: str) -> list[str]:
    """The modules of a block, from its list of layers on."""
    layers: list[tuple[str, Any]] = [("SelfAttention", "qkvo")]
    if stack == "decoder":
        layers.append(("EncDecAttention", "qkvo"))
    layers.append(("DenseReluDense", ("wi_0", "wi_1", "wo") if config.is_gated else ("wi", "wo")))
    return [
        name
        for i, (module, own) in enumerate(layers)
        for name in (*(f"{i}.{module}.{n}" for n in own), f"{i}.layer_norm")
    ]


def _rules(hf: str) -> list[Entry]:
    path = hf.replace(".{i}.", ".").replace(".", "/")
    if hf.endswith("layer_norm"):
        return [Rule(f"{hf}.weight", f"{path}/scale")]
    return [Rule(f"{hf}.weight", f"{path}/kernel", TRANSPOSE)]
