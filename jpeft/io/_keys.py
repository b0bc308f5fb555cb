# SPDX-License-Identifier: Apache-2.0
"""The keys of an adapter_config.json: those that every method has, and what becomes of one that is not known."""

from collections.abc import Collection, Mapping
from typing import Any

#: In every configuration: what it is, and where it came from.
COMMON = frozenset(
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type".split()
)


def check_keys(config: Mapping[str, Any], known: Collection[str], method: str) -> None:
    """Refuses what `method` does not know, unless it is empty (null, false, [], {}).

    Raises:
      ValueError: with every such key and its value.
    """
    wrong = {key: value for key, value in config.items() if key not in known and value not in (None, False, [], {})}
    if wrong:
        raise ValueError(
            f"adapter_config.json asks for what jpeft's {method} does not do, or does not know: "
            + ", ".join(f"{key}={value!r}" for key, value in sorted(wrong.items()))
        )
