# SPDX-License-Identifier: Apache-2.0
"""config.json of Whisper, and known sizes by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import _config
from ._layers import ACTIVATIONS

#: Attributes of tasks and of training that no task here has, and some that transformers reads nowhere.
_HARMLESS = """
alignment_heads classifier_proj_size forced_decoder_ids is_multilingual mask_feature_length mask_feature_min_masks
mask_feature_prob mask_time_length mask_time_min_masks mask_time_prob median_filter_width num_hidden_layers
scale_embedding use_weighted_layer_sum
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """The attributes of config.json that change what Whisper computes, with transformers' defaults."""

    vocab_size: int = 51865
    num_mel_bins: int = 80
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    decoder_layers: int = 4
    decoder_attention_heads: int = 6
    decoder_ffn_dim: int = 1536
    encoder_ffn_dim: int = 1536
    activation_function: str = "gelu"
    d_model: int = 384
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    max_source_positions: int = 1500
    max_target_positions: int = 448
    pad_token_id: int | None = 50256
    decoder_start_token_id: int | None = 50257
    tie_word_embeddings: bool = True
    num_labels: int = 2
    model_type: str = "whisper"
    hf: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(f"d_model must be a multiple of {name}, got {self.d_model} and {getattr(self, name)}")
        if self.d_model % 2 or self.d_model < 4:
            raise ValueError(f"d_model must be even and at least 4 for sines and cosines, got {self.d_model}")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function must be one of {', '.join(ACTIVATIONS)}; got {self.activation_function!r}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json; an attribute that is unknown, or asks for what is not supported, is refused by name."""
        fixed = {
            "is_encoder_decoder": (True,),
            "encoder_layerdrop": (0,),
            "decoder_layerdrop": (0,),
            "apply_spec_augment": (False, None),
        }
        return _config.read(cls, hf, fixed=fixed, harmless=_HARMLESS.split())

    def to_hf(self) -> dict[str, Any]:
        """config.json."""
        return _config.write(self, is_encoder_decoder=True)

    @property
    def frames(self) -> int:
        """How many a sound has; the second convolution takes every other one."""
        return 2 * self.max_source_positions


def _size(d_model: int, layers: int, heads: int, mels: int = 80, vocab: int = 51865) -> Config:
    """A multilingual one, whose decoder starts with <|startoftranscript|>."""
    return Config(
        vocab_size=vocab,
        num_mel_bins=mels,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_layers=layers,
        decoder_attention_heads=heads,
        decoder_ffn_dim=4 * d_model,
        encoder_ffn_dim=4 * d_model,
        d_model=d_model,
        decoder_start_token_id=50258,
    )


PRESETS = {
    "whisper-tiny": _size(384, 4, 6),
    "whisper-base": _size(512, 6, 8),
    "whisper-small": _size(768, 12, 12),
    "whisper-medium": _size(1024, 24, 16),
    "whisper-large-v3": _size(1280, 32, 20, mels=128, vocab=51866),
}
