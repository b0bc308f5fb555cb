# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters and Compacter in AdapterHub's files.

down `[d_model, m]` is the library's adapter_down.0.weight `[m, d_model]`, up its adapter_up.weight; with a norm before,
the norm is adapter_down.0 and the matrix adapter_down.1, and the norm has a name of its own as well. Compacter's
factors are W_left and W_right as they are, and its rule stands once, among the model's shared parameters.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .._fields import Frozen
from ..methods import METHODS
from ._hub_codec import HubCodec, Parts, check_plain, slot, with_defaults
from ._hub_layout import Hub
from ._slots import Slot, layer_index

#: The library's `BnConfig`, with the values that most adapters have.
DEFAULTS: Mapping[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 16,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
#: Of these, what is one thing in jpeft.
_PLAIN = {
    key: DEFAULTS[key]
    for key in ("factorized_phm_W", "factorized_phm_rule", "phm_bias", "shared_W_phm", "shared_phm_rule",
                "stochastic_depth")
}  # fmt: skip
#: Options of both under one name.
_SAME = (
    "adapter_residual_before_ln dropout ln_after ln_before non_linearity original_ln_after original_ln_before "
    "residual_before_ln scaling"
).split()
_BLOCKS = {"mh_adapter": "attention", "output_adapter": "mlp", "cross_adapter": "cross_attention"}
_INITS = {"bert": "bert", "mam": "mam_adapter", "houlsby": "houlsby", "xavier": "bert"}


# Tensors ------------------------------------------------------------------------------------------------------------


def _slots(parts: Parts, hub: Hub) -> list[Slot]:
    slots = []
    adapter: Any
    for adapter in parts.values():
        site = adapter.site
        if site.seam == "residual" and adapter.acts:
            for i, (join, acts) in enumerate(zip(hub.join_names(site), site.active, strict=True)):
                if acts:
                    slots += _one(adapter, f"{join}.adapters.{hub.name}.", i)
        elif site.seam == "input" and adapter.acts:
            slots += _coupling(adapter, hub)
        elif site.seam == "model" and hasattr(adapter, "rule"):
            slots.append(slot(f"{hub.layout.base}shared_parameters.{hub.name}.phm_rule", adapter.rule, ()))
    return slots


def _one(adapter: Any, start: str, layer: int) -> Iterator[Slot]:
    """The tensors of one place in one layer."""
    method, site = adapter.method, adapter.site
    at, whole, used = layer_index(site.lead, layer), slice(None), slice(method.widths(site)[layer])
    down = f"{start}adapter_down.{int(method.ln_before)}."
    up = f"{start}adapter_up."
    if hasattr(adapter, "down_left"):
        for side, leaf in (("left", "down_left"), ("right", "down_right")):
            yield slot(f"{down}W_{side}", getattr(adapter, leaf), at)
            yield slot(f"{up}W_{side}", getattr(adapter, leaf.replace("down", "up")), at)
        yield slot(f"{down}b", adapter.down_bias, at)
        yield slot(f"{up}b", adapter.up_bias, at)
    else:
        yield slot(f"{down}weight", adapter.down, (*at, whole, used), (1, 0))
        yield slot(f"{down}bias", adapter.down_bias, (*at, used))
        yield slot(f"{up}weight", adapter.up, (*at, used, whole), (1, 0))
        yield slot(f"{up}bias", adapter.up_bias, at)
    if isinstance(method.scaling, str):
        yield slot(f"{start}scaling", adapter.scale, at)
    if method.gate:
        yield slot(f"{start}gate.weight", adapter.gate_weight, at, (1, 0))
        yield slot(f"{start}gate.bias", adapter.gate_bias, at)
    for name in ("adapter_norm_before.", "adapter_down.0.") if method.ln_before else ():
        yield slot(f"{start}{name}weight", adapter.before_scale, at)
        yield slot(f"{start}{name}bias", adapter.before_bias, at)
    if method.ln_after:
        yield slot(f"{start}adapter_norm_after.weight", adapter.after_scale, at)
        yield slot(f"{start}adapter_norm_after.bias", adapter.after_bias, at)


def _coupling(adapter: Any, hub: Hub) -> Iterator[Slot]:
    """Those of the invertible part."""
    for net in ("F", "G"):
        for number, leaf in ((0, f"{net}_down"), (2, f"{net}_up")):
            key = f"{hub.layout.base}invertible_adapters.{hub.name}.{net}.{number}."
            yield slot(f"{key}weight", getattr(adapter, leaf), (), (1, 0))
            yield slot(f"{key}bias", getattr(adapter, f"{leaf}_bias"), ())


# Configuration ------------------------------------------------------------------------------------------------------


def _write(method: Any, parts: Parts, hub: Hub) -> dict[str, Any]:
    _check_coupling(method.invertible, hub)
    blocks = {*method.blocks, *(("cross_attention",) if method.cross else ())}
    config = {
        **DEFAULTS,
        **{key: getattr(method, key) for key in _SAME},
        **{key: block in blocks for key, block in _BLOCKS.items()},
        "init_weights": _INITS[method.init],
        "inv_adapter": method.invertible,
        "inv_adapter_reduction_factor": method.invertible_reduction_factor if method.invertible else None,
        "is_parallel": method.PARALLEL,
        "leave_out": sorted({*range(sum(hub.depths()))} - {*hub.acting(parts.values())}),
        "reduction_factor": _write_factors(method.reduction_factor, hub),
        "use_gating": method.gate,
    }
    if not isinstance(method.scaling, str):
        config["scaling"] = float(method.scaling)  # the library takes no whole number
    if method.kind == "compacter":
        config |= {"phm_layer": True, "phm_dim": method.n, "phm_rank": method.rank, "phm_init_range": method.rule_std}
    return config


def _write_factors(factor: Any, hub: Hub) -> Any:
    """By the library's numbers of layers, which go on through the stacks."""
    if not isinstance(factor, Frozen):
        return factor
    found, first = {}, 0
    for depth in hub.depths():
        found |= {str(first + n): f for n, f in factor.items() if n != "default" and n < depth}
        first += depth
    return found | ({"default": factor["default"]} if "default" in factor else {})


def _read_factors(factor: Any, hub: Hub, acting: list[int]) -> Any:
    """By jpeft's, which start anew in every stack.

    Raises:
      ValueError: they differ between the stacks.
    """
    if not isinstance(factor, Mapping):
        return factor
    default = factor.get("default")
    starts = [sum(hub.depths()[:at]) for at in range(len(hub.depths()))]
    found: dict[Any, Any] = {}
    for n in acting:
        given = {factor.get(str(first + n), default) for first in starts}
        if None in given:
            raise ValueError(f"reduction_factor has no entry for layer {n} and no default")
        if len(given) > 1:
            raise ValueError(
                f"reduction_factor differs between layer {n} of the encoder and of the decoder, which no method of "
                "jpeft's does"
            )
        if str(n) in factor:
            found[n] = factor[str(n)]
    return found if default is None or len(found) == len(acting) else found | {"default": default}


def _read(config: Mapping[str, Any], hub: Hub, head: Any) -> Any:
    config = with_defaults(config, DEFAULTS)
    check_plain(config, _PLAIN, "bottleneck adapters")
    _check_coupling(config["inv_adapter"], hub)
    left_out = hub.own_layers(config["leave_out"] or (), "leave_out")
    blocks = [block for key, block in _BLOCKS.items() if config[key]]
    acting = [n for n in range(hub.depths()[0]) if n not in left_out]
    fields = {
        **{key: config[key] for key in _SAME},
        "blocks": [block for block in blocks if block != "cross_attention" or _has_cross(hub)],
        "gate": config["use_gating"],
        "invertible": config["inv_adapter"],
        "leave_out": left_out,
        "modules_to_save": head,
        "reduction_factor": _read_factors(config["reduction_factor"], hub, acting),
    }
    if config["inv_adapter"]:
        fields["invertible_reduction_factor"] = config["inv_adapter_reduction_factor"]
    if config["phm_layer"]:
        plus_plus = bool(config["original_ln_before"])
        products = {"n": config["phm_dim"], "rank": config["phm_rank"], "rule_std": config["phm_init_range"]}
        return _make("compacter", {**fields, **products, "plus_plus": plus_plus})
    fields["init"] = {there: own for own, there in _INITS.items() if own != "xavier"}[config["init_weights"]]
    if config["is_parallel"]:
        del fields["original_ln_before"], fields["residual_before_ln"]
        return _make("parallel_adapter", fields)
    return _make("pfeiffer" if config["original_ln_before"] else "houlsby", fields)


def _make(kind: str, fields: Mapping[str, Any]) -> Any:
    method: Any = METHODS[kind]
    return method(**fields)


def _has_cross(hub: Hub) -> bool:
    return "cross_prefix" in {name for stack in hub.layout.stacks for name in stack.prefixes.values()}


def _check_coupling(kind: str | None, hub: Hub) -> None:
    if kind and not hub.layout.coupled:
        raise ValueError(
            f"on a {hub.model.config.model_type} the library's invertible adapters act elsewhere than jpeft's, which "
            "change the token vectors of every stack before positions and norm: the adapter would be another"
        )


BOTTLENECK = HubCodec(
    ("houlsby", "pfeiffer", "parallel_adapter", "compacter"),
    lambda config: config.get("architecture") is None,
    _slots,
    _write,
    _read,
)
