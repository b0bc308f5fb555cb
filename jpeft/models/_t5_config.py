# SPDX-License-Identifier: Apache-2.0
"""config.json of T5, v1.0 and v1.1, and known sizes by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import _config
from ._layers import ACTIVATIONS
from ._relative import check_buckets


@dataclasses.dataclass(frozen=True)
class Config:
    """The attributes of config.json that change what T5 computes, with transformers' defaults.

    `tie_word_embeddings=False` is v1.1: a head of its own, and decoder states that are not scaled for it. transformers
    5 always writes true, and says `scale_decoder_outputs=false` of such a model.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 0  # 0: as many as num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    decoder_start_token_id: int | None = None  # None: pad_token_id
    num_labels: int = 2
    model_type: str = "t5"
    hf: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_decoder_layers", self.num_decoder_layers or self.num_layers)
        check_buckets(self.relative_attention_num_buckets, self.relative_attention_max_distance)
        if self.feed_forward_proj.removeprefix("gated-") not in ACTIVATIONS:
            raise ValueError(
                f"feed_forward_proj must be one of {', '.join(ACTIVATIONS)}, or such a name after 'gated-'; got "
                f"{self.feed_forward_proj!r}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json; an attribute that is unknown, or asks for what is not supported, is refused by name."""
        hf = dict(hf)
        scaled = hf.pop("scale_decoder_outputs", True)
        tied = hf.get("tie_word_embeddings", True) and scaled
        hf |= {"tie_word_embeddings": tied, "num_decoder_layers": hf.get("num_decoder_layers") or 0}
        name = hf.get("feed_forward_proj", cls.feed_forward_proj)
        derived = {"dense_act_fn": (_activation(name),), "is_gated_act": (name.startswith("gated-"),)}
        fixed = {"is_encoder_decoder": (True,), **derived}
        return _config.read(cls, hf, fixed=fixed, harmless=["classifier_dropout", "n_positions"])

    def to_hf(self) -> dict[str, Any]:
        """config.json."""
        hf = _config.write(self, is_encoder_decoder=True)
        if self.decoder_start_token_id is None:
            del hf["decoder_start_token_id"]
        return hf

    @property
    def is_gated(self) -> bool:
        """Whether the MLP is gated."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """The MLP's, by transformers' name."""
        return _activation(self.feed_forward_proj)


def _activation(feed_forward_proj: str) -> str:
    """In T5 v1.1 `gated-gelu` means the approximation by tanh."""
    return "gelu_new" if feed_forward_proj == "gated-gelu" else feed_forward_proj.removeprefix("gated-")


_T5_BASE = Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
_V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

_V1_1_SIZES = {
    "small": Config(d_ff=1024, num_layers=8, num_heads=6, **_V1_1),
    "base": dataclasses.replace(_T5_BASE, d_ff=2048, **_V1_1),
    "large": Config(d_model=1024, d_ff=2816, num_layers=24, num_heads=16, **_V1_1),
}

PRESETS = {
    "t5-small": Config(),
    "t5-base": _T5_BASE,
    "t5-large": Config(d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    **{f"t5-v1_1-{size}": config for size, config in _V1_1_SIZES.items()},
    **{f"flan-t5-{size}": config for size, config in _V1_1_SIZES.items()},
}
