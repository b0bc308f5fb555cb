# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 and Gemma 3 (text): decoders with a norm on either side of each block, and windows in most layers.

Computes what transformers' classes of these names do. Norms scale by 1 + scale, tokens' vectors are multiplied with
√d_model (rounded to their dtype), and the two differ in

  gemma2        bounded scores and logits; every second layer sees all tokens         https://arxiv.org/abs/2408.00118
  gemma3_text   norms on each head's q and k; every sixth layer sees all tokens, with
                a rotary embedding of its own                                          https://arxiv.org/abs/2503.19786
"""

from typing import Any, ClassVar

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ..seams import Residual
from ._cache import KV
from ._decoder import Decoder
from ._decoder_config import DecoderConfig
from ._decoder_layers import MLP, Attention, norm
from ._decoder_weights import HEADS, decoder_weights
from ._gemma_config import PRESETS, Config
from ._table import Entry, module_names

__all__ = ["HEADS", "PREFIXES", "PRESETS", "TASKS", "WEIGHTS", "Config", "Gemma"]

TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
#: What checkpoints with a head put before the backbone's names.
PREFIXES = ("model.",)

_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


class Layer(nnx.Module):
    """Attention, then an MLP, each on the normalised stream, normalised again and added to it."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any):
        d_model = config.hidden_size
        self.input_layernorm = norm(config, d_model, dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
        self.post_attention_layernorm = norm(config, d_model, dtype)
        self.attention_residual = Residual(d_model, "attention")
        self.pre_feedforward_layernorm = norm(config, d_model, dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)
        self.post_feedforward_layernorm = norm(config, d_model, dtype)
        self.mlp_residual = Residual(d_model, "mlp")

    def __call__(
        self, x: Float[Array, "batch seq d_model"], *context: Any
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        x = checkpoint_name(x, "block_input")
        h, new = self.self_attn(self.input_layernorm(x), *context)
        x = self.attention_residual(self.post_attention_layernorm(h), x)
        x = checkpoint_name(x, "attention_output")
        h = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return checkpoint_name(self.mlp_residual(h, x), "mlp_output"), new


class Gemma(Decoder):
    """A model of the family for one task: one of `TASKS`."""

    Layer: ClassVar[Any] = Layer

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of the stack."""
        return module_names(WEIGHTS(self.config, self.task), self.config.num_hidden_layers)


def WEIGHTS(config: DecoderConfig, task: str) -> tuple[Entry, ...]:
    """The table of weights."""
    return decoder_weights(config, task, "" if task == "FEATURE_EXTRACTION" else PREFIXES[0], _NORMS)
