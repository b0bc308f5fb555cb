# SPDX-License-Identifier: Apache-2.0
"""Sizes that every family has, each under names of its own."""

from typing import Any

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads")
_HEAD_SIZES = ("head_dim", "d_kv")


def stream_width(config: Any) -> int:
    """d_model: numbers of a token's vector between the layers. Raises TypeError as `query_heads`."""
    return _of(config, _WIDTHS)


def query_heads(config: Any) -> int:
    """Heads of a layer's queries.

    Raises:
      TypeError: the configuration is of no family of the zoo.
    """
    return _of(config, _HEADS)


def query_width(config: Any) -> int:
    """Query heads times the size of each. Raises TypeError as `query_heads`."""
    heads = query_heads(config)
    each = next((size for name in _HEAD_SIZES if (size := getattr(config, name, None))), None)
    return heads * (each or stream_width(config) // heads)


def _of(config: Any, names: tuple[str, ...]) -> int:
    found = next((getattr(config, name) for name in names if hasattr(config, name)), None)
    if found is None:
        raise TypeError(f"{type(config).__name__} has none of {', '.join(names)}")
    return found
