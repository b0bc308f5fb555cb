# SPDX-License-Identifier: Apache-2.0
"""What methods adapt when no targets are given: PEFT's choice by the model's type, the same for LoRA and its like."""

from collections.abc import Mapping
from typing import Any

#: What PEFT adapts by default, by the model's type.
DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3_text"), ("q_proj", "v_proj")),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), ("query", "value")),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "gpt2": ("c_attn",),
    "t5": ("q", "v"),
}


def default_targets(method: str, targets: Any, model_type: str | None) -> Any:
    """`targets`, or where it is None the default of the model's type.

    Raises:
      ValueError: there is none.
    """
    if targets is not None:
        return targets
    if model_type is None or model_type not in DEFAULT_TARGETS:
        raise ValueError(
            f"{method} knows no default targets for model type {model_type!r} (it does for "
            f"{', '.join(DEFAULT_TARGETS)}); pass targets="
        )
    return DEFAULT_TARGETS[model_type]
