# SPDX-License-Identifier: Apache-2.0
"""How one method looks in AdapterHub's files, and what the codecs of several methods share."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from .._method import Adapter, Method
from ._hub_layout import Hub
from ._slots import Slot

#: The parts of an adapter by the path of their module.
Parts = Mapping[str, Adapter]
#: Tensors in memory by their key.
Arrays = dict[str, np.ndarray]

VERSION = "adapters.1.3.0"


@dataclasses.dataclass(frozen=True)
class HubCodec:
    """How one method, or several that are one to the library, look in its files.

    Attributes:
      kinds: of the methods that it writes.
      matches: whether a configuration is of one of them.
      slots: the tensors of an adapter: (parts, hub) -> slots, whose keys are whole.
      write: its configuration: (method, parts, hub) -> dict.
      read: the method of a configuration: (config, hub, head) -> method, where head says what of `modules_to_save`.
      portable: an adapter in the form that the file can hold, the same function of its input.
      encode: tensors as the library has them, of those in the slots: (tensors, config) -> tensors.
      decode: the other way round, also of what the library writes more than once: (tensors, config, hub) -> tensors.
    """

    kinds: tuple[str, ...]
    matches: Callable[[Mapping[str, Any]], bool]
    slots: Callable[[Parts, Hub], list[Slot]]
    write: Callable[[Any, Parts, Hub], dict[str, Any]]
    read: Callable[[Mapping[str, Any], Hub, Any], Method]
    portable: Callable[[Adapter, Hub], Adapter] = lambda adapter, hub: adapter
    encode: Callable[[Arrays, Mapping[str, Any]], Arrays] = lambda tensors, config: tensors
    decode: Callable[[Arrays, Mapping[str, Any], Hub], Arrays] = lambda tensors, config, hub: tensors


def slot(key: str, leaf: Any, index: tuple[Any, ...], axes: tuple[int, ...] | None = None) -> Slot:
    """A tensor under its whole key."""
    return Slot(key, leaf, index, axes, prefix="")


def with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any], also: Collection[str] = ()) -> dict[str, Any]:
    """A configuration with the library's values for the keys that it lacks, as older ones do.

    Raises:
      ValueError: it has a key that the library's 1.3.0 does not know, with a value.
    """
    unknown = {k: v for k, v in config.items() if k not in {*defaults, *also} and v not in (None, False, [], {})}
    if unknown:
        said = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
        raise ValueError(f"the configuration has keys that adapters 1.3.0 does not know: {said}")
    return {**defaults, **config}


def check_plain(config: Mapping[str, Any], plain: Mapping[str, Any], method: str) -> None:
    """Refuses what jpeft's method does not do.

    Args:
      plain: the only value that a key may have.

    Raises:
      ValueError: all such keys, with their values.
    """
    wrong = {key: config[key] for key, value in plain.items() if config[key] != value}
    if wrong:
        raise ValueError(
            f"the configuration asks for what jpeft's {method} does not do: "
            + ", ".join(f"{key}={value!r}" for key, value in sorted(wrong.items()))
        )
