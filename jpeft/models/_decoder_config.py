# SPDX-License-Identifier: Apache-2.0
"""What the configs of all decoders with rotary embedding have in common, and what their modules read of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from . import _config
from ._layers import ACTIVATIONS
from ._rope import rope_scaling

#: What `layer_types` may say of a layer.
LAYER_TYPES = ("full_attention", "sliding_attention")

#: What few configs say.
_SELDOM = ("classifier_dropout", "token_classification_bias", "partial_rotary_factor")


class Rope(NamedTuple):
    """A layer's rotary embedding: its base, and how that is stretched."""

    theta: float
    scaling: _config.Pairs | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The attributes of config.json that every decoder here has, with Llama's defaults.

    The properties are what modules read; a family overrides those in which it differs.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as num_attention_heads
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | _config.Pairs | None = None
    attention_dropout: float = 0.0
    sliding_window: int | None = None
    classifier_dropout: float | None = None
    token_classification_bias: bool = True
    pad_token_id: int | None = None
    num_labels: int = 2
    model_type: str = "llama"
    hf: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_scaling", rope_scaling(self.rope_scaling))
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
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
        if self.d_rotary % 2:
            raise ValueError(f"the rotary embedding needs an even head size; got {self.said_of_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{self.activation_name} must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")

    def written(self, *absent: str) -> dict[str, Any]:
        """config.json, in the layout that every version of transformers reads.

        Args:
          absent: attributes that the model type does not have. Those that few configs have are left out at their
            defaults.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        seldom = {name for name in _SELDOM if getattr(self, name, None) == defaults.get(name)}
        return {name: value for name, value in _config.write(self).items() if name not in {*absent, *seldom}}

    def check_foreign(self, foreign: list[str]) -> None:
        """What the model type does not read must be as it is by default.

        Raises:
          ValueError: it is not; the message names it.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = ", ".join(f"{n}={getattr(self, n)!r}" for n in foreign if getattr(self, n) != defaults[n])
        if given:
            raise ValueError(f"a {self.model_type} model has no {given}; transformers would ignore it")

    def check_layer_types(self, types: tuple[str, ...]) -> None:
        """There is one for every layer.

        Raises:
          ValueError: there is not, or it is not known.
        """
        if len(types) != self.num_hidden_layers or not {*types} <= {*LAYER_TYPES}:
            raise ValueError(
                f"layer_types has one of {', '.join(LAYER_TYPES)} for each of {self.num_hidden_layers} layers; "
                f"got {types}"
            )

    @property
    def d_head(self) -> int:
        """Size of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def d_rotary(self) -> int:
        """How many of a head's first numbers are turned by positions."""
        return self.d_head

    @property
    def said_of_heads(self) -> str:
        """The attributes that give `d_rotary`, for an error."""
        return f"head_dim={self.d_head}"

    @property
    def activation_name(self) -> str:
        """The attribute that names the activation."""
        return "hidden_act"

    @property
    def activation(self) -> str:
        """The name of the MLP's activation."""
        return getattr(self, self.activation_name)

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        """Whether there are biases in what gives queries, keys and values; in o_proj; in the MLP."""
        return False, False, False

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values are one projection, and the two halves of a gate another."""
        return False

    @property
    def head_norms(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return False

    @property
    def norm_offset(self) -> float:
        """What is added to a norm's scale."""
        return 0.0

    @property
    def scale(self) -> float:
        """What the scores are multiplied with."""
        return self.d_head**-0.5

    @property
    def score_cap(self) -> float | None:
        """The bound that scores approach; None for none."""
        return None

    @property
    def logit_cap(self) -> float | None:
        """The bound that a language model's logits approach; None for none."""
        return None

    @property
    def embedding_scale(self) -> float | None:
        """What a token's vector is multiplied with."""
        return None

    @property
    def block_dropout(self) -> float:
        """The rate at which what a block adds to the stream is dropped."""
        return 0.0

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens back each layer sees; None for all."""
        return (self.sliding_window,) * self.num_hidden_layers

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary embedding of each layer."""
        scaling = self.rope_scaling
        assert scaling is None or isinstance(scaling, _config.Pairs)
        return (Rope(self.rope_theta, scaling),) * self.num_hidden_layers

    @property
    def rope_type(self) -> str:
        """How the rotary embedding is stretched."""
        return dict(self.rope_scaling or ()).get("rope_type", "default")

    @property
    def max_cached(self) -> int | None:
        """How many tokens a cache may hold, virtual ones counted in; None for any number.

        From there on a rotary embedding that depends on a row's length turns the keys before anew.
        """
        if self.rope_type == "longrope":
            return dict(self.ropes[0].scaling or ()).get(
                "original_max_position_embeddings", self.max_position_embeddings
            )
        return self.max_position_embeddings if self.rope_type == "dynamic" else None

    @property
    def max_cached_name(self) -> str:
        """The attribute that says so."""
        return ("original_" if self.rope_type == "longrope" else "") + "max_position_embeddings"


def one_layout(hf: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """config.json in transformers' old layout (rope_theta, rope_scaling), whether it has that or the new one.

    Args:
      hf: config.json; in the new layout with `rope_parameters`, the same for all layers.
      theta: the base where none is given.
    """
    hf = dict(hf)
    new = hf.pop("rope_parameters", None)
    scaling = dict(hf.get("rope_scaling") or new or {})
    theta = scaling.pop("rope_theta", None) or hf.get("rope_theta") or theta
    if hf.get("num_key_value_heads", 0) is None:
        hf["num_key_value_heads"] = 0
    return hf | {"rope_theta": theta, "rope_scaling": scaling}
