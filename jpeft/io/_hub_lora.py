# SPDX-License-Identifier: Apache-2.0
"""LoRA and (IA)³ in AdapterHub's files: lora_A `[rank, d_in]` and lora_B `[d_out, rank]`; of IA3 lora_B `[d_out, 1]`.

The library adapts queries, keys and values (`attn_matrices`) and the two matrices of the feed-forward block
(`intermediate_lora`, `output_lora`) of all layers but some; on Llama and Mistral it calls `down_proj` the first of them
and `up_proj` the second. Its IA3 scales what leaves a matrix, and never what goes in. A LoRA with a gate has
gate.weight `[1, d_in]` and gate.bias `[1]`, and no factor: the library leaves alpha / r out, so here it goes into B.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .. import seams
from .._method import Adapter, Start
from ..methods import METHODS
from ._hub_codec import HubCodec, Parts, check_plain, slot, with_defaults
from ._hub_layout import Hub
from ._lora_codec import on_the_base
from ._selection import adapted_names, number
from ._slots import Slot, layer_index

_DEFAULTS: Mapping[str, Any] = {
    "alpha": 8,
    "architecture": "lora",
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "dropout": 0.0,
    "dtype": None,
    "init_weights": "lora",
    "init_weights_seed": None,
    "intermediate_lora": False,
    "leave_out": [],
    "output_lora": False,
    "r": 8,
    "selfattn_lora": True,
    "use_dora": False,
    "use_gating": False,
    "vera_b": None,
    "vera_d": None,
}
_PLAIN = {key: _DEFAULTS[key] for key in ("use_dora", "vera_b", "vera_d")}


def _portable(adapter: Any, hub: Hub) -> Adapter:
    if adapter.method.kind != "lora":
        return adapter
    plain = on_the_base(adapter)
    return _without_factor(plain, adapter) if adapter.method.gate and adapter.acts else plain


def _without_factor(plain: Any, gated: Any) -> Adapter:
    """`plain` with its factor in B, and the gate of `gated`."""
    method, site = plain.method, plain.site
    factors = method.table(site)[:, 0].reshape(*site.lead, 1, 1)
    leaves = {"A": plain.A[...], "B": plain.B[...] * factors}
    leaves |= {name: getattr(gated, name)[...] for name in ("gate_weight", "gate_bias")}
    method = dataclasses.replace(method, alpha=method.rank, alpha_pattern={}, rslora=False)
    saved = {name: leaf[...] for name, leaf in plain.saved.items()}
    return Adapter(method, site, Start(leaves), saved, plain.saved_layers)


def _slots(parts: Parts, hub: Hub) -> list[Slot]:
    slots = []
    for path, adapter in parts.items():
        site: Any = adapter.site
        if not adapter.acts:
            continue
        if not isinstance(seams.projection(hub.names.found[path].module), seams.Matmul):
            raise ValueError(f"{path} is no matrix, and the library's LoRA is of matrices alone")
        for i, (name, acts) in enumerate(zip(site.names, site.active, strict=True)):
            if acts:
                start = f"{hub.whole_name(name)}.loras.{hub.name}."
                slots += _one(adapter, start, layer_index(site.lead, i), i)
    return slots


def _one(adapter: Any, start: str, at: tuple[int, ...], layer: int) -> list[Slot]:
    """The tensors of one matrix."""
    if adapter.method.kind == "ia3":
        return [slot(f"{start}lora_B", adapter.scale, (*at, slice(None), None))]
    used = slice(adapter.method.ranks(adapter.site)[layer])
    slots = [
        slot(f"{start}lora_A", adapter.A, (*at, slice(None), used), (1, 0)),
        slot(f"{start}lora_B", adapter.B, (*at, used), (1, 0)),
    ]
    if adapter.method.gate:
        slots.append(slot(f"{start}gate.weight", adapter.gate_weight, at, (1, 0)))
        slots.append(slot(f"{start}gate.bias", adapter.gate_bias, at))
    return slots


# Configuration ------------------------------------------------------------------------------------------------------


def _write(method: Any, parts: Parts, hub: Hub) -> dict[str, Any]:
    acting = [adapter for adapter in parts.values() if adapter.acts]
    where = _where(adapted_names(acting), hub, whole=method.kind == "ia3")
    if method.kind == "ia3":
        inward = [adapter.site.path for adapter in acting if method.on_the_way_in(adapter.site)]
        if inward:
            raise ValueError(
                f"the adapter scales what goes into {', '.join(inward)}, and the library's IA3 what comes out of a "
                "matrix; adapt with placement='adapterhub'"
            )
        return {**_DEFAULTS, **where, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3", "r": 1}
    if method.bias != "none":
        raise ValueError(f"the library's LoRA trains no biases, and the adapter has bias={method.bias!r}")
    ranks = {rank for adapter in acting for rank in method.ranks(adapter.site) if rank}
    factors = {method.alpha, *method.alpha_pattern.values()}
    if len(ranks) > 1 or len(factors) > 1:
        raise ValueError(
            f"the library's LoRA has one rank and one alpha, and the adapter has the ranks {sorted(ranks)} and the "
            f"alphas {sorted(factors)}; jpeft.as_lora brings an adapter to one rank"
        )
    (rank,) = ranks
    alpha = rank if method.gate else method.alpha * math.sqrt(rank) if method.rslora else method.alpha
    changes = {"alpha": number(alpha), "dropout": method.dropout, "r": rank, "use_gating": method.gate}
    return {**_DEFAULTS, **where, **changes}


def _where(adapted: list[str], hub: Hub, whole: bool) -> dict[str, Any]:
    """The keys that say which matrices of which layers are adapted.

    Raises:
      ValueError: the library cannot say it.
    """
    parts = [part for part in hub.layout.matrices if {*hub.matrices([part])} & {*adapted}]
    left_out = [n for n in range(sum(hub.depths())) if not {*hub.of_layer(n)} & {*adapted}]
    meant = {*hub.matrices(parts, left_out)}
    if meant != {*adapted}:
        odd = sorted(meant ^ {*adapted})
        raise ValueError(
            f"the library adapts all of {', '.join(hub.layout.matrices)} in a layer or none of that sort, and no other "
            f"matrix; {odd[0]}{f' and {len(odd) - 1} more' if len(odd) > 1 else ''} would be "
            f"{'added' if odd[0] in meant else 'left out'}"
        )
    if "qkv" in parts and not whole:
        raise ValueError("the library's LoRA of a joint matrix of queries, keys and values is three, each of its own")
    attention = [part for part in parts if part in ("q", "k", "v")] or (["q", "k", "v"] if "qkv" in parts else [])
    return {
        "attn_matrices": attention or _DEFAULTS["attn_matrices"],
        "intermediate_lora": "intermediate" in parts,
        "leave_out": left_out,
        "output_lora": "output" in parts,
        "selfattn_lora": bool(attention),
    }


def _read(config: Mapping[str, Any], hub: Hub, head: Any) -> Any:
    config = with_defaults(config, _DEFAULTS)
    check_plain(config, _PLAIN, "LoRA")
    scaled = config["composition_mode"] == "scale"
    attention = list(config["attn_matrices"]) if config["selfattn_lora"] else []
    if attention and "qkv" in hub.layout.matrices:
        if not scaled or {*attention} != {"q", "k", "v"}:
            raise ValueError(
                f"attn_matrices={attention} on a {hub.model.config.model_type}: its queries, keys and values come out "
                "of one matrix, on which jpeft's LoRA is one, and the library's one for each"
            )
        attention = ["qkv"]
    parts = attention + [part for part in ("intermediate", "output") if config[f"{part}_lora"]]
    targets = hub.matrices(parts, config["leave_out"] or ())
    if scaled:
        check_plain(config, {"r": 1, "dropout": 0.0, "use_gating": False}, "IA3")
        ia3: Any = METHODS["ia3"]
        return ia3(targets=targets, feedforward=(), modules_to_save=head)
    lora: Any = METHODS["lora"]
    return lora(
        rank=config["r"],
        alpha=config["r"] if config["use_gating"] else config["alpha"],
        targets=targets,
        dropout=config["dropout"],
        gate=bool(config["use_gating"]),
        modules_to_save=head,
    )


LORA = HubCodec(
    ("lora", "ia3"), lambda config: config.get("architecture") == "lora", _slots, _write, _read, portable=_portable
)
