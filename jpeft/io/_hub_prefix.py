# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning in AdapterHub's files: one tensor per kind of attention, of all layers' keys and values.

Flat it is control_trans `[num_tokens · 2 · layers · kv_heads · d_head]`, of layer l the keys and then the values, as in
jpeft's table. A network is wte.weight, control_trans.0 and control_trans.2, with tanh between, from the width of the
stream. Where jpeft's has another width, or one network serves several kinds of attention, what it computes is written
and read in its place. The library writes every tensor once more under each layer; these copies count for nothing. Each
attention has the gate of its own, `[1, d_model]` and `[1]`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..methods import METHODS
from ._hub_codec import Arrays, HubCodec, Parts, check_plain, slot, with_defaults
from ._hub_layout import Hub
from ._slots import Slot, layer_index

_DEFAULTS: Mapping[str, Any] = {
    "architecture": "prefix_tuning",
    "bottleneck_size": 512,
    "cross_prefix": True,
    "dropout": 0.0,
    "encoder_prefix": True,
    "flat": False,
    "init_weights_seed": None,
    "leave_out": [],
    "non_linearity": "tanh",
    "prefix_length": 30,
    "shared_gating": True,
    "use_gating": False,
}
_PLAIN = {"dropout": 0.0, "leave_out": [], "encoder_prefix": True}
#: The copies of a prefix that every layer has of the one that counts.
_COPY = re.compile(r"(.*\.)?prefix_tuning\.pool\.(prefix_tunings\..*)")
#: A network's tensors, with jpeft's leaves and the order of their axes.
_NETWORK = {
    "wte.weight": ("embedding", None),
    "control_trans.0.weight": ("down_kernel", (1, 0)),
    "control_trans.0.bias": ("down_bias", None),
    "control_trans.2.weight": ("up_kernel", (1, 0)),
    "control_trans.2.bias": ("up_bias", None),
}


def is_kept(method: Any, parts: Parts, hub: Hub) -> bool:
    """Whether the library's file can hold the method as it is, without folding its network away."""
    widths = {adapter.site.d_out for adapter in parts.values() if adapter.site.seam == "keys_values"}
    return not method.projection or (len(_kinds(hub)) == 1 and widths == {hub.width})


def _kinds(hub: Hub) -> dict[str, str]:
    """What the library calls the prefixes of an attention, by the path of its keys and values."""
    return {path: name for stack in hub.layout.stacks for path, name in stack.prefixes.items()}


def _slots(parts: Parts, hub: Hub) -> list[Slot]:
    kinds = _kinds(hub)
    root: Any = parts[""]
    start = f"{hub.layout.base}prefix_tuning.prefix_tunings.{hub.name}."
    slots = []
    for path, adapter in parts.items():
        if path not in kinds or not adapter.acts:
            continue
        site, key = adapter.site, f"{start}{kinds[path]}."
        slots += _gates(adapter, hub) if root.method.gate else []
        if root.method.projection:
            slots += [slot(f"{key}{name}", getattr(root, leaf), (), axes) for name, (leaf, axes) in _NETWORK.items()]
            continue
        tokens, _, *sizes = root.prefix.shape
        size = tokens * 2 * len(site.names) * int(np.prod(sizes))
        mine = slice(2 * site.first, 2 * (site.first + len(site.names)))
        slots.append(Slot(f"{key}control_trans", root.prefix, (slice(None), mine), prefix="", shape=(size,)))
    return slots


def _gates(adapter: Any, hub: Hub) -> list[Slot]:
    """The tensors of an attention's gate in every layer."""
    slots = []
    for i, name in enumerate(hub.attention_names(adapter.site)):
        at, key = layer_index(adapter.site.lead, i), f"{name}.prefix_tuning.prefix_gates.{hub.name}."
        slots.append(slot(f"{key}weight", adapter.gate_weight, at, (1, 0)))
        slots.append(slot(f"{key}bias", adapter.gate_bias, at))
    return slots


# Configuration ------------------------------------------------------------------------------------------------------


def _write(method: Any, parts: Parts, hub: Hub) -> dict[str, Any]:
    _check_model(hub)
    if method.shift_positions:
        raise ValueError(
            "the library's prefix leaves the text's positions where they are; adapt without shift_positions="
        )
    sites = [adapter.site for path, adapter in parts.items() if path in _kinds(hub)]
    if not all(all(site.active) for site in sites):
        raise ValueError("jpeft writes prefixes of every layer; adapt without layers=")
    there = {_kinds(hub)[site.path] for site in sites}
    if {*_kinds(hub).values()} - there - {"cross_prefix"}:
        raise ValueError(f"the library puts a prefix into every kind of attention, and the adapter only {there}")
    return {
        **_DEFAULTS,
        "bottleneck_size": (method.hidden_size or hub.width) if method.projection else _DEFAULTS["bottleneck_size"],
        "cross_prefix": "cross_prefix" in there or len(_kinds(hub)) == 1,
        "flat": not method.projection,
        "prefix_length": method.num_tokens,
        "use_gating": method.gate,
    }


def _read(config: Mapping[str, Any], hub: Hub, head: Any) -> Any:
    _check_model(hub)
    config = with_defaults(config, _DEFAULTS)
    check_plain(config, _PLAIN, "PrefixTuning")
    if config["use_gating"]:
        check_plain(config, {"shared_gating": True}, "PrefixTuning")
    cross = config["cross_prefix"] and "cross_prefix" in _kinds(hub).values()
    network = not config["flat"] and len(_kinds(hub)) == 1 and _key_width(hub) == hub.width
    if not config["flat"]:
        check_plain(config, {"non_linearity": "tanh"}, "PrefixTuning")
    method: Any = METHODS["prefix_tuning"]
    return method(
        num_tokens=config["prefix_length"],
        projection=network,
        hidden_size=config["bottleneck_size"] if network else None,
        blocks=("attention", "cross_attention") if cross else ("attention",),
        gate=bool(config["use_gating"]),
        modules_to_save=head,
    )


def _check_model(hub: Hub) -> None:
    if hub.layout.no_prefix:
        raise ValueError(f"on a {hub.model.config.model_type} jpeft has no prefix of the library's: "
                         f"{hub.layout.no_prefix}")  # fmt: skip


def _key_width(hub: Hub) -> int:
    module = hub.names.found[next(iter(_kinds(hub)))].module
    return module.kv_heads * module.d_head


def _decode(tensors: Arrays, config: Mapping[str, Any], hub: Hub) -> Arrays:
    """Without the layers' copies, and where jpeft has no such network with what it computes.

    Raises:
      ValueError: a copy differs.
    """
    found = {key: value for key, value in tensors.items() if not _COPY.fullmatch(key)}
    for key, value in tensors.items():
        match = _COPY.fullmatch(key)
        if match is None:
            continue
        original = f"{hub.layout.base}prefix_tuning.{match[2]}"
        if not np.array_equal(found.get(original, value), value):
            raise ValueError(f"{key} differs from {original}, of which it is a copy")
        found.setdefault(original, value)
    if config.get("flat") or (len(_kinds(hub)) == 1 and _key_width(hub) == hub.width):
        return found
    for start in {key.removesuffix("wte.weight") for key in found if key.endswith(".wte.weight")}:
        if all(f"{start}{name}" in found for name in _NETWORK):
            found[f"{start}control_trans"] = _computed(*(found.pop(f"{start}{name}") for name in _NETWORK))
    return found


def _computed(embedding: np.ndarray, down: np.ndarray, down_bias: np.ndarray, up: np.ndarray, up_bias: np.ndarray):
    return (np.tanh(embedding @ down.T + down_bias) @ up.T + up_bias).reshape(-1)


PREFIX = HubCodec(
    ("prefix_tuning",),
    lambda config: config.get("architecture") == "prefix_tuning",
    _slots,
    _write,
    _read,
    decode=_decode,
)
