# SPDX-License-Identifier: Apache-2.0
"""config.json of DeBERTa v2 and v3, and known sizes by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from . import _config
from ._layers import ACTIVATIONS

#: Attributes that transformers' own config does not have, and reads where they are given.
_OPTIONAL = (
    *("position_buckets", "share_att_key", "norm_rel_ebd", "embedding_size", "cls_dropout"),
    *("conv_kernel_size", "conv_groups", "conv_act"),
)
#: Whose score a relative position counts in: content to position, position to content.
_KINDS = ("c2p", "p2c")


@dataclasses.dataclass(frozen=True)
class Config:
    """The attributes of config.json that change what DeBERTa computes, with transformers' defaults."""

    READ_AS: ClassVar[Mapping[str, Any]] = {"pos_att_type": str | tuple[str, ...] | None}

    vocab_size: int = 128100
    hidden_size: int = 1536
    embedding_size: int | None = None  # None: hidden_size
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    position_biased_input: bool = True
    type_vocab_size: int = 0
    relative_attention: bool = False
    max_relative_positions: int = -1  # below 1: max_position_embeddings
    position_buckets: int = -1  # below 1: every distance has a row of its own
    pos_att_type: tuple[str, ...] | None = None
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0  # 0: no convolution
    conv_groups: int = 1
    conv_act: str = "tanh"
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    cls_dropout: float | None = None  # None: hidden_dropout_prob
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-7
    pad_token_id: int | None = 0
    num_labels: int = 2
    model_type: str = "deberta-v2"
    hf: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        for name in ("hidden_act", "conv_act", "pooler_hidden_act"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}; got {getattr(self, name)!r}")
        if {*(self.pos_att_type or ())} - {*_KINDS}:
            raise ValueError(f"pos_att_type holds {' and '.join(_KINDS)} alone; got {self.pos_att_type!r}")
        if self.norm_rel_ebd not in ("none", "layer_norm"):
            raise ValueError(f"norm_rel_ebd must be 'none' or 'layer_norm'; got {self.norm_rel_ebd!r}")
        if self.norm_rel_ebd != "none" and not self.relative_attention:
            raise ValueError("norm_rel_ebd='layer_norm' needs relative_attention, without which nothing is normalised")
        self._check_buckets()
        self._check_convolution()

    def _check_buckets(self) -> None:
        buckets, distance = self.position_buckets, self.max_distance
        if self.relative_attention and buckets > 0 and (buckets < 4 or buckets % 2 or distance <= buckets // 2 + 1):
            raise ValueError(
                "position_buckets must be even and at least 4 (or below 1, for none), and max_relative_positions more "
                f"than half of them and one; got {buckets} and {distance}"
            )

    def _check_convolution(self) -> None:
        size, groups = self.conv_kernel_size, self.conv_groups
        if size > 0 and not size % 2:
            raise ValueError(f"conv_kernel_size must be odd, so that each token has one output; got {size}")
        if size > 0 and self.hidden_size % groups:
            raise ValueError(f"hidden_size must be a multiple of conv_groups, got {self.hidden_size} and {groups}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json; an attribute that is unknown, or asks for what is not supported, is refused by name."""
        hf = dict(hf)
        kinds = hf.get("pos_att_type")
        if isinstance(kinds, str):  # as "p2c|c2p"
            hf["pos_att_type"] = [kind.strip() for kind in kinds.lower().split("|") if kind.strip()]
        d_model = hf.get("hidden_size", cls.hidden_size)
        sizes = {
            "attention_head_size": (d_model // hf.get("num_attention_heads", cls.num_attention_heads), None),
            "pooler_hidden_size": (d_model,),
        }
        # the last two are about the head of pretraining
        return _config.read(cls, hf, fixed=sizes, harmless=["legacy", "tie_word_embeddings"])

    def to_hf(self) -> dict[str, Any]:
        """config.json."""
        hf = _config.write(self, pooler_hidden_size=self.hidden_size)
        absent = [name for name in _OPTIONAL if getattr(self, name) == getattr(Config, name)]
        return {name: value for name, value in hf.items() if name not in absent}

    @property
    def d_embedding(self) -> int:
        """Width of the tables of words, positions and types."""
        return self.embedding_size or self.hidden_size

    @property
    def max_positions(self) -> int | None:
        """How many tokens a text may have; None where no table limits them."""
        return self.max_position_embeddings if self.position_biased_input else None

    @property
    def max_distance(self) -> int:
        """Beyond which all distances are alike."""
        return self.max_relative_positions if self.max_relative_positions > 0 else self.max_position_embeddings

    @property
    def span(self) -> int:
        """Half the rows of the table of relative positions."""
        return self.position_buckets if self.position_buckets > 0 else self.max_distance

    def relates(self, kind: str) -> bool:
        """Whether scores have the part `"c2p"` (of a query and a distance) or `"p2c"` (of a distance and a key)."""
        return self.relative_attention and kind in (self.pos_att_type or ())

    @property
    def score_scale(self) -> float:
        """What every part of a score is multiplied with: 1 / √(parts · d_head)."""
        parts = 1 + len({*(self.pos_att_type or ())})
        return (parts * (self.hidden_size // self.num_attention_heads)) ** -0.5


_V3 = Config(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    position_biased_input=False,
    relative_attention=True,
    position_buckets=256,
    pos_att_type=("p2c", "c2p"),
    share_att_key=True,
    norm_rel_ebd="layer_norm",
)
_XLARGE = dataclasses.replace(
    _V3,
    hidden_size=1536,
    num_hidden_layers=24,
    num_attention_heads=24,
    intermediate_size=6144,
    conv_kernel_size=3,
    conv_act="gelu",
)

PRESETS = {
    "deberta-v3-xsmall": dataclasses.replace(_V3, hidden_size=384, num_attention_heads=6, intermediate_size=1536),
    "deberta-v3-small": dataclasses.replace(_V3, num_hidden_layers=6),
    "deberta-v3-base": _V3,
    "deberta-v3-large": dataclasses.replace(
        _V3, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "mdeberta-v3-base": dataclasses.replace(_V3, vocab_size=251000),
    "deberta-v2-xlarge": _XLARGE,
    "deberta-v2-xxlarge": dataclasses.replace(_XLARGE, num_hidden_layers=48),
}
