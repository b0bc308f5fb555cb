# SPDX-License-Identifier: Apache-2.0
"""config.json of the Llama family: what each of its model types reads, and known sizes by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import _config
from ._decoder_config import DecoderConfig, one_layout

_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
#: For each model type, what transformers reads that others of the family do not, and where its defaults are others.
_TYPES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
}
_OWN = ("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """The attributes of config.json that change what a model of the family computes, with Llama's defaults."""

    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.model_type not in _TYPES:
            raise ValueError(f"model_type must be one of {', '.join(_TYPES)}; got {self.model_type!r}")
        super().__post_init__()
        self.check_foreign(_foreign(self.model_type))
        if self.layer_types is None:
            return
        self.check_layer_types(self.layer_types)
        if "sliding_attention" in self.layer_types and not (self.use_sliding_window and self.sliding_window):
            raise ValueError(
                "layer_types has sliding_attention, which needs use_sliding_window and a sliding_window; got "
                f"use_sliding_window={self.use_sliding_window}, sliding_window={self.sliding_window}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json, in transformers' old layout (rope_theta, rope_scaling) or new one (rope_parameters).

        An attribute that is unknown, or asks for what is not supported, is refused by name.
        """
        hf = one_layout(_TYPES.get(hf.get("model_type", ""), {}) | dict(hf), cls.rope_theta)
        return _config.read(cls, hf, fixed={"use_mrope": (False,)}, harmless=["pretraining_tp"])

    def to_hf(self) -> dict[str, Any]:
        """config.json, in the layout that every version of transformers reads."""
        absent = _foreign(self.model_type) + (["head_dim"] if self.head_dim is None else [])
        return self.written(*absent)

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias or self.model_type == "qwen2", self.attention_bias, self.mlp_bias

    @property
    def head_norms(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def windows(self) -> tuple[int | None, ...]:
        layers = range(self.num_hidden_layers)
        if self.model_type == "mistral":
            return (self.sliding_window,) * len(layers)
        if not self.use_sliding_window:
            return (None,) * len(layers)
        if self.layer_types is not None:
            return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types)
        return tuple(self.sliding_window if i >= self.max_window_layers else None for i in layers)


def _foreign(model_type: str) -> list[str]:
    """Attributes that only other types of the family read."""
    return [name for name in _OWN if name not in _TYPES[model_type]]


# fmt: off
_LLAMA_2_7B = Config(max_position_embeddings=4096, rms_norm_eps=1e-5)
_LLAMA_3_8B = dataclasses.replace(
    _LLAMA_2_7B, vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=8192,
    rope_theta=5e5)
_LLAMA_3_2_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192}
_QWEN_2_5 = Config(
    model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=131072, rope_theta=1e6,
    tie_word_embeddings=True)

_QWEN_3 = dataclasses.replace(
    _QWEN_2_5, model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960)
_QWEN_3_8B = dataclasses.replace(
    _QWEN_3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    tie_word_embeddings=False)

#: Configs by name. "qwen2.5-1.5b" without its tie and with another rope_theta is DeepSeek-R1's 1.5B distillation.
PRESETS = {
    "llama-2-7b": _LLAMA_2_7B,
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3-70b": dataclasses.replace(
        _LLAMA_3_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "llama-3.2-1b": dataclasses.replace(
        _LLAMA_3_8B, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True,
        max_position_embeddings=131072, rope_scaling=_LLAMA_3_2_ROPE),
    "mistral-7b": dataclasses.replace(
        _LLAMA_3_8B, model_type="mistral", vocab_size=32000, max_position_embeddings=32768, rope_theta=1e4,
        sliding_window=4096),
    "qwen2.5-1.5b": _QWEN_2_5,
    "deepseek-r1-distill-qwen-1.5b": dataclasses.replace(_QWEN_2_5, rope_theta=1e4, tie_word_embeddings=False),
    "qwen3-0.6b": _QWEN_3,
    "qwen3-1.7b": dataclasses.replace(_QWEN_3, hidden_size=2048, intermediate_size=6144),
    "qwen3-4b": dataclasses.replace(
        _QWEN_3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "qwen3-8b": _QWEN_3_8B,
    "qwen3-14b": dataclasses.replace(
        _QWEN_3_8B, hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40),
    "qwen3-32b": dataclasses.replace(
        _QWEN_3_8B, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64),
}
# fmt: on
