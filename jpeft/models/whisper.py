# SPDX-License-Identifier: Apache-2.0
"""Whisper: a sound is encoded, and a decoder writes what is said (Radford et al., https://arxiv.org/abs/2212.04356).

Computes what transformers' `WhisperModel` and `WhisperForConditionalGeneration` do. Axes: batch, mels and frames of a
sound (its log-mel spectrogram), seq (every other frame), out (the decoder's tokens), heads, d_head, d_model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from .._given import Given
from .._scope import scope
from .._wide import widened
from ._cache import Cache
from ._encoder_decoder import Encoded, EncoderDecoder, names_of_stacks
from ._table import COPY, TRANSPOSE, Entry, How, Rule, Tied
from ._whisper_config import PRESETS, Config
from ._whisper_stack import Decoder, Encoder, linear

__all__ = ["HEADS", "PREFIXES", "PRESETS", "TASKS", "WEIGHTS", "Config", "Whisper"]

TASKS = ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
#: What a checkpoint with a head puts before the backbone's names.
PREFIXES = ("model.",)
#: Modules that some tasks have and others lack.
HEADS = ("proj_out",)


class Whisper(EncoderDecoder):
    """Whisper for one task: `SEQ_2_SEQ_LM` or `FEATURE_EXTRACTION` (the decoder's states).

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
        self.head = ("proj_out",) if task == "SEQ_2_SEQ_LM" and not config.tie_word_embeddings else ()
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)
        if self.head:
            self.proj_out = linear(config, config.d_model, config.vocab_size, rngs, dtype, bias=False)

    def __call__(
        self,
        input_features: Float[Given, "batch mels frames"],
        attention_mask: Any = None,
        *,
        decoder_input_ids: Int[Given, "batch out"],
        decoder_attention_mask: Shaped[Given, "batch out"] | None = None,
        decoder_positions: Int[Given, "rows out"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch out _"]:
        """Logits `[batch out vocab]`, or the decoder's states, by task.

        Args:
          input_features: log-mel spectrograms of a fixed length, as the checkpoint's feature extractor makes them.
          attention_mask: must be None: silence is heard like all else, as in transformers.
          decoder_input_ids: what the decoder has written so far, from the start token on (see `decoder_inputs`).
          decoder_attention_mask: 1 where there is a token, 0 where there is padding; None where all are tokens.
          decoder_positions: of the decoder's tokens; None counts from 0, padding too.
          key: turns dropout on; the same key gives the same masks. None is deterministic.

        Raises:
          ValueError: sounds of another length, or more tokens than the decoder has positions.
        """
        with scope(key=key):
            encoded = self.encode(input_features, attention_mask)
            given = decoder_input_ids, decoder_attention_mask, decoder_positions
            return self.logits(self.decode_behind(encoded, *given))

    def hidden(
        self,
        input_features: Float[Given, "batch mels frames"],
        attention_mask: Any = None,
        *,
        decoder_input_ids: Int[Given, "batch out"],
        decoder_attention_mask: Shaped[Given, "batch out"] | None = None,
        decoder_positions: Int[Given, "rows out"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch out d_model"]:
        """The decoder's normalised last states; arguments as in a call."""
        with scope(key=key):
            encoded = self.encode(input_features, attention_mask)
            return self.decode_behind(encoded, decoder_input_ids, decoder_attention_mask, decoder_positions)

    def encode(self, input_features: Float[Given, "batch mels frames"], attention_mask: Any = None) -> Encoded:
        """The encoder's states, for `decode`. Virtual tokens that a method puts in front have no place among frames."""
        if attention_mask is not None:
            raise ValueError("a whisper model hears all frames, silence too; attention_mask must be None")
        if input_features.ndim != 3 or input_features.shape[1:] != self.input_shape:
            raise ValueError(
                f"input_features are [batch, mels, frames] with {self.input_shape} behind the batch, padded or cut to "
                f"this length; got {input_features.shape}"
            )
        e = self.encoder.heard(input_features.astype(self.dtype))
        return self.encoder(e, None, None, None, **self._options)

    def words(self, ids: Int[Given, "batch out"]) -> Float[Array, "batch out d_model"]:
        return self.decoder.embed_tokens(jnp.asarray(ids))

    def cache(self, batch: int, length: int) -> Cache:
        cache, limit = super().cache(batch, length), self.config.max_target_positions
        if cache.slots > limit:
            raise ValueError(f"a cache of {cache.slots} slots is longer than the {limit} positions this decoder has")
        return cache

    def logits(
        self, hidden: Float[Array, "batch out d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "batch out _"]:
        """What the task's head makes of `hidden`, in float32 or wider."""
        del attention_mask, key
        if self.task == "SEQ_2_SEQ_LM":
            hidden = self.proj_out(hidden) if self.head else self.decoder.embed_tokens.attend(hidden)
        return widened(hidden)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sound: mels, frames."""
        return self.config.num_mel_bins, self.config.frames

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of its stack."""
        config = self.config
        return names_of_stacks(WEIGHTS(config, self.task), config.encoder_layers, config.decoder_layers)


#: torch's `Conv1d.weight` [out, in, window] as a kernel [window, in, out].
_CONVOLUTION = How((2, 1, 0), (2, 1, 0))


def WEIGHTS(config: Config, task: str) -> tuple[Entry, ...]:
    """The table of weights."""
    prefix = PREFIXES[0] if task == "SEQ_2_SEQ_LM" else ""
    entries: list[Entry] = []
    for name in ("encoder.conv1", "encoder.conv2"):
        path = name.replace(".", "/")
        entries += [Rule(f"{prefix}{name}.weight", f"{path}/kernel", _CONVOLUTION)]
        entries += [Rule(f"{prefix}{name}.bias", f"{path}/bias")]
    for name in ("encoder.embed_positions", "decoder.embed_positions", "decoder.embed_tokens"):
        entries.append(Rule(f"{prefix}{name}.weight", f"{name.replace('.', '/')}/embedding"))
    for stack, attentions in {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}.items():
        linears = [f"{part}.{name}" for part in attentions for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
        for name in (*linears, "fc1", "fc2"):
            entries += _rules(
                f"{prefix}{stack}.layers.{{i}}.{name}", f"{stack}/layers/{name.replace('.', '/')}", "kernel"
            )
        for name in (*(f"{part}_layer_norm" for part in attentions), "final_layer_norm"):
            entries += _rules(f"{prefix}{stack}.layers.{{i}}.{name}", f"{stack}/layers/{name}", "scale")
        entries += _rules(f"{prefix}{stack}.layer_norm", f"{stack}/layer_norm", "scale")
    if task == "SEQ_2_SEQ_LM" and config.tie_word_embeddings:
        entries.append(Tied("proj_out.weight", "decoder/embed_tokens/embedding"))
    elif task == "SEQ_2_SEQ_LM":
        entries.append(Rule("proj_out.weight", "proj_out/kernel", TRANSPOSE))
    return tuple(entries)


def _rules(hf: str, path: str, weight: str) -> list[Entry]:
    """A module's weight, and its bias, which keys alone have none of."""
    rule = Rule(f"{hf}.weight", f"{path}/{weight}", TRANSPOSE if weight == "kernel" else COPY)
    return [rule] if hf.endswith("k_proj") else [rule, Rule(f"{hf}.bias", f"{path}/bias")]
