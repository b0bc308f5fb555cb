# SPDX-License-Identifier: Apache-2.0
"""config.json of Gemma 2 and Gemma 3 (text), and known sizes by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import _config
from ._decoder_config import LAYER_TYPES, DecoderConfig, Rope, one_layout

#: For each model type, where transformers' defaults are not Gemma 2's.
_TYPES: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "gemma3_text": {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}
#: What one type alone reads.
_OWN = {"gemma2": ("attn_logit_softcapping",), "gemma3_text": ("rope_local_base_freq", "sliding_window_pattern")}
#: Every how many layers one sees all tokens, where config.json does not say.
_PATTERN = {"gemma2": 2, "gemma3_text": 6}
_LOCAL = 10000.0


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """The attributes of config.json that change what Gemma computes, with Gemma 2's defaults."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    sliding_window: int | None = 4096
    sliding_window_pattern: int | None = None  # None: the model type's
    layer_types: tuple[str, ...] | None = None  # None: as the pattern says
    rope_local_base_freq: float = _LOCAL
    pad_token_id: int | None = 0
    model_type: str = "gemma2"

    def __post_init__(self) -> None:
        if self.model_type not in _TYPES:
            raise ValueError(f"model_type must be one of {', '.join(_TYPES)}; got {self.model_type!r}")
        super().__post_init__()
        self._check_own()
        if self.layer_types == self._pattern:
            object.__setattr__(self, "layer_types", None)
        types = self.layer_types or self._pattern
        self.check_layer_types(types)
        if "sliding_attention" in types and not self.sliding_window:
            raise ValueError(f"layers of sliding_attention need a sliding_window; got {self.sliding_window}")

    def _check_own(self) -> None:
        """What transformers reads of the other type alone must be as it is where nothing is said."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)} | _TYPES[self.model_type]
        foreign = [name for kind, names in _OWN.items() if kind != self.model_type for name in names]
        given = ", ".join(f"{n}={getattr(self, n)!r}" for n in foreign if getattr(self, n) != defaults[n])
        if given:
            raise ValueError(f"a {self.model_type} model has no {given}; transformers would ignore it")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json, in transformers' old layout (rope_theta, rope_local_base_freq) or new (rope_parameters).

        An attribute that is unknown, or asks for what is not supported, is refused by name.
        """
        hf = _one_rope(_TYPES.get(hf.get("model_type", ""), {}) | dict(hf))
        return _config.read(
            cls,
            one_layout(hf, cls.rope_theta),
            fixed={"use_bidirectional_attention": (False, None)},
            harmless=["_sliding_window_pattern", "cache_implementation", "hidden_act"],  # these do nothing there either
        )

    def to_hf(self) -> dict[str, Any]:
        """config.json, in the layout that every version of transformers reads."""
        absent = [name for kind, names in _OWN.items() if kind != self.model_type for name in names]
        absent += [name for name in ("sliding_window_pattern", "layer_types") if getattr(self, name) is None]
        return self.written(*absent)

    @property
    def activation_name(self) -> str:
        return "hidden_activation"

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_bias, False

    @property
    def head_norms(self) -> bool:
        return self.model_type == "gemma3_text"

    @property
    def norm_offset(self) -> float:
        return 1.0

    @property
    def scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @property
    def score_cap(self) -> float | None:
        return self.attn_logit_softcapping

    @property
    def logit_cap(self) -> float | None:
        return self.final_logit_softcapping

    @property
    def embedding_scale(self) -> float | None:
        return self.hidden_size**0.5

    @property
    def windows(self) -> tuple[int | None, ...]:
        types = self.layer_types or self._pattern
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in types)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        everywhere = super().ropes
        if self.model_type == "gemma2":
            return everywhere
        local = Rope(self.rope_local_base_freq)
        return tuple(far if window is None else local for far, window in zip(everywhere, self.windows, strict=True))

    @property
    def _pattern(self) -> tuple[str, ...]:
        every = self.sliding_window_pattern or _PATTERN[self.model_type]
        return tuple(LAYER_TYPES[bool((i + 1) % every)] for i in range(self.num_hidden_layers))


def _one_rope(hf: dict[str, Any]) -> dict[str, Any]:
    """config.json with the rotary embeddings of two types of layers, where it has them, as the old layout says them."""
    new = hf.get("rope_parameters") or {}
    if not {*LAYER_TYPES} & {*new}:
        return hf
    far, near = (dict(new.get(kind) or {}) for kind in LAYER_TYPES)
    local = near.pop("rope_theta", None) or hf.get("rope_local_base_freq") or _LOCAL
    if near.pop("rope_type", "default") != "default" or near or {*new} - {*LAYER_TYPES}:
        raise ValueError(f"layers of sliding_attention have the default rotary embedding; got rope_parameters={new}")
    return hf | {"rope_parameters": far, "rope_local_base_freq": local}


# fmt: off
_GEMMA_3_1B = Config(
    model_type="gemma3_text", vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_attention_heads=4,
    num_key_value_heads=1, max_position_embeddings=32768, rope_theta=1e6, sliding_window=512,
    attn_logit_softcapping=None, final_logit_softcapping=None)

PRESETS = {
    "gemma-2-2b": Config(),
    "gemma-2-9b": Config(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8),
    "gemma-2-27b": Config(
        hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144),
    "gemma-3-270m": dataclasses.replace(
        _GEMMA_3_1B, hidden_size=640, intermediate_size=2048, num_hidden_layers=18),
    "gemma-3-1b": _GEMMA_3_1B,
}
# fmt: on
