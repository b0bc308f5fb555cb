# SPDX-License-Identifier: Apache-2.0
"""config.json of BERT, RoBERTa and XLM-R, and known sizes by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import _config
from ._layers import ACTIVATIONS

#: For each model type, where transformers' defaults are not BERT's.
_TYPES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"vocab_size": 50265, "pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The attributes of config.json that change what a model of the family computes, with BERT's defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    num_labels: int = 2
    model_type: str = "bert"
    hf: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.model_type not in _TYPES:
            raise ValueError(f"model_type must be one of {', '.join(_TYPES)}; got {self.model_type!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}")
        if self.is_roberta and (self.pad_token_id is None or self.max_positions < 1):
            raise ValueError(
                f"a {self.model_type} model counts positions from the one after its padding token's, so it needs a "
                f"pad_token_id, and more positions than that; got pad_token_id={self.pad_token_id} and "
                f"max_position_embeddings={self.max_position_embeddings}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json; an attribute that is unknown, or asks for what is not supported, is refused by name."""
        hf = _TYPES.get(hf.get("model_type", ""), {}) | dict(hf)
        return _config.read(
            cls, hf, fixed={"position_embedding_type": ("absolute", None)}, harmless=["tie_word_embeddings"]
        )

    def to_hf(self) -> dict[str, Any]:
        """config.json."""
        return _config.write(self)

    @property
    def is_roberta(self) -> bool:
        """Whether it is RoBERTa or XLM-R, of which padding has a position of its own."""
        return self.model_type != "bert"

    @property
    def first_position(self) -> int:
        """The row of the table of positions that a text's first token takes; padding takes the one before."""
        return (self.pad_token_id or 0) + 1 if self.is_roberta else 0

    @property
    def max_positions(self) -> int:
        """How many tokens a text may have."""
        return self.max_position_embeddings - self.first_position


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_ROBERTA = Config(
    model_type="roberta",
    vocab_size=50265,
    max_position_embeddings=514,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    pad_token_id=1,
)

PRESETS = {
    "bert-base-uncased": Config(),
    "bert-large-uncased": dataclasses.replace(Config(), **_LARGE),
    "all-MiniLM-L6-v2": Config(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "roberta-base": _ROBERTA,
    "roberta-large": dataclasses.replace(_ROBERTA, **_LARGE),
    "xlm-roberta-base": dataclasses.replace(_ROBERTA, model_type="xlm-roberta", vocab_size=250002),
    "xlm-roberta-large": dataclasses.replace(_ROBERTA, model_type="xlm-roberta", vocab_size=250002, **_LARGE),
}
