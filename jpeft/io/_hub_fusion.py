# SPDX-License-Identifier: Apache-2.0
"""AdapterFusion in AdapterHub's files: query, key and value `[d_model, d_model]` of every place, and biases.

A fusion's name is those of its adapters, joined by commas. `adapter_setup.json` beside the folders of the adapters and
of the fusion says that they belong together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..methods import METHODS
from ._hub_codec import VERSION, Parts, check_plain, slot, with_defaults
from ._hub_layout import Hub
from ._slots import Slot, layer_index

_DEFAULTS: Mapping[str, Any] = {
    "dropout_prob": None,
    "key": True,
    "query": True,
    "query_before_ln": False,
    "regularization": True,
    "residual_before": False,
    "temperature": False,
    "value": True,
    "value_before_softmax": True,
    "value_initialized": True,
}
_PLAIN = {
    key: _DEFAULTS[key]
    for key in ("key", "query", "query_before_ln", "residual_before", "temperature", "value_before_softmax")
}


def slots(parts: Parts, hub: Hub) -> list[Slot]:
    """The tensors of a fusion, whose name in the library is `hub.name`."""
    found = []
    for adapter in parts.values():
        site: Any = adapter.site
        if site.seam != "residual" or not adapter.acts:
            continue
        for i, (join, acts) in enumerate(zip(hub.join_names(site), site.active, strict=True)):
            for name in ("query", "key", "value") if acts else ():
                at, key = layer_index(site.lead, i), f"{join}.adapter_fusion_layer.{hub.name}.{name}."
                if hasattr(adapter, name):
                    found.append(slot(f"{key}weight", getattr(adapter, name), at, (1, 0)))
                if hasattr(adapter, f"{name}_bias"):
                    found.append(slot(f"{key}bias", getattr(adapter, f"{name}_bias"), at))
    return found


def write(method: Any) -> dict[str, Any]:
    """The configuration of a fusion."""
    return {
        **_DEFAULTS,
        "dropout_prob": method.dropout or None,
        "regularization": method.dynamic and method.regularization > 0,
        "value": method.dynamic,
        "value_initialized": method.dynamic,
    }


def read(config: Mapping[str, Any], names: Sequence[str], layers: Sequence[int]) -> Any:
    """The method of a fusion of the adapters `names`, which act in these layers."""
    config = with_defaults(config, _DEFAULTS)
    check_plain(config, _PLAIN, "AdapterFusion")
    fusion: Any = METHODS["adapter_fusion"]
    return fusion(
        adapters=tuple(names),
        dynamic=bool(config["value"]),
        dropout=config["dropout_prob"] or 0.0,
        layers=layers,
        modules_to_save=(),
        **({} if config["regularization"] else {"regularization": 0.0}),
    )


def write_setup(names: Sequence[str]) -> dict[str, Any]:
    """adapter_setup.json."""
    children = [{"type": "single", "children": [name]} for name in names]
    return {"adapter_setup": {"type": "Fuse", "children": children}, "head_setup": None, "version": VERSION}


def read_setup(setup: Mapping[str, Any]) -> list[str]:
    """The names of the adapters that an adapter_setup.json fuses.

    Raises:
      ValueError: it is another setup than a fusion of single adapters, or names what is no folder in it.
    """
    found = setup.get("adapter_setup")
    children = found.get("children", []) if isinstance(found, dict) and found.get("type") == "Fuse" else []
    names = [_single(child) for child in children] if isinstance(children, list) else []
    if not names or None in names:
        raise ValueError(f"jpeft reads the setup of a fusion of single adapters, and this is {found!r:.300}")
    paths = [name for name in names if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name]
    if paths:
        raise ValueError(f"adapter_setup.json names {paths[0]!r:.100}, and the adapters of a setup are folders in it")
    return names


def _single(child: Any) -> Any:
    """The name in a setup's entry of one adapter; None where it is something else."""
    inner = child.get("children") if isinstance(child, dict) and child.get("type") == "single" else None
    return inner[0] if isinstance(inner, list) and len(inner) == 1 and isinstance(inner[0], str) else None


def check_parts(parts: Mapping[str, Any]) -> None:
    """Refuses a fusion that computes something else in the library.

    Args:
      parts: the methods of the fused adapters by their names.

    Raises:
      ValueError: it is one of parallel adapters.
    """
    odd = [name for name, method in parts.items() if method.PARALLEL]
    if odd:
        raise ValueError(
            f"{', '.join(odd)} are parallel adapters, under whose fusion the library adds the stream a second time: "
            "the fusion would be another"
        )
