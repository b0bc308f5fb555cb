# SPDX-License-Identifier: Apache-2.0
"""(IA)³ in PEFT's files: ia3_l, `[d_out, 1]` where it scales outputs, `[1, d_in]` where it scales a feed-forward input.

`feedforward_modules` are endings of names, not at a dot, and must be among `target_modules`; both are written so that
each entry means inputs alone or outputs alone. There are no keys for layers, so single layers go by full names.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .._method import Adapter
from ..methods import METHODS
from ._keys import check_keys
from ._module_codec import WHERE, check_matrix, write_targets
from ._names import Names
from ._selection import adapted_names, describe, read_places, selected
from ._slots import Codec, Slot, per_layer


def _slots(adapter: Any, module: Any, names: Names) -> list[Slot]:
    check_matrix(adapter, module, names, "IA3", in_out=True)
    inward = adapter.method.on_the_way_in(adapter.site)
    index = (None, slice(None)) if inward else (slice(None), None)
    return per_layer(adapter.site, lambda i: [Slot("ia3_l", adapter.scale, index)])


def _write(method: Any, adapters: Sequence[Adapter], names: Names) -> dict[str, Any]:
    adapted = adapted_names(adapters)
    inward = adapted_names(a for a in adapters if a.acts and method.on_the_way_in(a.site))
    targets, feedforward = _targets({*adapted}, {*inward}, names.every)
    return {
        **write_targets(adapted, names, layered=False),
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "init_ia3_weights": True,
    }


def _read(config: dict[str, Any], names: Names) -> Any:
    check_keys(config, "IA3", (*WHERE, "feedforward_modules", "init_ia3_weights"))
    places = read_places(config, names, names.matrices, layered=False)
    inward = {name for name in places.adapted if _is_inward(config, name)}
    targets, feedforward = _targets(places.adapted, inward, names.own)
    ia3: Any = METHODS["ia3"]
    return ia3(targets=targets, feedforward=tuple(feedforward), modules_to_save=places.modules_to_save)


def _is_inward(config: Mapping[str, Any], name: str) -> bool:
    """PEFT's rule of whether the input of an adapted module is scaled."""
    wanted = config.get("feedforward_modules")
    if wanted is None:
        raise ValueError("feedforward_modules is None; an adapter that PEFT saved says whose inputs are scaled")
    return re.fullmatch(wanted, name) is not None if isinstance(wanted, str) else name.endswith(tuple(wanted))


def _targets(adapted: Collection[str], inward: Collection[str], every: Collection[str]) -> tuple[list[str], list[str]]:
    """`target_modules` and `feedforward_modules` that mean `adapted`, and of these `inward`."""
    outward = {*adapted} - {*inward}

    def rule(config: Mapping[str, Any], name: str) -> bool:
        return selected(config, name) or (name in outward and name.endswith(tuple(config["target_modules"])))

    feedforward, _ = describe(inward, every, layered=False, rule=rule)
    others, _ = describe(outward, every, layered=False)
    return sorted({*feedforward, *others}), feedforward


IA3 = Codec("ia3", "IA3", lambda adapter: adapter, _slots, _write, _read)
