# SPDX-License-Identifier: Apache-2.0
"""PEFT's rules of names: what a target means, which layer a name is of, which entry of a pattern counts."""

import re
from collections.abc import Mapping
from typing import Any


def matches(pattern: str | tuple[str, ...], name: str, path: str) -> bool:
    """PEFT's rule: a string is a full regular expression, a tuple holds exact names or dotted suffixes.

    Either is read against the NNX path where it holds a `/`. (Else a `(?!...)` about a layer's number would match all
    layers by their common path.)
    """
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path if "/" in pattern else name) is not None
    return any(_entry_matches(entry, name, path) for entry in pattern)


def _entry_matches(entry: str, name: str, path: str) -> bool:
    if "/" in entry:
        return path == entry or path.endswith("/" + entry)
    return entry in (name, path) or name.endswith("." + entry)


def layer_of(name: str) -> int | None:
    """The first numbered part of a name: `encoder.layer.3.attention` is layer 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def pattern_matches(key: str, name: str) -> bool:
    """PEFT's rule for the keys of a `rank_pattern`: a regular expression for the end of `name`, at a dot."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key of a `rank_pattern` or `alpha_pattern` that matches the end of `name`."""
    return next((value for key, value in patterns.items() if pattern_matches(key, name)), default)
