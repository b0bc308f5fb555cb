# SPDX-License-Identifier: Apache-2.0
"""config.json of the Llama family: what each of its model types reads, and known sizes by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import _config
from ._layers import ACTIVATIONS
from ._rope import rope_scaling

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
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class Config:
    """The attributes of config.json that change what a model of the family computes, with Llama's defaults."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as num_attention_heads
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | _config.Pairs | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None
    classifier_dropout: float | None = None
    token_classification_bias: bool = True
    pad_token_id: int | None = None
    num_labels: int = 2
    model_type: str = "llama"
    hf: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.model_type not in _TYPES:
            raise ValueError(f"model_type must be one of {', '.join(_TYPES)}; got {self.model_type!r}")
        object.__setattr__(self, "rope_scaling", rope_scaling(self.rope_scaling))
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        self._check_sizes()
        self._check_type()

    def _check_sizes(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "without a head_dim, hidden_size must be a multiple of num_attention_heads; got "
                f"{self.hidden_size} and {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads; got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.d_head % 2:
            raise ValueError(f"the rotary embedding needs an even head size; got head_dim={self.d_head}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}")

    def _check_type(self) -> None:
        """What the model type does not read must be as it is by default, and windows must be possible."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        foreign = [name for name in _foreign(self.model_type) if getattr(self, name) != defaults[name]]
        if foreign:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in foreign)
            raise ValueError(f"a {self.model_type} model has no {given}; transformers would ignore it")
        types = self.layer_types
        if types is None:
            return
        if len(types) != self.num_hidden_layers or not {*types} <= {*_LAYER_TYPES}:
            raise ValueError(
                f"layer_types has one of {', '.join(_LAYER_TYPES)} for each of {self.num_hidden_layers} layers; "
                f"got {types}"
            )
        if "sliding_attention" in types and not (self.use_sliding_window and self.sliding_window):
            raise ValueError(
                "layer_types has sliding_attention, which needs use_sliding_window and a sliding_window; got "
                f"use_sliding_window={self.use_sliding_window}, sliding_window={self.sliding_window}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json, in transformers' old layout (rope_theta, rope_scaling) or new one (rope_parameters).

        An attribute that is unknown, or asks for what is not supported, is refused by name.
        """
        hf = _TYPES.get(hf.get("model_type", ""), {}) | dict(hf)
        new = hf.pop("rope_parameters", None)
        scaling = dict(hf.get("rope_scaling") or new or {})
        theta = scaling.pop("rope_theta", None) or hf.get("rope_theta") or cls.rope_theta
        hf |= {"rope_theta": theta, "rope_scaling": scaling, "num_key_value_heads": hf.get("num_key_value_heads") or 0}
        return _config.read(cls, hf, fixed={"use_mrope": (False,)}, harmless=["pretraining_tp"])

    def to_hf(self) -> dict[str, Any]:
        """config.json, in the layout that every version of transformers reads."""
        absent = _foreign(self.model_type) + (["head_dim"] if self.head_dim is None else [])
        return {name: value for name, value in _config.write(self).items() if name not in absent}

    @property
    def d_head(self) -> int:
        """Size of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def max_cached(self) -> int | None:
        """How many tokens a cache may hold, virtual ones counted in; None for any number."""
        dynamic = dict(self.rope_scaling or ()).get("rope_type") == "dynamic"
        return self.max_position_embeddings if dynamic else None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens back each layer sees; None for all."""
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
    "qwen3-0.6b": dataclasses.replace(
        _QWEN_2_5, model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960),
}
# fmt: on
