# SPDX-License-Identifier: Apache-2.0
"""The keys of an adapter_config.json that count for no method, and what becomes of those that none reads."""

from collections.abc import Iterable, Mapping
from typing import Any

#: Keys that change no result of any method: where an adapter came from, and what says its type and task.
_HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path fan_in_fan_out inference_mode peft_type peft_version revision runtime_config
    task_type
    """.split()
)


def check_keys(
    config: Mapping[str, Any], method: str, known: Iterable[str], plain: Mapping[str, Any] | None = None
) -> None:
    """Refuses what the configuration asks for and jpeft's method does not do.

    Args:
      known: keys that are read, or count for nothing.
      plain: keys that may have this value and no other, unless they are empty.

    Raises:
      ValueError: all such keys, with their values.
    """
    accepted, plain = _HARMLESS | {*known}, plain or {}
    wrong = {
        key: value
        for key, value in config.items()
        if key not in accepted and value not in (None, False, [], {}) and not (key in plain and value == plain[key])
    }
    if wrong:
        raise ValueError(
            f"adapter_config.json asks for what jpeft's {method} does not do, or does not know: "
            + ", ".join(f"{key}={value!r}" for key, value in sorted(wrong.items()))
        )
