# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA in PEFT's files: lora_A `[init_rank, d_in]`, lora_E `[init_rank, 1]`, lora_B `[d_out, init_rank]`.

Dropped triplets are written as they are, with an E of zero. PEFT cuts them out of what it saves, and says in
`rank_pattern` which; that is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .._method import Adapter
from ..methods import METHODS
from ._lora_codec import LORA
from ._module_codec import check_matrix
from ._names import Names
from ._slots import Codec, Slot, per_layer

#: PEFT's keys for the fields that LoRA does not have.
_KEYS: Mapping[str, str] = {
    "init_rank": "init_r",
    "target_rank": "target_r",
    "beta1": "beta1",
    "beta2": "beta2",
    "tinit": "tinit",
    "tfinal": "tfinal",
    "delta_t": "deltaT",
    "total_steps": "total_step",
    "orth_reg_weight": "orth_reg_weight",
}
#: Fields that LoRA has as well.
_SHARED = ("alpha", "targets", "dropout", "bias", "layers", "exclude", "modules_to_save")


def _slots(adapter: Any, module: Any, names: Names) -> list[Slot]:
    check_matrix(adapter, module, names, "AdaLoRA", in_out=True)
    return per_layer(
        adapter.site,
        lambda i: [
            Slot("lora_A", adapter.A, axes=(1, 0)),
            Slot("lora_B", adapter.B, axes=(1, 0)),
            Slot("lora_E", adapter.E, (slice(None), None)),
        ],
    )


def _write(method: Any, adapters: Sequence[Adapter], names: Names) -> dict[str, Any]:
    lora: Any = METHODS["lora"]
    shared = lora(rank=method.init_rank, **{field: getattr(method, field) for field in _SHARED})
    own = {key: getattr(method, field) for field, key in _KEYS.items()}
    return {**LORA.write(shared, adapters, names), **own, "r": 8, "rank_pattern": None}  # PEFT does not use r


def _read(config: dict[str, Any], names: Names) -> Any:
    if config.get("rank_pattern"):
        raise ValueError(
            "PEFT cut this adapter's tensors to its rank_pattern, which jpeft does not read; in PEFT, set the dropped "
            "entries of lora_E to zero and save with rank_pattern=None"
        )
    own = {field: config[key] for field, key in _KEYS.items() if key in config}
    rest = {key: value for key, value in config.items() if key not in (*_KEYS.values(), "rank_pattern")}
    shared = LORA.read({**rest, "r": own.get("init_rank", 12)}, names)
    return METHODS["adalora"](**{field: getattr(shared, field) for field in _SHARED}, **own)


ADALORA = Codec("adalora", "ADALORA", lambda adapter: adapter, _slots, _write, _read)
