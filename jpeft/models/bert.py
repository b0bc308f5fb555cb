# SPDX-License-Identifier: Apache-2.0
"""BERT: a bidirectional encoder with post-norm layers (Devlin et al., https://arxiv.org/abs/1810.04805).

Computes what transformers' `BertModel` and its heads do. Axes: batch, seq, heads, d_head, d_model (hidden_size),
d_ff (intermediate_size), labels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from .. import _stack
from .._scope import dropout, scope
from ..seams import InputEmbedding, KeyValues, Residual
from . import _config
from ._attention import attention
from ._layer_norm import LayerNorm
from ._layers import ACTIVATIONS, in_front, positions_of, token_table
from ._weights import TRANSPOSE, Entry, Ignore, Renamed, Rule, module_names

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
#: What a checkpoint with a head puts before the backbone's names.
PREFIXES = ("bert.",)
#: Modules that some tasks have and others lack; `cls` is the pretraining head, which no task here has.
HEADS = ("pooler", "classifier", "qa_outputs", "cls")

_HEAD = {"SEQ_CLS": ("classifier",), "TOKEN_CLS": ("classifier",), "QUESTION_ANS": ("qa_outputs",)}
_POOLED = ("SEQ_CLS", "FEATURE_EXTRACTION")


@dataclasses.dataclass(frozen=True)
class Config:
    """The attributes of config.json that change what BERT computes, with transformers' defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    num_labels: int = 2
    model_type: str = "bert"
    hf: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json; an attribute that is unknown, or asks for what is not supported, is refused by name."""
        return _config.read(
            cls, hf, fixed={"position_embedding_type": ("absolute", None)}, harmless=["tie_word_embeddings"]
        )

    def to_hf(self) -> dict[str, Any]:
        """config.json."""
        return _config.write(self)


PRESETS = {
    "bert-base-uncased": Config(),
    "bert-large-uncased": Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "all-MiniLM-L6-v2": Config(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
}


class Embeddings(nnx.Module):
    """Words, positions and token types, summed and normalised."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        normal = nnx.initializers.normal(config.initializer_range)

        def embed(rows: int) -> nnx.Embed:
            return nnx.Embed(rows, config.hidden_size, dtype=dtype, param_dtype=dtype, embedding_init=normal, rngs=rngs)

        self.config = config
        self.word_embeddings = token_table(
            config.vocab_size, config.hidden_size, config.initializer_range, config.pad_token_id, rngs=rngs, dtype=dtype
        )
        self.position_embeddings = embed(config.max_position_embeddings)
        self.token_type_embeddings = embed(config.type_vocab_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)

    def words(self, input_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq d_model"]:
        """The tokens' own vectors."""
        return self.word_embeddings(input_ids)

    def __call__(
        self, e: Float[Array, "batch seq d_model"], positions: Int[Array, "..."], token_type_ids: Int[Array, "..."]
    ) -> Float[Array, "batch seq d_model"]:
        e = e + self.token_type_embeddings(token_type_ids) + self.position_embeddings(positions)
        return dropout(self.LayerNorm(e), self.config.hidden_dropout_prob, "embeddings/dropout")


class SelfAttention(nnx.Module):
    """softmax(Q Kᵀ / √d_head) V, every token to every token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        d_model = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout_rate = config.attention_probs_dropout_prob
        self.query = _linear(config, d_model, d_model, rngs, dtype)
        self.key = _linear(config, d_model, d_model, rngs, dtype)
        self.value = _linear(config, d_model, d_model, rngs, dtype)
        self.keys_values = KeyValues(d_model, self.num_heads, d_model // self.num_heads)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        mask: Shaped[Array, "batch seq"] | None,
        segment_ids: Int[Array, "batch seq"] | None,
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

    def __init__(self, config: Config, d_in: int, path: str, block: str, *, rngs: nnx.Rngs, dtype: Any):
        self.dropout_rate = config.hidden_dropout_prob
        self.path = path
        self.dense = _linear(config, d_in, config.hidden_size, rngs, dtype)
        norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)
        self.residual = Residual(config.hidden_size, block, norm)

    def __call__(self, h: Float[Array, "batch seq d_in"], x: Float[Array, "batch seq d_model"]) -> Any:
        return self.residual(dropout(self.dense(h), self.dropout_rate, self.path), x)


class Attention(nnx.Module):
    """The first block of a layer."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.self = SelfAttention(config, rngs=rngs, dtype=dtype)
        path = "layers/attention/output/dropout"
        self.output = Output(config, config.hidden_size, path, "attention", rngs=rngs, dtype=dtype)


class Intermediate(nnx.Module):
    """The wide half of the MLP."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.hidden_act = config.hidden_act
        self.dense = _linear(config, config.hidden_size, config.intermediate_size, rngs, dtype)

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_ff"]:
        return ACTIVATIONS[self.hidden_act](self.dense(x))


class Layer(nnx.Module):
    """Self-attention, then an MLP; each is added to the stream and normalised."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.intermediate = Intermediate(config, rngs=rngs, dtype=dtype)
        path = "layers/output/dropout"
        self.output = Output(config, config.intermediate_size, path, "mlp", rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "batch seq d_model"], mask: Any, segment_ids: Any) -> Any:
        x = checkpoint_name(x, "block_input")
        h = self.attention.self(x, mask, segment_ids)
        x = checkpoint_name(self.attention.output(h, x), "attention_output")
        return checkpoint_name(self.output(self.intermediate(x), x), "mlp_output")


class Pooler(nnx.Module):
    """tanh of a projection of the first token's state."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.dense = _linear(config, config.hidden_size, config.hidden_size, rngs, dtype)

    def __call__(self, hidden: Float[Array, "batch seq d_model"]) -> Float[Array, "batch d_model"]:
        return jnp.tanh(self.dense(hidden[:, 0]))


class Bert(nnx.Module):
    """BERT for one task: `SEQ_CLS`, `TOKEN_CLS`, `QUESTION_ANS` or `FEATURE_EXTRACTION`.

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
        self.head = _HEAD.get(task, ())
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.input_embedding = InputEmbedding(config.hidden_size, "encoder", False, config.max_position_embeddings)
        self.layers = _stack.stack(lambda r: Layer(config, rngs=r, dtype=dtype), config.num_hidden_layers, rngs)
        if task in _POOLED:
            self.pooler = Pooler(config, rngs=rngs, dtype=dtype)
        if self.head:
            setattr(self, self.head[0], _linear(config, config.hidden_size, config.num_labels, rngs, dtype))

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"] | None = None,
        attention_mask: Shaped[Array, "batch seq"] | None = None,
        token_type_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        inputs_embeds: Float[Array, "batch seq d_model"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "..."]:
        """Logits: `[batch labels]`, `[batch seq labels]`, `[batch seq 2]`, or the hidden states, by task.

        Args:
          input_ids: tokens; or give `inputs_embeds` in their place.
          attention_mask: 1 where there is a token, 0 where there is padding; None where all are tokens.
          token_type_ids: 0 for a first sentence, 1 for a second; None for all 0.
          segment_ids: which example a token of a packed row belongs to; tokens attend within theirs alone.
          positions: of the tokens; None counts from 0, in a packed row from 0 in each segment.
          inputs_embeds: word embeddings.
          key: turns dropout on; the same key gives the same masks. None is deterministic.
        """
        if segment_ids is not None and self.task == "SEQ_CLS":
            raise ValueError("SEQ_CLS gives one output per row, so a row cannot pack several examples (segment_ids)")
        with scope(key=key):
            inputs = (input_ids, attention_mask, token_type_ids, segment_ids, positions, inputs_embeds)
            return self.logits(self.hidden(*inputs), attention_mask)

    def hidden(
        self,
        input_ids: Int[Array, "batch seq"] | None = None,
        attention_mask: Shaped[Array, "batch seq"] | None = None,
        token_type_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        inputs_embeds: Float[Array, "batch seq d_model"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        """The last layer's states; arguments as in a call.

        Virtual tokens that a method puts in front are left out again; but not of SEQ_CLS, where the first of them is
        what the pooler reads (as in PEFT).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        with scope(key=key):
            e = inputs_embeds if input_ids is None else self.embeddings.words(input_ids)
            assert e is not None
            if positions is None:
                positions = positions_of(e.shape[1], segment_ids, self.config.max_position_embeddings)
            seq = e.shape[1]
            e, places, mask, segments = self.input_embedding(e, positions, attention_mask, segment_ids)
            x = self.embeddings(e, places, self._token_types(token_type_ids, e.shape[1]))

            def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return layer(x, mask, segments), None

            with scope(**in_front(e.shape[1] - seq, (*e.shape[:1], seq), attention_mask, segment_ids)):
                x = _stack.scan(self.layers, body, x, remat_policy=self.remat, unroll=self.unroll)[0]
            return x if self.task == "SEQ_CLS" else x[:, x.shape[1] - seq :]

    def logits(
        self, hidden: Float[Array, "batch seq d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "..."]:
        """What the task's head makes of `hidden`, in float32."""
        if not self.head:
            return hidden.astype(jnp.float32)
        config = self.config
        x = self.pooled(hidden) if self.task == "SEQ_CLS" else hidden
        if self.task != "QUESTION_ANS":
            rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
            with scope(key=key):
                x = dropout(x, rate, "classifier/dropout")
        return getattr(self, self.head[0])(x).astype(jnp.float32)

    def pooled(self, hidden: Float[Array, "batch seq d_model"]) -> Float[Array, "batch d_model"]:
        """The pooler's output: tanh of a projection of the first token's state."""
        if not hasattr(self, "pooler"):
            raise ValueError(f"{self.task} has no pooler; {' and '.join(_POOLED)} have one")
        return self.pooler(hidden)

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of the stack."""
        return module_names(WEIGHTS(self.config, self.task), self.config.num_hidden_layers)

    def _token_types(self, token_type_ids: jax.Array | None, seq: int) -> jax.Array:
        """Zeros by default, and before the given ones where the input embedding put tokens in front."""
        if token_type_ids is None:
            return jnp.zeros((1, 1), jnp.int32)
        return jnp.pad(token_type_ids, ((0, 0), (seq - token_type_ids.shape[1], 0)))


def _linear(config: Config, d_in: int, d_out: int, rngs: nnx.Rngs, dtype: Any) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(d_in, d_out, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)


_BACKBONE = (
    Rule("embeddings.word_embeddings.weight", "embeddings/word_embeddings/embedding"),
    Rule("embeddings.position_embeddings.weight", "embeddings/position_embeddings/embedding"),
    Rule("embeddings.token_type_embeddings.weight", "embeddings/token_type_embeddings/embedding"),
    Rule("embeddings.LayerNorm.weight", "embeddings/LayerNorm/scale"),
    Rule("embeddings.LayerNorm.bias", "embeddings/LayerNorm/bias"),
    Rule("encoder.layer.{i}.attention.self.query.weight", "layers/attention/self/query/kernel", TRANSPOSE),
    Rule("encoder.layer.{i}.attention.self.query.bias", "layers/attention/self/query/bias"),
    Rule("encoder.layer.{i}.attention.self.key.weight", "layers/attention/self/key/kernel", TRANSPOSE),
    Rule("encoder.layer.{i}.attention.self.key.bias", "layers/attention/self/key/bias"),
    Rule("encoder.layer.{i}.attention.self.value.weight", "layers/attention/self/value/kernel", TRANSPOSE),
    Rule("encoder.layer.{i}.attention.self.value.bias", "layers/attention/self/value/bias"),
    Rule("encoder.layer.{i}.attention.output.dense.weight", "layers/attention/output/dense/kernel", TRANSPOSE),
    Rule("encoder.layer.{i}.attention.output.dense.bias", "layers/attention/output/dense/bias"),
    Rule("encoder.layer.{i}.attention.output.LayerNorm.weight", "layers/attention/output/residual/norm/scale"),
    Rule("encoder.layer.{i}.attention.output.LayerNorm.bias", "layers/attention/output/residual/norm/bias"),
    Rule("encoder.layer.{i}.intermediate.dense.weight", "layers/intermediate/dense/kernel", TRANSPOSE),
    Rule("encoder.layer.{i}.intermediate.dense.bias", "layers/intermediate/dense/bias"),
    Rule("encoder.layer.{i}.output.dense.weight", "layers/output/dense/kernel", TRANSPOSE),
    Rule("encoder.layer.{i}.output.dense.bias", "layers/output/dense/bias"),
    Rule("encoder.layer.{i}.output.LayerNorm.weight", "layers/output/residual/norm/scale"),
    Rule("encoder.layer.{i}.output.LayerNorm.bias", "layers/output/residual/norm/bias"),
)

_POOLER = (
    Rule("pooler.dense.weight", "pooler/dense/kernel", TRANSPOSE),
    Rule("pooler.dense.bias", "pooler/dense/bias"),
)

_NO_WEIGHTS = (
    Ignore("...embeddings.position_ids"),  # buffers that transformers once saved
    Ignore("...embeddings.token_type_ids"),
    Renamed("LayerNorm.gamma", "LayerNorm.weight"),  # TensorFlow's names, in bert-base-uncased
    Renamed("LayerNorm.beta", "LayerNorm.bias"),
)


def WEIGHTS(config: Config, task: str) -> tuple[Entry, ...]:
    """The table of weights for `task`, the same for every config."""
    del config
    rules = _BACKBONE + (_POOLER if task in _POOLED else ())
    if task in _HEAD:
        (head,) = _HEAD[task]
        rules = tuple(dataclasses.replace(rule, hf=PREFIXES[0] + rule.hf) for rule in rules)
        rules += Rule(f"{head}.weight", f"{head}/kernel", TRANSPOSE), Rule(f"{head}.bias", f"{head}/bias")
    return rules + _NO_WEIGHTS
