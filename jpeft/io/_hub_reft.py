# SPDX-License-Identifier: Apache-2.0
"""ReFT in AdapterHub's files: learned_source `[rank, d_model]` and its bias, and projection `[rank, d_model]`.

LoReFT's projection is torch's parametrisation by Householder reflections, two tensors: base `[d_model, d_model]` and
original `[rank, d_model]`, whose product is R. It is written with the reflections of the identity, so that R is the
first rows of base, which the rest completes to an orthonormal matrix.

A configuration does not say that it is DiReFT's, so the library loads one as NoReFT. Written is the NoReFT that does
the same, whose W is W + R. Of two units of which one never acts the other one is read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._method import Adapter, Start
from ..methods import METHODS
from ..methods._orthonormal import orthonormal
from ._hub_codec import Arrays, HubCodec, Parts, check_plain, slot, with_defaults
from ._hub_layout import Hub
from ._slots import Slot, layer_index

_DEFAULTS: Mapping[str, Any] = {
    "architecture": "reft",
    "dropout": 0.05,
    "dtype": None,
    "init_weights_seed": None,
    "layers": "all",
    "non_linearity": None,
    "orthogonality": False,
    "output_reft": True,
    "prefix_positions": 3,
    "r": 1,
    "suffix_positions": 0,
    "tied_weights": False,
}
_BASE, _ORIGINAL = "projection.parametrizations.weight.0.base", "projection.parametrizations.weight.original"
_PLAIN = "projection.weight"


def _portable(adapter: Any, hub: Hub) -> Adapter:
    """LoReFT with an orthonormal R, and DiReFT as a NoReFT."""
    if not adapter.acts:
        return adapter
    method, leaves = adapter.method, {name: getattr(adapter, name)[...] for name in ("R", "W", "b")}
    if method.kind == "loreft":
        if method.rank >= hub.width:
            raise ValueError(f"the library parametrises an R of {method.rank} rows otherwise; lower the rank")
        leaves["R"] = orthonormal(leaves["R"])
    if method.kind == "direft":
        noreft: Any = METHODS["noreft"]
        method = noreft(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})
        leaves["W"] = leaves["W"] + leaves["R"]
    saved = {name: leaf[...] for name, leaf in adapter.saved.items()}
    return Adapter(method, adapter.site, Start(leaves), saved, adapter.saved_layers)


def _slots(parts: Parts, hub: Hub) -> list[Slot]:
    slots = []
    adapter: Any
    for adapter in parts.values():
        site = adapter.site
        if site.seam != "residual" or not adapter.acts:
            continue
        for i, (layer, acts) in enumerate(zip(hub.layer_names(site), site.active, strict=True)):
            for unit in range(adapter.method.units) if acts else ():
                at, key = (*layer_index(site.lead, i), unit), f"{layer}.reft_layer.refts.{hub.name}.units.{unit}."
                slots.append(slot(f"{key}learned_source.weight", adapter.W, at, (1, 0)))
                slots.append(slot(f"{key}learned_source.bias", adapter.b, at))
                slots.append(slot(f"{key}{_PLAIN}", adapter.R, at, (1, 0)))
    return slots


# Configuration ------------------------------------------------------------------------------------------------------


def _write(method: Any, parts: Parts, hub: Hub) -> dict[str, Any]:
    numbers = hub.acting(adapter for adapter in parts.values() if adapter.acts)
    return {
        **_DEFAULTS,
        "dropout": method.dropout,
        "layers": "all" if numbers == [*range(sum(hub.depths()))] else numbers,
        "orthogonality": method.kind == "loreft",
        "prefix_positions": method.first,
        "r": method.rank,
        "suffix_positions": method.last,
        "tied_weights": method.tied,
    }


def _read(config: Mapping[str, Any], hub: Hub, head: Any) -> Any:
    config = with_defaults(config, _DEFAULTS, also=("subtract_projection",))
    check_plain(config, {"non_linearity": None, "output_reft": True}, "ReFT")
    kind = "loreft" if config["orthogonality"] else "noreft"
    if config.get("subtract_projection") is False:
        check_plain(config, {"orthogonality": False}, "DiReFT")
        kind = "direft"
    method: Any = METHODS[kind]
    return method(
        rank=config["r"],
        first=config["prefix_positions"],
        last=config["suffix_positions"],
        tied=config["tied_weights"] or _has_one_end(config),
        dropout=config["dropout"],
        layers=None if config["layers"] == "all" else hub.own_layers(config["layers"], "layers"),
        modules_to_save=head,
    )


def _has_one_end(config: Mapping[str, Any]) -> bool:
    return not (config["prefix_positions"] and config["suffix_positions"])


# Tensors ------------------------------------------------------------------------------------------------------------


def _encode(tensors: Arrays, config: Mapping[str, Any]) -> Arrays:
    """An orthonormal R as torch parametrises it."""
    if not config["orthogonality"]:
        return tensors
    found = {}
    for key, value in tensors.items():
        if not key.endswith(_PLAIN):
            found[key] = value
            continue
        start, (rank, width) = key.removesuffix(_PLAIN), value.shape
        q, _ = np.linalg.qr(np.concatenate([value.T.astype(np.float64), np.eye(width)], 1))
        found[start + _BASE] = np.concatenate([value.T, q[:, rank:]], 1).astype(value.dtype)
        found[start + _ORIGINAL] = -np.eye(rank, width, dtype=value.dtype)
    return found


def _decode(tensors: Arrays, config: Mapping[str, Any], hub: Hub) -> Arrays:
    config = with_defaults(config, _DEFAULTS, also=("subtract_projection",))
    found = dict(tensors)
    for start in [key.removesuffix(_BASE) for key in tensors if key.endswith(_BASE)]:
        base, original = found[start + _BASE], found.get(start + _ORIGINAL)
        shape = (config["r"], hub.width)
        if original is not None and (original.shape, base.shape) == (shape, (hub.width, hub.width)):
            found[start + _PLAIN] = _orthonormal_rows(found.pop(start + _BASE), found.pop(start + _ORIGINAL))
    if not config["tied_weights"] and _has_one_end(config):
        kept, idle = (0, 1) if config["prefix_positions"] else (1, 0)
        found = {key: value for key, value in found.items() if f".units.{idle}." not in key}
        found = {key.replace(f".units.{kept}.", ".units.0."): value for key, value in found.items()}
    return found


def _orthonormal_rows(base: np.ndarray, original: np.ndarray) -> np.ndarray:
    """R of torch's parametrisation: base times the reflections in the columns of `original`, and their signs."""
    columns = original.T.astype(np.float64)
    width, rank = columns.shape
    q = np.eye(width, rank)
    for i in reversed(range(rank)):
        v = np.concatenate([np.zeros(i), [1.0], columns[i + 1 :, i]])
        q -= (2 / (v @ v)) * np.outer(v, v @ q)
    signs = np.trunc(np.diagonal(columns))
    return np.ascontiguousarray((base.astype(np.float64) @ (q * signs)).T.astype(np.float32))


REFT = HubCodec(
    ("loreft", "noreft", "direft"),
    lambda config: config.get("architecture") == "reft",
    _slots,
    _write,
    _read,
    portable=_portable,
    encode=_encode,
    decode=_decode,
)
