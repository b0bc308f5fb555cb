# SPDX-License-Identifier: Apache-2.0
"""What a configuration of AdapterHub's `adapters` says: its name, those of its parts, and what older versions meant."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._hub_layout import Hub
from ._hub_union import check_apart, parts_of

#: What configurations without a version call activations.
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def named(whole: Mapping[str, Any], file: Path) -> tuple[str, dict[str, Any]]:
    """The name and the configuration proper of a file.

    Raises:
      ValueError: it has none.
    """
    name, config = whole.get("name"), whole.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError(f"{file} is no configuration of adapters: it has name {name!r} and config {config!r}")
    return name, config


def is_union(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of several methods under one name."""
    return config.get("architecture") == "union"


def split(config: dict[str, Any], version: Any, hub: Hub, direft: bool) -> list[dict[str, Any]]:
    """The configurations of an adapter's parts, in the order in which they act: one, but of a union.

    Args:
      version: of the library that wrote it. A union's parts are all taken as of 1.3.0, as the library takes them.
      direft: whether a ReFT without orthogonality is DiReFT's.

    Raises:
      ValueError: no union of the library's.
    """
    if is_union(config):
        configs = parts_of(config)
        check_apart(configs, hub)
    else:
        configs = [_of_old_versions(config, version)]
    return [part | ({"subtract_projection": False} if direft else {}) for part in configs]


def _of_old_versions(config: dict[str, Any], version: Any) -> dict[str, Any]:
    """The configuration as 1.3.0 understands one of an older version."""
    config = dict(config)
    if version is None and "non_linearity" in config:
        config["non_linearity"] = _RENAMED.get(config["non_linearity"], config["non_linearity"])
    found = re.match(r"adapters\.(\d+)\.(\d+)", str(version))
    if found and (int(found[1]), int(found[2])) < (1, 1) and config.get("architecture") == "lora":
        config["alpha"] = config["r"]  # all were trained so
    return config
