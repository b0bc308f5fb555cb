# SPDX-License-Identifier: Apache-2.0
"""Norm tuning in PEFT's files (LN_TUNING): ln_tuning_layers.weight and .bias, copies of the norm's own.

PEFT's LN_TUNING takes any module; jpeft's takes norms, and another module is refused. There are no keys for layers, so
single layers go by full names.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._copies import leaves_of
from .._matching import matches
from .._method import Adapter
from .._walk import Found
from ..methods import METHODS
from ._keys import check_keys
from ._module_codec import WHERE, write_targets
from ._names import Names
from ._selection import read_places
from ._slots import Codec


def _copies(adapter: Adapter, found: Found) -> str:
    method: Any = adapter.method
    if not adapter.saved or not leaves_of(found, "norm") or _is_saved_whole(found, method.modules_to_save or ()):
        return ""
    return "ln_tuning_layers"


def _is_saved_whole(found: Found, entries: tuple[str, ...]) -> bool:
    """Whether `modules_to_save` names the module, or one around it."""
    parts = [(name.split(mark), mark) for name, mark in ((found.path, "/"), (found.names[0], "."))]
    around = [mark.join(own[:n]) for own, mark in parts for n in range(1, len(own) + 1)]
    return any(matches(entries, name, name) for name in around)


def _write(method: Any, adapters: Sequence[Adapter], names: Names) -> dict[str, Any]:
    tuned = [a for a in adapters if _copies(a, names.found[a.site.path])]
    layers = [(a.site.names, np.any([*a.saved_layers.values()], 0)) for a in tuned]
    adapted = [name for own, trained in layers for name, on in zip(own, trained, strict=True) if on]
    return write_targets(adapted, names, layered=False, in_out=False)


def _read(config: dict[str, Any], names: Names) -> Any:
    check_keys(config, "NormTuning", WHERE)
    places = read_places(config, names, names.paths, layered=False)
    odd = sorted(name for name in places.adapted if not leaves_of(names.found[names.paths[name]], "norm"))
    if odd:
        raise ValueError(f"target_modules takes in {', '.join(odd)}, and jpeft's NormTuning trains norms alone")
    norm_tuning: Any = METHODS["norm_tuning"]
    return norm_tuning(targets=places.targets, modules_to_save=places.modules_to_save)


NORM_TUNING = Codec("norm_tuning", "LN_TUNING", lambda adapter: adapter, lambda *_: [], _write, _read, copies=_copies)
