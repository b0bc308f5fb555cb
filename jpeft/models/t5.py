# SPDX-License-Identifier: Apache-2.0
"""T5: an encoder and a decoder with relative positions (Raffel et al., https://arxiv.org/abs/1910.10683).

Computes what transformers' `T5Model` and `T5ForConditionalGeneration` do, for T5 and for T5 v1.1 and Flan-T5, whose
MLP is gated and whose head is no copy of the table. Axes: batch, seq (the encoder's tokens), out (the decoder's),
heads, d_head (d_kv), d_model, d_ff.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from .._given import Given
from .._scope import scope
from .._wide import widened
from ._encoder_decoder import Encoded, EncoderDecoder, names_of_stacks
from ._layers import token_table
from ._t5_config import PRESETS, Config
from ._t5_stack import Stack, linear
from ._table import TRANSPOSE, Entry, Ignore, Rule, Tied

__all__ = ["HEADS", "PREFIXES", "PRESETS", "T5", "TASKS", "WEIGHTS", "Config", "Encoded"]

TASKS = ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
#: Checkpoints with a head put nothing before the backbone's names.
PREFIXES = ()
#: Modules that some tasks have and others lack.
HEADS = ("lm_head",)


class T5(EncoderDecoder):
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
            self.lm_head = linear(config.d_model, config.vocab_size, factor, rngs, dtype)

    def __call__(
        self,
        input_ids: Int[Given, "batch seq"] | None = None,
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        token_type_ids: Int[Given, "batch seq"] | None = None,
        segment_ids: Int[Given, "batch seq"] | None = None,
        positions: Int[Given, "batch seq"] | None = None,
        inputs_embeds: Float[Given, "batch seq d_model"] | None = None,
        *,
        decoder_input_ids: Int[Given, "batch out"],
        decoder_attention_mask: Shaped[Given, "batch out"] | None = None,
        decoder_positions: Int[Given, "rows out"] | None = None,
        decoder_segment_ids: Int[Given, "batch out"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch out _"]:
        """Logits `[batch out vocab]`, or the decoder's states, by task.

        Args:
          input_ids: the encoder's tokens; or give `inputs_embeds` in their place.
          attention_mask: 1 where there is a token, 0 where there is padding; None where all are tokens.
          token_type_ids: must be None; T5 has none.
          segment_ids: which example a token of a packed row belongs to; tokens attend within theirs alone.
          positions: of the encoder's tokens, of which differences alone count; None counts from 0, in a packed row from
            0 in each segment.
          inputs_embeds: token embeddings.
          decoder_input_ids: what the decoder has written so far, from the start token on (see `decoder_inputs`).
          decoder_attention_mask, decoder_positions: as those of the encoder.
          decoder_segment_ids: likewise; an example's tokens see those of the encoder that have its number.
          key: turns dropout on; the same key gives the same masks. None is deterministic.
        """
        with scope(key=key):
            encoded = self.encode(input_ids, attention_mask, token_type_ids, segment_ids, positions, inputs_embeds)
            given = decoder_input_ids, decoder_attention_mask, decoder_positions, decoder_segment_ids
            return self.logits(self.decode_behind(encoded, *given))

    def hidden(
        self,
        input_ids: Int[Given, "batch seq"] | None = None,
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        token_type_ids: Int[Given, "batch seq"] | None = None,
        segment_ids: Int[Given, "batch seq"] | None = None,
        positions: Int[Given, "batch seq"] | None = None,
        inputs_embeds: Float[Given, "batch seq d_model"] | None = None,
        *,
        decoder_input_ids: Int[Given, "batch out"],
        decoder_attention_mask: Shaped[Given, "batch out"] | None = None,
        decoder_positions: Int[Given, "rows out"] | None = None,
        decoder_segment_ids: Int[Given, "batch out"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch out d_model"]:
        """The decoder's normalised last states; arguments as in a call."""
        with scope(key=key):
            encoded = self.encode(input_ids, attention_mask, token_type_ids, segment_ids, positions, inputs_embeds)
            given = decoder_input_ids, decoder_attention_mask, decoder_positions, decoder_segment_ids
            return self.decode_behind(encoded, *given)

    def encode(
        self,
        input_ids: Int[Given, "batch seq"] | None = None,
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        token_type_ids: Int[Given, "batch seq"] | None = None,
        segment_ids: Int[Given, "batch seq"] | None = None,
        positions: Int[Given, "batch seq"] | None = None,
        inputs_embeds: Float[Given, "batch seq d_model"] | None = None,
    ) -> Encoded:
        """The encoder's states, for `decode`; virtual tokens that a method puts in front stay among them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if token_type_ids is not None:
            raise ValueError("a t5 model has no token types; token_type_ids must be None")
        e = jnp.asarray(inputs_embeds) if input_ids is None else self.words(input_ids)
        return self.encoder(e.astype(self.dtype), attention_mask, positions, segment_ids, **self._options)

    def words(self, ids: Int[Given, "batch out"]) -> Float[Array, "batch out d_model"]:
        """The vectors of tokens, the encoder's and the decoder's."""
        return self.shared(jnp.asarray(ids))

    def logits(
        self, hidden: Float[Array, "batch out d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "batch out _"]:
        """What the task's head makes of `hidden`, in float32 or wider; a tied head reads hidden / √d_model."""
        del attention_mask, key
        if self.task == "SEQ_2_SEQ_LM":
            hidden = self.lm_head(hidden) if self.head else self.shared.attend(hidden * self.config.d_model**-0.5)
        return widened(hidden)

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of its stack."""
        config = self.config
        return names_of_stacks(WEIGHTS(config, self.task), config.num_layers, config.num_decoder_layers)


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
