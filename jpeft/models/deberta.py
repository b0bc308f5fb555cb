# SPDX-License-Identifier: Apache-2.0
"""DeBERTa v2 and v3: BERT's layers around disentangled attention (He et al., https://arxiv.org/abs/2006.03654).

Scores count content with content, content with distance, and distance with content; distances beyond a few are in
buckets that grow (v3: https://arxiv.org/abs/2111.09543). Computes what transformers' `DebertaV2Model` and its heads do
where there is text; there, a padded query averages all values, and here it reads the text. So SEQ_CLS reads each row's
first token that is text, which transformers does of rows that are padded on the right.

Axes: batch, seq, heads, d_head, d_model (hidden_size), d_embedding, d_ff (intermediate_size), labels.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from .. import _stack
from .._given import Given
from .._scope import dropout, scope
from .._wide import widened
from ..seams import InputEmbedding
from ._bert_layers import Layer, linear
from ._bert_weights import layer_rules, linear_rules, norm_rules
from ._deberta_config import PRESETS, Config
from ._deberta_layers import ContextPooler, ConvLayer, DisentangledAttention, Embeddings, RelativePositions
from ._layers import in_front, led, positions_of
from ._table import TRANSPOSE, Entry, How, Ignore, Rule, module_names

__all__ = ["HEADS", "PREFIXES", "PRESETS", "TASKS", "WEIGHTS", "Config", "Deberta"]

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
#: What a checkpoint with a head puts before the backbone's names.
PREFIXES = ("deberta.",)
#: Modules that some tasks have and others lack; the last three are pretraining heads, which no task here has.
HEADS = ("pooler", "classifier", "qa_outputs", "cls", "lm_predictions", "mask_predictions")

_HEAD = {"SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}


class Deberta(nnx.Module):
    """DeBERTa for one task: `SEQ_CLS`, `TOKEN_CLS`, `QUESTION_ANS` or `FEATURE_EXTRACTION`.

    Attributes:
      head: paths of the task's own output layer.
      before_head: the pooler of SEQ_CLS, which pretrained checkpoints have not. Unless `modules_to_save` says what is
        trained beside the head, it is too. (PEFT leaves it as it was drawn, and out of its files.)
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
        self.head = (_HEAD[task],) if task in _HEAD else ()
        self.before_head = ("pooler",) if task == "SEQ_CLS" else ()
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.input_embedding = InputEmbedding(config.d_embedding, "encoder", False, config.max_positions)
        if config.relative_attention:
            self.relative = RelativePositions(config, rngs=rngs, dtype=dtype)
        depth = config.num_hidden_layers
        self.layers = _stack.stack(lambda r: Layer(config, DisentangledAttention, rngs=r, dtype=dtype), depth, rngs)
        if config.conv_kernel_size > 0:
            self.conv = ConvLayer(config, rngs=rngs, dtype=dtype)
        if task == "SEQ_CLS":
            self.pooler = ContextPooler(config, rngs=rngs, dtype=dtype)
        for name in self.head:
            setattr(self, name, linear(config, config.hidden_size, config.num_labels, rngs, dtype))

    def __call__(
        self,
        input_ids: Int[Given, "batch seq"] | None = None,
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        token_type_ids: Int[Given, "batch seq"] | None = None,
        segment_ids: Int[Given, "batch seq"] | None = None,
        positions: Int[Given, "batch seq"] | None = None,
        inputs_embeds: Float[Given, "batch seq d_embedding"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "..."]:
        """Logits: `[batch labels]`, `[batch seq labels]`, `[batch seq 2]`, or the hidden states, by task.

        Args:
          input_ids: tokens; or give `inputs_embeds` in their place.
          attention_mask: 1 where there is a token, 0 where there is padding; None where all are tokens.
          token_type_ids: 0 for a first sentence, 1 for a second; None for all 0. A model without types (v3) reads none,
            as in transformers: its tokenizer gives them all the same.
          segment_ids: which example a token of a packed row belongs to; tokens attend within theirs alone.
          positions: of the tokens; None counts from 0, in a packed row from 0 in each segment. Distances are those of
            the positions, which takes longer where they are given. (transformers' `position_ids` leave distances.)
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
        input_ids: Int[Given, "batch seq"] | None = None,
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        token_type_ids: Int[Given, "batch seq"] | None = None,
        segment_ids: Int[Given, "batch seq"] | None = None,
        positions: Int[Given, "batch seq"] | None = None,
        inputs_embeds: Float[Given, "batch seq d_embedding"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch out d_model"]:
        """The last layer's states; arguments as in a call.

        Virtual tokens that a method puts in front are left out again; but not of SEQ_CLS, where the first of them is
        what the pooler reads (as in PEFT).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        with scope(key=key):
            e = jnp.asarray(inputs_embeds) if input_ids is None else self.embeddings.words(input_ids)
            seq = e.shape[1]
            counted = positions_of(seq, segment_ids, self.config.max_positions) if positions is None else positions
            e, places, mask, segments = self.input_embedding(e, counted, attention_mask, segment_ids)
            x = self.embeddings(e, places, self._token_types(token_type_ids, e.shape[1]), mask)
            # tokens that attend to one another stand one apart, unless their positions are given
            far = self._relative(e.shape[1], None if positions is None else places)
            with scope(**in_front(e.shape[1] - seq, (*e.shape[:1], seq), attention_mask, segments)):
                x = self._run(x, mask, segments, far)
            if self.task != "SEQ_CLS":
                return x[:, x.shape[1] - seq :]
            first = 0 if attention_mask is None else jnp.argmax(attention_mask != 0, axis=1)
            return led(x, mask, x.shape[1] - seq, first)

    def logits(
        self, hidden: Float[Array, "batch seq d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "..."]:
        """What the task's head makes of `hidden`, in float32 or wider."""
        if not self.head:
            return widened(hidden)
        config, rate = self.config, self.config.hidden_dropout_prob
        with scope(key=key):
            if self.task == "SEQ_CLS":
                hidden = self.pooled(hidden, attention_mask)
                rate = rate if config.cls_dropout is None else config.cls_dropout
            if self.task != "QUESTION_ANS":
                hidden = dropout(hidden, rate, "classifier/dropout")
            return widened(getattr(self, self.head[0])(hidden))

    def pooled(
        self, hidden: Float[Array, "batch seq d_model"], attention_mask: Any = None
    ) -> Float[Array, "batch d_model"]:
        """The pooler's output: an activation of a projection of the state of each row's first token that is text."""
        if self.task != "SEQ_CLS":
            raise ValueError(f"{self.task} of a {self.config.model_type} model has no pooler; it has one for SEQ_CLS")
        return self.pooler(hidden, attention_mask)

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of the stack."""
        return module_names(WEIGHTS(self.config, self.task), self.config.num_hidden_layers)

    def _token_types(self, token_type_ids: Given | None, seq: int) -> jax.Array:
        """Zeros by default, and before the given ones where the input embedding put tokens in front."""
        if token_type_ids is None:
            return jnp.zeros((1, 1), jnp.int32)
        return jnp.pad(token_type_ids, ((0, 0), (seq - token_type_ids.shape[1], 0)))

    def _relative(self, seq: int, positions: Any) -> Any:
        return self.relative(seq, positions) if self.config.relative_attention else None

    def _run(self, x: Float[Array, "batch seq d_model"], mask: Any, segments: Any, far: Any) -> jax.Array:
        """The last states of the layers; behind the first of them what the convolution reads joins the stream."""
        joined = None
        if self.config.conv_kernel_size > 0:
            joined = functools.partial(self.conv.join, self.conv.read(x, mask, segments), mask)

        def body(layer: Layer, x: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
            x = layer(x, mask, segments, far)
            return (x if joined is None else jax.lax.cond(first, joined, lambda x: x, x)), None

        first = jnp.arange(self.config.num_hidden_layers) == 0
        return _stack.scan(self.layers, body, x, first, remat_policy=self.remat, unroll=self.unroll)[0]


def WEIGHTS(config: Config, task: str) -> tuple[Entry, ...]:
    """The table of weights for `task`."""
    rules = (
        *_embedding_rules(config),
        *_relative_rules(config),
        *layer_rules("encoder.layer.{i}", _projections(config)),
        *_convolution_rules(config),
    )
    prefix = PREFIXES[0] if task in _HEAD else ""
    backbone = tuple(dataclasses.replace(rule, hf=prefix + rule.hf) for rule in rules)
    pooler = linear_rules("pooler.dense") if task == "SEQ_CLS" else ()
    head = linear_rules(_HEAD[task]) if task in _HEAD else ()
    unread = () if config.position_biased_input else (Ignore("...embeddings.position_embeddings.weight"),)
    return (*backbone, *pooler, *head, Ignore("...embeddings.position_ids"), *unread)


def _embedding_rules(config: Config) -> list[Rule]:
    has = {
        "word_embeddings": True,
        "position_embeddings": config.position_biased_input,
        "token_type_embeddings": config.type_vocab_size > 0,
    }
    rules = [Rule(f"embeddings.{name}.weight", f"embeddings/{name}/embedding") for name in has if has[name]]
    if config.d_embedding != config.hidden_size:
        rules.append(Rule("embeddings.embed_proj.weight", "embeddings/embed_proj/kernel", TRANSPOSE))
    return [*rules, *norm_rules("embeddings.LayerNorm", "embeddings/LayerNorm")]


def _relative_rules(config: Config) -> list[Rule]:
    if not config.relative_attention:
        return []
    table = Rule("encoder.rel_embeddings.weight", "relative/rel_embeddings/embedding")
    norm = norm_rules("encoder.LayerNorm", "relative/LayerNorm") if config.norm_rel_ebd == "layer_norm" else ()
    return [table, *norm]


def _projections(config: Config) -> list[str]:
    """A self-attention's, by transformers' names."""
    own = {"pos_key_proj": config.relates("c2p"), "pos_query_proj": config.relates("p2c")}
    extra = [name for name, has in own.items() if has and not config.share_att_key]
    return ["query_proj", "key_proj", "value_proj", *extra]


def _convolution_rules(config: Config) -> list[Rule]:
    if config.conv_kernel_size < 1:
        return []
    kernel = Rule("encoder.conv.conv.weight", "conv/conv/kernel", How((2, 1, 0), (2, 1, 0)))
    bias = Rule("encoder.conv.conv.bias", "conv/conv/bias")
    return [kernel, bias, *norm_rules("encoder.conv.LayerNorm", "conv/LayerNorm")]
