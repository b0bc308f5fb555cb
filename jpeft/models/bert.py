# SPDX-License-Identifier: Apache-2.0
"""BERT, RoBERTa and XLM-R: bidirectional encoders with post-norm layers.

Computes what transformers' classes of these names do. The three differ in positions and heads only:

  bert         positions from 0, padding counted; SEQ_CLS reads the pooler        https://arxiv.org/abs/1810.04805
  roberta      positions from pad_token_id + 1, of tokens that are no padding;
               SEQ_CLS has a head of two layers in the pooler's place             https://arxiv.org/abs/1907.11692
  xlm-roberta  the same, with another vocabulary                                  https://arxiv.org/abs/1911.02116

Axes: batch, seq, heads, d_head, d_model (hidden_size), d_ff (intermediate_size), labels.
"""

import dataclasses
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
from ._bert_config import PRESETS, Config
from ._bert_layers import ClassificationHead, Embeddings, Layer, Pooler, linear
from ._bert_weights import layer_rules, linear_rules, norm_rules
from ._choices import ONE_PER_ROW, by_choice, check_packing, rows
from ._layers import in_front, led, positions_of
from ._table import Entry, Ignore, Renamed, Rule, module_names

__all__ = ["HEADS", "PREFIXES", "PRESETS", "TASKS", "WEIGHTS", "Bert", "Config"]

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE", "FEATURE_EXTRACTION")
#: What a checkpoint with a head puts before the backbone's names; the second is RoBERTa's and XLM-R's.
PREFIXES = ("bert.", "roberta.")
#: Modules that some tasks have and others lack; `cls` and `lm_head` are pretraining heads, which no task here has.
HEADS = ("pooler", "classifier", "qa_outputs", "cls", "lm_head")

_HEAD = {
    "SEQ_CLS": ("classifier",),
    "TOKEN_CLS": ("classifier",),
    "QUESTION_ANS": ("qa_outputs",),
    "MULTIPLE_CHOICE": ("classifier",),
}


class Bert(nnx.Module):
    """A model of the family for one task: one of `TASKS`.

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
        self.input_embedding = InputEmbedding(config.hidden_size, "encoder", False, config.max_positions)
        self.layers = _stack.stack(lambda r: Layer(config, rngs=r, dtype=dtype), config.num_hidden_layers, rngs)
        if task in _pooled(config):
            self.pooler = Pooler(config, rngs=rngs, dtype=dtype)
        if _deep(config, task):
            self.classifier = ClassificationHead(config, rngs=rngs, dtype=dtype)
        elif self.head:
            size = 1 if task == "MULTIPLE_CHOICE" else config.num_labels
            setattr(self, self.head[0], linear(config, config.hidden_size, size, rngs, dtype))

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
          token_type_ids: 0 for a first sentence, 1 for a second; None for all 0.
          segment_ids: which example a token of a packed row belongs to; tokens attend within theirs alone.
          positions: of the tokens; None counts from 0, in a packed row from 0 in each segment. RoBERTa's count no
            padding and start at 0 here too, wherever its table of positions does.
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
        where the first of them is what the pooler reads (as in PEFT).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        with scope(key=key):
            e = jnp.asarray(inputs_embeds) if input_ids is None else self.embeddings.words(input_ids)
            if positions is None:
                config = self.config
                text = input_ids != config.pad_token_id if config.is_roberta and input_ids is not None else None
                positions = positions_of(e.shape[1], segment_ids, config.max_positions, text)
            seq = e.shape[1]
            e, places, mask, segments = self.input_embedding(e, positions, attention_mask, segment_ids)
            x = self.embeddings(e, places, self._token_types(token_type_ids, e.shape[1]))

            def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return layer(x, mask, segments), None

            with scope(**in_front(e.shape[1] - seq, (*e.shape[:1], seq), attention_mask, segments)):
                x = _stack.scan(self.layers, body, x, remat_policy=self.remat, unroll=self.unroll)[0]
            return led(x, mask, x.shape[1] - seq) if self.task in ONE_PER_ROW else x[:, x.shape[1] - seq :]

    def logits(
        self, hidden: Float[Array, "batch seq d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "..."]:
        """What the task's head makes of `hidden`, in float32 or wider."""
        if not self.head:
            return widened(hidden)
        config = self.config
        rate = config.classifier_dropout
        if rate is None or (config.is_roberta and self.task == "MULTIPLE_CHOICE"):  # as in transformers
            rate = config.hidden_dropout_prob
        with scope(key=key):
            if _deep(config, self.task):
                return widened(self.classifier(hidden[:, 0], rate))
            x = self.pooled(hidden) if self.task in ONE_PER_ROW else hidden
            if self.task != "QUESTION_ANS":
                x = dropout(x, rate, "classifier/dropout")
            return widened(getattr(self, self.head[0])(x))

    def pooled(self, hidden: Float[Array, "batch seq d_model"]) -> Float[Array, "batch d_model"]:
        """The pooler's output: tanh of a projection of the first token's state."""
        if not hasattr(self, "pooler"):
            have = ", ".join(_pooled(self.config))
            raise ValueError(f"{self.task} of a {self.config.model_type} model has no pooler; it has one for {have}")
        return self.pooler(hidden)

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of the stack."""
        return module_names(WEIGHTS(self.config, self.task), self.config.num_hidden_layers)

    def _token_types(self, token_type_ids: Given | None, seq: int) -> jax.Array:
        """Zeros by default, and before the given ones where the input embedding put tokens in front."""
        if token_type_ids is None:
            return jnp.zeros((1, 1), jnp.int32)
        return jnp.pad(token_type_ids, ((0, 0), (seq - token_type_ids.shape[1], 0)))


def _pooled(config: Config) -> tuple[str, ...]:
    """The tasks that have a pooler."""
    return ("MULTIPLE_CHOICE", "FEATURE_EXTRACTION") if config.is_roberta else (*ONE_PER_ROW, "FEATURE_EXTRACTION")


def _deep(config: Config, task: str) -> bool:
    """Whether the head is RoBERTa's of two layers."""
    return config.is_roberta and task == "SEQ_CLS"


_BACKBONE = (
    Rule("embeddings.word_embeddings.weight", "embeddings/word_embeddings/embedding"),
    Rule("embeddings.position_embeddings.weight", "embeddings/position_embeddings/embedding"),
    Rule("embeddings.token_type_embeddings.weight", "embeddings/token_type_embeddings/embedding"),
    *norm_rules("embeddings.LayerNorm", "embeddings/LayerNorm"),
    *layer_rules("encoder.layer.{i}", ("query", "key", "value")),
)

_NO_WEIGHTS = (
    Ignore("...embeddings.position_ids"),  # buffers that transformers once saved
    Ignore("...embeddings.token_type_ids"),
    Renamed("LayerNorm.gamma", "LayerNorm.weight"),  # TensorFlow's names, in bert-base-uncased
    Renamed("LayerNorm.beta", "LayerNorm.bias"),
)


def WEIGHTS(config: Config, task: str) -> tuple[Entry, ...]:
    """The table of weights for `task`."""
    prefix = PREFIXES[config.is_roberta] if task in _HEAD else ""
    rules = _BACKBONE + (linear_rules("pooler.dense") if task in _pooled(config) else ())
    rules = tuple(dataclasses.replace(rule, hf=prefix + rule.hf) for rule in rules)
    layers = ("classifier.dense", "classifier.out_proj") if _deep(config, task) else _HEAD.get(task, ())
    return rules + tuple(rule for layer in layers for rule in linear_rules(layer)) + _NO_WEIGHTS
