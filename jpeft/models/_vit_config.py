# SPDX-License-Identifier: Apache-2.0
"""config.json of ViT, and known sizes by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import _config
from ._layers import ACTIVATIONS

#: A side of a square, or height and width.
Size = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """The attributes of config.json that change what a ViT computes, with transformers' defaults.

    `pooler_output_size` is None where the pooler's output is as wide as the stream.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: Size = 224
    patch_size: Size = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    num_labels: int = 2
    model_type: str = "vit"
    hf: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        for name in ("hidden_act", "pooler_act"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}; got {getattr(self, name)!r}")
        for name in ("image_size", "patch_size"):
            if isinstance(getattr(self, name), tuple) and len(getattr(self, name)) != 2:
                raise ValueError(f"{name} is one number, or height and width; got {getattr(self, name)}")
        if 0 in self.grid:
            raise ValueError(f"an image of {self.image} holds no patch of {self.patch}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json; an attribute that is unknown, or asks for what is not supported, is refused by name."""
        config = _config.read(cls, hf, harmless=["encoder_stride"])  # of a head that no task here has
        same = config.pooler_output_size in (0, config.hidden_size)
        return dataclasses.replace(config, pooler_output_size=None) if same else config

    def to_hf(self) -> dict[str, Any]:
        """config.json."""
        return _config.write(self, pooler_output_size=self.pooler_size)

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of an image."""
        return _pair(self.image_size)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """How many patches there are, down and across."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def num_tokens(self) -> int:
        """Of an image: the class token and the patches."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def pooler_size(self) -> int:
        """Width of the pooler's output."""
        return self.hidden_size if self.pooler_output_size is None else self.pooler_output_size


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, tuple) else (size, size)


_LARGE = Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)

PRESETS = {
    "vit-base-patch16-224": Config(),
    "vit-base-patch16-384": Config(image_size=384),
    "vit-base-patch32-384": Config(image_size=384, patch_size=32),
    "vit-large-patch16-224": _LARGE,
    "vit-large-patch32-384": dataclasses.replace(_LARGE, image_size=384, patch_size=32),
    "vit-huge-patch14-224-in21k": Config(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14
    ),
}
