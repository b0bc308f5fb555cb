# SPDX-License-Identifier: Apache-2.0
"""The Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3 (causal decoders with rotary embedding and a gated MLP).

Computes what transformers' classes of these names do. The four differ in biases, windows and norms only:

  llama     biases as attention_bias and mlp_bias say; rope_scaling   https://arxiv.org/abs/2307.09288, 2407.21783
  mistral   every layer sees a window of sliding_window tokens        https://arxiv.org/abs/2310.06825
  qwen2     q, k and v have biases; the layers may have windows       https://arxiv.org/abs/2407.10671
  qwen3     norms on each head's q and k; a head size of its own      https://arxiv.org/abs/2505.09388
"""

from ._decoder import Decoder
from ._decoder_config import DecoderConfig
from ._decoder_weights import HEADS, decoder_weights
from ._llama_config import PRESETS, Config
from ._table import Entry, module_names

__all__ = ["HEADS", "PREFIXES", "PRESETS", "TASKS", "WEIGHTS", "Config", "Llama"]

TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
#: What checkpoints with a head put before the backbone's names; the second is QUESTION_ANS's.
PREFIXES = ("model.", "transformer.")


class Llama(Decoder):
    """A model of the family for one task: one of `TASKS`."""

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of the stack."""
        return module_names(WEIGHTS(self.config, self.task), self.config.num_hidden_layers)


def WEIGHTS(config: DecoderConfig, task: str) -> tuple[Entry, ...]:
    """The table of weights."""
    return decoder_weights(config, task, _prefix(config, task), ("input_layernorm", "post_attention_layernorm"))


def _prefix(config: DecoderConfig, task: str) -> str:
    """What transformers puts before the backbone's names."""
    if task == "FEATURE_EXTRACTION":
        return ""
    return PREFIXES[task == "QUESTION_ANS" and config.model_type != "mistral"]
