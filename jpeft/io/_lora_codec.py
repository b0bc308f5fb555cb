# SPDX-License-Identifier: Apache-2.0
"""LoRA in PEFT's files.

A `[d_in, rank]` is PEFT's lora_A.weight `[rank, d_in]`, B `[rank, d_out]` its lora_B.weight `[d_out, rank]`; of an
embedding they are lora_embedding_A `[rank, vocab]` and lora_embedding_B `[d_model, rank]`. Where the embedding is the
head as well, PEFT wants the same two tensors a second time, under the head's name and with the roles swapped.

PiSSA and OLoRA leave PEFT's base changed, and jpeft's not; so they are written as the plain LoRA of twice the rank that
does the same to the base as it is: A' = [A | A0], B' = [B ; -B0], s' = s.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import seams
from .._graft import base_type
from .._matching import pattern_value
from .._method import Adapter, Start
from ..methods import METHODS
from ._keys import check_keys
from ._module_codec import write_targets
from ._names import Names
from ._selection import number, read_pattern, read_places, write_pattern
from ._slots import Codec, Slot, host, layer_index, per_layer
from ._tokens_codec import read_beside

#: Keys that PEFT 0.21.2 writes, with the values of everything that jpeft's LoRA is not.
_PLAIN: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}

_READ = """
alpha_pattern bias ensure_weight_tying exclude_modules init_lora_weights layers_pattern layers_to_transform lora_alpha
lora_dropout modules_to_save r rank_pattern target_modules trainable_token_indices use_rslora
"""
#: What changes no result once the tensors are there, beside what changes none of any method.
_HARMLESS = """
corda_config eva_config fan_in_fan_out loftq_config lora_ga_config megatron_core merge_weights qalora_group_size
"""

#: Starts after which PEFT's base is not the base any more.
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _portable(adapter: Any) -> Adapter:
    if adapter.method.gate:
        raise ValueError(f"{adapter.site.path}: PEFT's files hold no gates, and without them a gated LoRA is another")
    return on_the_base(adapter)


def on_the_base(adapter: Any) -> Adapter:
    """The adapter as one of the unchanged base: a start taken from the kernel (PiSSA, OLoRA) in twice the rank."""
    if not hasattr(adapter, "A0"):
        return adapter
    method = adapter.method
    grow = math.sqrt(2) if method.rslora else 2
    plain = dataclasses.replace(
        method,
        init="default",
        rank=2 * method.rank,
        alpha=grow * method.alpha,
        rank_pattern={key: 2 * rank for key, rank in method.rank_pattern.items()},
        alpha_pattern={key: grow * alpha for key, alpha in method.alpha_pattern.items()},
    )
    site = adapter.site
    now = {name: host(getattr(adapter, name)[...], f"{site.path}/{name}") for name in ("A", "B", "A0", "B0")}
    most = 2 * now["A"].shape[-1]
    a, b = np.zeros((*site.lead, site.d_in, most)), np.zeros((*site.lead, most, site.d_out))
    for i, rank in enumerate(method.ranks(site)):
        at, old, new = layer_index(site.lead, i), slice(rank), slice(rank, 2 * rank)
        a[(*at, ..., old)], a[(*at, ..., new)] = now["A"][(*at, ..., old)], now["A0"][(*at, ..., old)]
        b[(*at, old)], b[(*at, new)] = now["B"][(*at, old)], -now["B0"][(*at, old)]
    start = Start({"A": jnp.asarray(a, jnp.float32), "B": jnp.asarray(b, jnp.float32)})
    saved = {name: leaf[...] for name, leaf in adapter.saved.items()}
    return Adapter(plain, adapter.site, start, saved, adapter.saved_layers)


def _slots(adapter: Any, module: Any, names: Names) -> list[Slot]:
    site, projection = adapter.site, seams.projection(module)
    if not isinstance(projection, seams.Matmul | seams.Lookup | seams.Convolution):
        raise ValueError(
            f"{site.path} is a {base_type(module).__name__}; PEFT's LoRA files are written of matrices, embeddings and "
            "convolutions"
        )
    ranks, plain = adapter.method.ranks(site), not isinstance(projection, seams.Lookup)

    def tensors(i: int) -> list[Slot]:
        a, b = (slice(None), slice(ranks[i])), (slice(ranks[i]),)
        if isinstance(projection, seams.Convolution):
            return _of_windows(adapter, module, a, b)
        keys = ("lora_A.weight", "lora_B.weight") if plain else ("lora_embedding_A", "lora_embedding_B")
        return [Slot(keys[0], adapter.A, a, (1, 0)), Slot(keys[1], adapter.B, b, (1, 0))]

    slots = per_layer(site, tensors)
    return slots + [slot for own in slots for slot in ([] if plain else _of_heads(own, names))]


def _of_windows(adapter: Any, module: Any, a: tuple[Any, ...], b: tuple[Any, ...]) -> list[Slot]:
    """The tensors of a convolution, as torch has them: A `[rank, in, *window]`, and B, whose window is of 1."""
    window = len(module.kernel_size)
    (rank,) = (s.stop for s in b)
    first = (*module.kernel_size, module.in_features, rank)
    last = (rank, module.out_features, *(1,) * window)
    outer = (window + 1, window, *range(window))
    return [
        Slot("lora_A.weight", adapter.A, a, outer, cut=first),
        Slot("lora_B.weight", adapter.B, b, (1, 0, *range(2, 2 + window)), cut=last),
    ]


def _of_heads(slot: Slot, names: Names) -> list[Slot]:
    """A tensor of an embedding once more, for every head that is tied to it, in the other role."""
    name, _, role = slot.key.rpartition(".lora_embedding_")
    other = {"A": "B", "B": "A"}[role]
    return [
        dataclasses.replace(slot, key=f"{head}.lora_{other}.weight", axes=None) for head in names.tied.get(name, ())
    ]


def _write(method: Any, adapters: Sequence[Adapter], names: Names) -> dict[str, Any]:
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    for site in (adapter.site for adapter in adapters if adapter.acts):
        for name, rank in zip(site.names, method.ranks(site), strict=True):
            if rank:
                same = (name, *names.tied.get(name, ()))
                ranks |= dict.fromkeys(same, rank)
                alphas |= dict.fromkeys(same, pattern_value(method.alpha_pattern, name, method.alpha))
    return {
        **_PLAIN,
        **write_targets(ranks, names),
        "r": method.rank,
        "lora_alpha": number(method.alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "bias": method.bias,
        "rank_pattern": write_pattern(method.rank_pattern, method.rank, ranks),
        "alpha_pattern": write_pattern(method.alpha_pattern, method.alpha, alphas),
    }


def _read(config: dict[str, Any], names: Names) -> Any:
    check_keys(config, "LoRA", (_READ + _HARMLESS).split())
    _check_start(config)
    places = read_places(config, names, names.projections, ensure=bool(config.get("ensure_weight_tying")))
    lora: Any = METHODS["lora"]
    return lora(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        targets=places.targets,
        dropout=config.get("lora_dropout") or 0.0,
        rslora=bool(config.get("use_rslora")),
        bias=config.get("bias", "none"),
        rank_pattern=read_pattern(config.get("rank_pattern"), places.adapted),
        alpha_pattern=read_pattern(config.get("alpha_pattern"), places.adapted),
        layers=places.layers,
        modules_to_save=places.modules_to_save,
        trainable_token_indices=read_beside(config, names),
    )


def _check_start(config: Mapping[str, Any]) -> None:
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_MUTATING):
        raise ValueError(
            f"init_lora_weights={config['init_lora_weights']!r}: PEFT changed the base when it started this adapter "
            "and did not save by how much, so on the base as it is the adapter means something else; save it in PEFT "
            "with save_pretrained(dir, path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
        )


LORA = Codec("lora", "LORA", _portable, _slots, _write, _read)
