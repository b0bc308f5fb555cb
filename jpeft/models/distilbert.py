# SPDX-License-Identifier: Apache-2.0
"""DistilBERT: BERT with half the layers, no token types and no pooler (Sanh et al., https://arxiv.org/abs/1910.01108).

Computes what transformers' `DistilBertModel` and its heads do. Axes: batch, seq, heads, d_head, d_model (dim), d_ff
(hidden_dim), labels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from .. import _stack
from .._given import Given
from .._scope import dropout, scope
from .._wide import widened
from ..seams import InputEmbedding, KeyValues, Residual
from . import _config
from ._attention import attention
from ._choices import ONE_PER_ROW, by_choice, check_packing, rows
from ._layer_norm import LayerNorm
from ._layers import ACTIVATIONS, in_front, led, positions_of, token_table
from ._linear import Linear
from ._table import TRANSPOSE, Entry, Ignore, Rule, module_names

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE", "FEATURE_EXTRACTION")
#: What a checkpoint with a head puts before the backbone's names.
PREFIXES = ("distilbert.",)
#: Modules that some tasks have and others lack; `vocab_...` is the pretraining head, which no task here has.
HEADS = ("pre_classifier", "classifier", "qa_outputs", "vocab_transform", "vocab_layer_norm", "vocab_projector")

_HEAD = {
    "SEQ_CLS": ("pre_classifier", "classifier"),
    "TOKEN_CLS": ("classifier",),
    "QUESTION_ANS": ("qa_outputs",),
    "MULTIPLE_CHOICE": ("pre_classifier", "classifier"),
}
_EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class Config:
    """The attributes of config.json that change what DistilBERT computes, with transformers' defaults."""

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int | None = 0
    num_labels: int = 2
    model_type: str = "distilbert"
    hf: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"dim must be a multiple of n_heads, got {self.dim} and {self.n_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json; an attribute that is unknown, or asks for what is not supported, is refused by name."""
        return _config.read(cls, hf, harmless=["tie_weights_", "tie_word_embeddings"])

    def to_hf(self) -> dict[str, Any]:
        """config.json."""
        return _config.write(self)


PRESETS = {"distilbert-base-uncased": Config()}


class Embeddings(nnx.Module):
    """Words and positions, summed and normalised."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        self.word_embeddings = token_table(
            config.vocab_size, config.dim, config.initializer_range, config.pad_token_id, rngs=rngs, dtype=dtype
        )
        self.position_embeddings = nnx.Embed(
            config.max_position_embeddings,
            config.dim,
            dtype=dtype,
            param_dtype=dtype,
            embedding_init=_sinusoids if config.sinusoidal_pos_embds else _normal(config),
            rngs=rngs,
        )
        self.LayerNorm = LayerNorm(config.dim, _EPS, dtype=dtype)

    def words(self, input_ids: Int[Given, "batch seq"]) -> Float[Array, "batch seq d_model"]:
        """The tokens' own vectors."""
        return self.word_embeddings(jnp.asarray(input_ids))

    def __call__(self, e: Float[Array, "batch seq d_model"], positions: Int[Given, "..."]) -> Any:
        return dropout(
            self.LayerNorm(e + self.position_embeddings(jnp.asarray(positions))),
            self.config.dropout,
            "embeddings/dropout",
        )


class Attention(nnx.Module):
    """softmax(Q Kᵀ / √d_head) V, every token to every token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.num_heads, self.dropout_rate = config.n_heads, config.attention_dropout
        self.q_lin = _linear(config, config.dim, config.dim, rngs, dtype)
        self.k_lin = _linear(config, config.dim, config.dim, rngs, dtype)
        self.v_lin = _linear(config, config.dim, config.dim, rngs, dtype)
        self.out_lin = _linear(config, config.dim, config.dim, rngs, dtype)
        self.keys_values = KeyValues(config.dim, config.n_heads, config.dim // config.n_heads)

    def __call__(self, x: Float[Array, "batch seq d_model"], mask: Any, segment_ids: Any) -> Any:
        q, k, v = (self._heads(y) for y in (self.q_lin(x), self.k_lin(x), self.v_lin(x)))
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
            path="layers/attention/dropout",
        )
        return self.out_lin(y.reshape(x.shape))

    def _heads(self, y: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq heads d_head"]:
        return y.reshape(*y.shape[:2], self.num_heads, -1)


class FFN(nnx.Module):
    """lin2(activation(lin1(x)))."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.activation, self.dropout_rate = config.activation, config.dropout
        self.lin1 = _linear(config, config.dim, config.hidden_dim, rngs, dtype)
        self.lin2 = _linear(config, config.hidden_dim, config.dim, rngs, dtype)

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        return dropout(self.lin2(ACTIVATIONS[self.activation](self.lin1(x))), self.dropout_rate, "layers/ffn/dropout")


class Layer(nnx.Module):
    """Self-attention, then an MLP; each is added to the stream and normalised."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.attention_residual = Residual(config.dim, "attention", LayerNorm(config.dim, _EPS, dtype=dtype))
        self.ffn = FFN(config, rngs=rngs, dtype=dtype)
        self.mlp_residual = Residual(config.dim, "mlp", LayerNorm(config.dim, _EPS, dtype=dtype))

    def __call__(self, x: Float[Array, "batch seq d_model"], mask: Any, segment_ids: Any) -> Any:
        x = checkpoint_name(x, "block_input")
        x = checkpoint_name(self.attention_residual(self.attention(x, mask, segment_ids), x), "attention_output")
        return checkpoint_name(self.mlp_residual(self.ffn(x), x), "mlp_output")


class DistilBert(nnx.Module):
    """DistilBERT for one task: one of `TASKS`.

    Attributes:
      head: paths of the task's own output layers.
      remat, unroll: how the layers are run, see `jpeft.models.load`.
    """

    pre_classifier: Linear  # of the tasks with one output per row

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
        self.input_embedding = InputEmbedding(config.dim, "encoder", False, config.max_position_embeddings)
        self.layers = _stack.stack(lambda r: Layer(config, rngs=r, dtype=dtype), config.n_layers, rngs)
        labels = 1 if task == "MULTIPLE_CHOICE" else config.num_labels
        for name in self.head:
            size = config.dim if name == "pre_classifier" else labels
            setattr(self, name, _linear(config, config.dim, size, rngs, dtype))

    def __call__(
        self,
        input_ids: Int[Given, "batch *choices seq"] | None = None,
        attention_mask: Shaped[Given, "batch *choices seq"] | None = None,
        token_type_ids: Int[Given, "batch *choices seq"] | None = None,
        segment_ids: Int[Given, "batch *choices seq"] | None = None,
        positions: Int[Given, "batch *choices seq"] | None = None,
        inputs_embeds: Float[Given, "batch *choices seq d_model"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "..."]:
        """Logits: `[batch labels]`, `[batch seq labels]`, `[batch seq 2]`, or the hidden states, by task.

        MULTIPLE_CHOICE reads `[batch choices seq]` of all that is given, and gives `[batch choices]`.

        Args:
          input_ids: tokens; or give `inputs_embeds` in their place.
          attention_mask: 1 where there is a token, 0 where there is padding; None where all are tokens.
          token_type_ids: must be None; DistilBERT has none.
          segment_ids: which example a token of a packed row belongs to; tokens attend within theirs alone.
          positions: of the tokens; None counts from 0, in a packed row from 0 in each segment.
          inputs_embeds: word embeddings.
          key: turns dropout on; the same key gives the same masks. None is deterministic.
        """
        check_packing(self.task, segment_ids)
        with scope(key=key):
            given = (input_ids, attention_mask, token_type_ids, segment_ids, positions, inputs_embeds)
            inputs, choices = rows(self.task, *given)
            return by_choice(self.logits(self.hidden(*inputs), inputs[1]), choices)

    def hidden(
        self,
        input_ids: Int[Given, "batch seq"] | None = None,
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        token_type_ids: Int[Given, "batch seq"] | None = None,
        segment_ids: Int[Given, "batch seq"] | None = None,
        positions: Int[Given, "batch seq"] | None = None,
        inputs_embeds: Float[Given, "batch seq d_model"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch out d_model"]:
        """The last layer's states; arguments as in a call.

        Virtual tokens that a method puts in front are left out again; but not of SEQ_CLS and MULTIPLE_CHOICE,
        where the first of them is what the head reads (as in PEFT).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if token_type_ids is not None:
            raise ValueError("a distilbert model has no token types; token_type_ids must be None")
        with scope(key=key):
            e = jnp.asarray(inputs_embeds) if input_ids is None else self.embeddings.words(input_ids)
            seq = e.shape[1]
            if positions is None:
                positions = positions_of(seq, segment_ids, self.config.max_position_embeddings)
            e, places, mask, segments = self.input_embedding(e, positions, attention_mask, segment_ids)
            x = self.embeddings(e, places)

            def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return layer(x, mask, segments), None

            with scope(**in_front(e.shape[1] - seq, (*e.shape[:1], seq), attention_mask, segments)):
                x = _stack.scan(self.layers, body, x, remat_policy=self.remat, unroll=self.unroll)[0]
            return led(x, mask, x.shape[1] - seq) if self.task in ONE_PER_ROW else x[:, x.shape[1] - seq :]

    def logits(
        self, hidden: Float[Array, "batch seq d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "..."]:
        """What the task's head makes of `hidden`, in float32 or wider; some tasks read the first token alone."""
        if not self.head:
            return widened(hidden)
        config = self.config
        rates = {"TOKEN_CLS": config.dropout, "QUESTION_ANS": config.qa_dropout}
        x = jax.nn.relu(self.pre_classifier(hidden[:, 0])) if self.task in ONE_PER_ROW else hidden
        with scope(key=key):
            x = dropout(x, rates.get(self.task, config.seq_classif_dropout), "classifier/dropout")
        return widened(getattr(self, self.head[-1])(x))

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of the stack."""
        return module_names(WEIGHTS(self.config, self.task), self.config.n_layers)


def _normal(config: Config) -> Any:
    return nnx.initializers.normal(config.initializer_range)


def _sinusoids(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Row p: sin(p / 10000^(j/d)) at even columns j, and its cosine at the odd one after it."""
    del key
    places, columns = np.arange(shape[0])[:, None], np.arange(shape[1])[None]
    angles = places / 10000 ** (columns // 2 * 2 / shape[1])
    return jnp.asarray(np.where(columns % 2, np.cos(angles), np.sin(angles)), dtype)


def _linear(config: Config, d_in: int, d_out: int, rngs: nnx.Rngs, dtype: Any) -> Linear:
    return Linear(d_in, d_out, dtype=dtype, param_dtype=dtype, kernel_init=_normal(config), rngs=rngs)


_LINEARS = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
_NORMS = {"sa_layer_norm": "attention_residual/norm", "output_layer_norm": "mlp_residual/norm"}


def WEIGHTS(config: Config, task: str) -> tuple[Entry, ...]:
    """The table of weights for `task`, the same for every config."""
    del config
    prefix = PREFIXES[0] if task in _HEAD else ""
    entries: list[Entry] = [
        Rule(f"{prefix}embeddings.word_embeddings.weight", "embeddings/word_embeddings/embedding"),
        Rule(f"{prefix}embeddings.position_embeddings.weight", "embeddings/position_embeddings/embedding"),
        *_norm_rules(f"{prefix}embeddings.LayerNorm", "embeddings/LayerNorm"),
        Ignore("...embeddings.position_ids"),  # a buffer that transformers once saved
    ]
    layer = f"{prefix}transformer.layer.{{i}}"
    for name in _LINEARS:
        entries += _linear_rules(f"{layer}.{name}", f"layers/{name.replace('.', '/')}")
    for name, path in _NORMS.items():
        entries += _norm_rules(f"{layer}.{name}", f"layers/{path}")
    for head in _HEAD.get(task, ()):
        entries += _linear_rules(head, head)
    return tuple(entries)


def _linear_rules(hf: str, path: str) -> list[Entry]:
    return [Rule(f"{hf}.weight", f"{path}/kernel", TRANSPOSE), Rule(f"{hf}.bias", f"{path}/bias")]


def _norm_rules(hf: str, path: str) -> list[Entry]:
    return [Rule(f"{hf}.weight", f"{path}/scale"), Rule(f"{hf}.bias", f"{path}/bias")]
