# SPDX-License-Identifier: Apache-2.0
"""What a configuration of AdapterHub's `adapters` says: its name, those of its parts, and what older versions meant."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ._hub_layout import Hub
from ._hub_union import check_apart, parts_of

#: What configurations without a version call activations.
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
#: An adapter's name is that of a folder in a setup.
_LONGEST = 255
#: No size of an adapter is larger.
_MOST = 2**31 - 1


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _wholes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


_KINDS: Iterable[tuple[str, str, Callable[[Any], bool]]] = (
    ("a whole number", "bottleneck_size phm_dim phm_rank prefix_length prefix_positions r suffix_positions", _whole),
    (
        "a number",
        "alpha dropout inv_adapter_reduction_factor phm_init_range",
        lambda v: type(v) in (int, float) and abs(v) <= 1e30,
    ),
    (
        "true or false",
        "adapter_residual_before_ln cross_adapter cross_prefix encoder_prefix flat intermediate_lora is_parallel "
        "ln_after ln_before mh_adapter original_ln_after original_ln_before orthogonality output_adapter output_lora "
        "phm_layer selfattn_lora shared_gating tied_weights use_gating",
        lambda v: type(v) is bool,
    ),
    ("a string", "architecture composition_mode init_weights inv_adapter non_linearity", lambda v: isinstance(v, str)),
    ("a list of whole numbers", "leave_out", _wholes),
    ('"all", or a list of whole numbers', "layers", lambda v: v == "all" or _wholes(v)),
    ("a list of names", "attn_matrices", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v)),
)
_CHECKS = {key: (what, check) for what, keys, check in _KINDS for key in keys.split()}


def named(whole: Mapping[str, Any], file: Path) -> tuple[str, dict[str, Any]]:
    """The name and the configuration proper of a file.

    Raises:
      ValueError: it has none, or a name longer than a file's can be.
    """
    name, config = whole.get("name"), whole.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError(
            f"{file} is no configuration of adapters: it has name {name!r:.100} and config {config!r:.100}"
        )
    if len(name) > _LONGEST:
        raise ValueError(f"{file} has a name of {len(name)} characters; adapters are named by {_LONGEST} at most")
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
      ValueError: values of another type than the library's; no union of the library's.
    """
    configs = parts_of(config) if is_union(config) else [_of_old_versions(config, version)]
    for part in configs:
        _check_types(part)
    check_apart(configs, hub)
    return [part | ({"subtract_projection": False} if direft else {}) for part in configs]


def _check_types(config: Mapping[str, Any]) -> None:
    """Refuses values that no configuration has; null stands for a key that is not there."""
    wrong = [
        f"{key} must be {_CHECKS[key][0]}, got {value!r:.100}"
        for key, value in config.items()
        if key in _CHECKS and value is not None and not _CHECKS[key][1](value)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def _of_old_versions(config: dict[str, Any], version: Any) -> dict[str, Any]:
    """The configuration as 1.3.0 understands one of an older version."""
    config = dict(config)
    if version is None and "non_linearity" in config:
        config["non_linearity"] = _RENAMED.get(str(config["non_linearity"]), config["non_linearity"])
    found = re.match(r"adapters\.(\d+)\.(\d+)", str(version))
    if found and (int(found[1]), int(found[2])) < (1, 1) and config.get("architecture") == "lora" and "r" in config:
        config["alpha"] = config["r"]  # all were trained so
    return config
