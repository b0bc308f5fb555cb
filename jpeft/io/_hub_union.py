# SPDX-License-Identifier: Apache-2.0
"""Unions in AdapterHub's files: several methods under one name, as MAM and UniPELT are.

The configuration has those of the parts in a list, and the tensors of all lie in one file. In jpeft the parts are
adapters with names of their own, `a_prefix_tuning` and `a_lora` for the union `a`: those that one hybrid put on.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._graft import adapters, grafts
from ._hub_bottleneck import DEFAULTS
from ._hub_layout import Hub
from ._slots import Slot

#: The architectures that a union may have, as the library's own unions order them; at one place they act so.
_ORDER = ("prefix_tuning", None, "lora", "reft")
#: Where bottleneck adapters sit, by the keys of their configuration.
_PLACES = ("mh_adapter", "output_adapter", "cross_adapter")


def members(model: Any, name: str | None) -> tuple[str, tuple[str, ...]]:
    """(the name in the library, the adapters of a hybrid), of the hybrid `name`, or of the only one on the model.

    An adapter is of the hybrid whose name stands before its kind, `a` of `a_lora`; without a name the union is "union".
    Where there is no such hybrid there are no adapters.
    """
    found: dict[str, str | None] = {}
    for _, module in grafts(model):
        found |= {own: _hybrid(own, adapter.method.kind) for own, adapter in adapters(module).items()}
    whole = {*found.values()} if name is None else {name}
    hybrid = whole.pop()
    own = () if hybrid is None or whole else tuple(part for part, stem in found.items() if stem == hybrid)
    return hybrid or "union", own if len(own) > 1 else ()


def _hybrid(own: str, kind: str) -> str | None:
    """The name of the hybrid that put an adapter on, "" of one without a name; None of an adapter named otherwise."""
    match = re.fullmatch(rf"(?:(.+)_)?{kind}(_\d+)?", own)
    return (match[1] or "") if match and kind != "adapter_fusion" else None


def parts_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configurations of a union's parts, in the order in which they act.

    Raises:
      ValueError: it has none, or one that is no configuration.
    """
    parts = config.get("configs")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"the configuration of a union has a list of its parts' as configs, and this has {parts!r}")
    more = {key: value for key, value in config.items() if key not in ("architecture", "configs") and value}
    if more:
        raise ValueError(f"the configuration of a union has its parts' alone, and this has {', '.join(sorted(more))}")
    return sorted(parts, key=_position)


def joined(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The configuration of a union of parts with these."""
    return {"architecture": "union", "configs": sorted(configs, key=_position)}


def check_apart(configs: Sequence[Mapping[str, Any]], hub: Hub) -> None:
    """Refuses what the library refuses: two parts of one sort that meet.

    Raises:
      ValueError: the sort.
    """
    for one, other in itertools.combinations(configs, 2):
        if one.get("architecture") == other.get("architecture") and not _apart(one, other, sum(hub.depths())):
            kind = one.get("architecture") or "bottleneck"
            raise ValueError(
                f"the library's unions have one {kind} configuration in a layer (of bottleneck adapters one per "
                "block), and here two would meet; put them into folders of their own, by name="
            )


def check_order(model: Any, names: Iterable[str]) -> None:
    """Refuses parts that act in another order at a join than in the library, where ReFT comes last.

    Raises:
      ValueError: a ReFT edits what an adapter behind it reads.
    """
    names = {*names}
    for path, module in grafts(model):
        own = [adapter.method for name, adapter in adapters(module).items() if name in names and adapter.acts]
        edits = [i for i, method in enumerate(own) if method.kind in ("loreft", "noreft", "direft")]
        late = [i for i, method in enumerate(own) if getattr(method, "original_ln_after", True) is False]
        if edits and late and edits[0] < late[-1]:
            raise ValueError(
                f"{path}: the {own[edits[0]].kind} was put on before the {own[late[-1]].kind}, and in the library it "
                "acts behind it; adapt in the other order"
            )


def check_tensors(slots: Iterable[Slot]) -> None:
    """Refuses parts that would write the same tensor.

    Raises:
      ValueError: the first such tensor.
    """
    seen: set[str] = set()
    for slot in slots:
        if slot.key in seen:
            raise ValueError(f"two of the adapters have a {slot.key}, of which the library has one for all of a union")
        seen.add(slot.key)


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], depth: int) -> bool:
    """Whether two configurations of one architecture never meet, by the library's own rules."""
    if one.get("architecture") is not None:
        return False
    left_out = [{*(config.get("leave_out") or ())} for config in (one, other)]
    pairs = {key: [bool(config.get(key, DEFAULTS[key])) for config in (one, other)] for key in _PLACES}
    unlike = any(left_out) or all(len({*pairs[key]}) == 2 for key in ("mh_adapter", "output_adapter"))
    meet = any(all(pair) for pair in pairs.values()) and {*range(depth)} - left_out[0] - left_out[1]
    return unlike and not meet


def _position(config: Mapping[str, Any]) -> int:
    architecture = config.get("architecture")
    return next((i for i, known in enumerate(_ORDER) if known == architecture), len(_ORDER))
