# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral's decoder with a mixture of experts in each layer (Jiang et al., https://arxiv.org/abs/2401.04088).

Computes what transformers' classes of this name do. Names are those of its checkpoints, `block_sparse_moe.gate` and
`block_sparse_moe.experts.0.w1` (gate), `w3` (up) and `w2` (down), which transformers 5, too, writes, though it holds
the experts of a layer in two tensors, `mlp.experts.gate_up_proj` and `down_proj`. Checkpoints with these are read, too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ..seams import Residual
from . import _config
from ._cache import KV
from ._decoder import Decoder
from ._decoder_config import DecoderConfig, one_layout
from ._decoder_layers import Attention, linear, norm
from ._decoder_weights import HEADS, decoder_weights
from ._experts import Experts, SparseMoe
from ._table import TRANSPOSE, Entry, Joined, Renamed, Rule, module_names

__all__ = ["HEADS", "PREFIXES", "PRESETS", "TASKS", "WEIGHTS", "Config", "Mixtral"]

TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
#: What checkpoints with a head put before the backbone's names.
PREFIXES = ("model.",)


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """The attributes of config.json that change what Mixtral computes, with transformers' defaults."""

    intermediate_size: int = 14336
    num_key_value_heads: int = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_jitter_noise: float = 0.0
    model_type: str = "mixtral"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                "num_experts_per_tok is between 1 and num_local_experts; got "
                f"{self.num_experts_per_tok} and {self.num_local_experts}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json, in transformers' old layout (rope_theta, rope_scaling) or new one (rope_parameters).

        An attribute that is unknown, or asks for what is not supported, is refused by name.
        """
        hf = one_layout({"num_key_value_heads": cls.num_key_value_heads} | dict(hf), cls.rope_theta)
        if hf.get("output_router_logits"):
            raise ValueError(
                "output_router_logits=True makes transformers add router_aux_loss_coef times a loss that balances the "
                "experts to a language model's, and jpeft does not; set it to False to train without"
            )
        return _config.read(cls, hf, harmless=["output_router_logits", "router_aux_loss_coef"])

    def to_hf(self) -> dict[str, Any]:
        """config.json, in the layout that every version of transformers reads."""
        absent = ["head_dim"] if self.head_dim is None else []
        return self.written(*absent)


class Layer(nnx.Module):
    """Attention, then a mixture of experts, each on the normalised stream and added to it."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        d_model, experts, std = config.hidden_size, config.num_local_experts, config.initializer_range
        self.input_layernorm = norm(config, d_model, dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
        self.attention_residual = Residual(d_model, "attention")
        self.post_attention_layernorm = norm(config, d_model, dtype)
        self.block_sparse_moe = SparseMoe(
            linear(config, d_model, experts, False, rngs, dtype),
            Experts(experts, d_model, config.intermediate_size, config.hidden_act, std, rngs=rngs, dtype=dtype),
            config.num_experts_per_tok,
            config.router_jitter_noise,
        )
        self.mlp_residual = Residual(d_model, "mlp")

    def __call__(
        self, x: Float[Array, "batch seq d_model"], *context: Any
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        x = checkpoint_name(x, "block_input")
        h, new = self.self_attn(self.input_layernorm(x), *context)
        x = checkpoint_name(self.attention_residual(h, x), "attention_output")
        h = self.block_sparse_moe(self.post_attention_layernorm(x))
        return checkpoint_name(self.mlp_residual(h, x), "mlp_output"), new


class Mixtral(Decoder):
    """A Mixtral for one task: one of `TASKS`."""

    Layer: ClassVar[Any] = Layer
    config: Config

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """Every module's name in a checkpoint, one per layer of the stack, or per expert of each."""
        config = self.config
        return module_names(WEIGHTS(config, self.task), config.num_hidden_layers, config.num_local_experts)


def WEIGHTS(config: DecoderConfig, task: str) -> tuple[Entry, ...]:
    """The table of weights."""
    prefix = "" if task == "FEATURE_EXTRACTION" else PREFIXES[0]
    moe, path = f"{prefix}layers.{{i}}.block_sparse_moe", "layers/block_sparse_moe"
    entries = decoder_weights(config, task, prefix, ("input_layernorm", "post_attention_layernorm"), mlp=False)
    return (
        *entries,
        Rule(f"{moe}.gate.weight", f"{path}/gate/kernel", TRANSPOSE),
        *(Rule(f"{moe}.experts.{{e}}.{w}.weight", f"{path}/experts/{w}/kernel", TRANSPOSE) for w in ("w1", "w2", "w3")),
        Renamed(".mlp.gate.weight", ".block_sparse_moe.gate.weight"),
        Joined(".mlp.experts.gate_up_proj", tuple(f".block_sparse_moe.experts.{{e}}.{w}.weight" for w in ("w1", "w3"))),
        Joined(".mlp.experts.down_proj", (".block_sparse_moe.experts.{e}.w2.weight",)),
    )


PRESETS = {"mixtral-8x7b": Config(max_position_embeddings=32768)}
