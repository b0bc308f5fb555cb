# SPDX-License-Identifier: Apache-2.0
"""Phi-3: Llama's decoder with its projections in one piece each (Abdin et al., https://arxiv.org/abs/2404.14219).

Computes what transformers' classes of this name do. `qkv_proj` gives queries, keys and values, `gate_up_proj` both
halves of the gated MLP; each is one projection here too, so that an adapter on it is the one that PEFT means. Some
sizes turn a part of each head alone, and stretch the rotary embedding by LongRoPE.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import _config
from ._decoder import Decoder
from ._decoder_config import DecoderConfig, Rope, one_layout
from ._decoder_weights import HEADS, decoder_weights
from ._table import Entry, module_names

__all__ = ["HEADS", "PREFIXES", "PRESETS", "TASKS", "WEIGHTS", "Config", "Phi3"]

TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
#: What checkpoints with a head put before the backbone's names.
PREFIXES = ("model.",)

#: LongRoPE's names in the first checkpoints.
_OLD_NAMES = ("su", "yarn")


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """The attributes of config.json that change what Phi-3 computes, with transformers' defaults."""

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    partial_rotary_factor: float = 1.0
    resid_pdrop: float = 0.0
    pad_token_id: int | None = 32000
    model_type: str = "phi3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_type not in ("default", "longrope"):
            raise ValueError(f"a phi3 model's rope_type is default or longrope; got {self.rope_type!r}")
        scaling = dict(self.rope_scaling or ())
        for name in ("short_factor", "long_factor"):
            if name in scaling and len(scaling[name]) != self.d_rotary // 2:
                raise ValueError(
                    f"{name} has a number for each of {self.d_rotary // 2} frequencies; got {len(scaling[name])}"
                )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json, in transformers' old layout (rope_theta, rope_scaling) or new one (rope_parameters).

        An attribute that is unknown, or asks for what is not supported, is refused by name.
        """
        hf = one_layout(hf, cls.rope_theta)
        scaling = dict(hf["rope_scaling"])
        part = scaling.pop("partial_rotary_factor", None)
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        # transformers, too, reads this length off config.json alone
        scaling.pop("original_max_position_embeddings", None)
        hf["rope_scaling"] = {name: value for name, value in scaling.items() if name != "type"}
        hf["rope_scaling"]["rope_type"] = "longrope" if kind in _OLD_NAMES else kind
        if part is not None:
            hf["partial_rotary_factor"] = part
        fixed = {"attention_bias": (False,)}
        return _config.read(cls, hf, fixed=fixed, harmless=["embd_pdrop"])  # which does nothing in transformers either

    def to_hf(self) -> dict[str, Any]:
        """config.json, in the layout that every version of transformers reads."""
        absent = ["head_dim"] if self.head_dim is None else []
        return self.written(*absent)

    @property
    def d_rotary(self) -> int:
        return int(self.d_head * self.partial_rotary_factor)

    @property
    def said_of_heads(self) -> str:
        return f"head_dim={self.d_head}, partial_rotary_factor={self.partial_rotary_factor}"

    @property
    def fused(self) -> bool:
        return True

    @property
    def block_dropout(self) -> float:
        return self.resid_pdrop

    @property
    def ropes(self) -> tuple[Rope, ...]:
        (rope, *_) = super().ropes
        if rope.scaling is not None:
            original = {"original_max_position_embeddings": self.original_max_position_embeddings}
            rope = Rope(rope.theta, _config.Pairs(sorted((dict(rope.scaling) | original).items())))
        return (rope,) * self.num_hidden_layers


class Phi3(Decoder):
    """A Phi-3 for one task: one of `TASKS`."""

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of the stack."""
        return module_names(WEIGHTS(self.config, self.task), self.config.num_hidden_layers)


def WEIGHTS(config: DecoderConfig, task: str) -> tuple[Entry, ...]:
    """The table of weights."""
    prefix = "" if task == "FEATURE_EXTRACTION" else PREFIXES[0]
    return decoder_weights(config, task, prefix, ("input_layernorm", "post_attention_layernorm"))


PRESETS = {
    "phi-3-mini-4k": Config(sliding_window=2047),
    "phi-3-medium-4k": Config(
        hidden_size=5120,
        intermediate_size=17920,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=10,
        sliding_window=2047,
    ),
}
