# SPDX-License-Identifier: Apache-2.0
"""VeRA in PEFT's files: vera_lambda_d `[rank]` and vera_lambda_b `[d_out]` a module, and the projections once.

vera_A `[rank, d_in]` and vera_B `[d_out, rank]` stand behind "base_model." alone, and are always written. A file
without them (`save_projection=False`) is read as well: they follow from `projection_prng_key`, and are drawn here as in
PEFT.
"""

from collections.abc import Mapping
from typing import Any

from ._module_codec import module_codec
from ._slots import Slot

_ROOT = "base_model."


def _tensors(adapter: Any, layer: int) -> list[Slot]:
    return [Slot("vera_lambda_d", adapter.d), Slot("vera_lambda_b", adapter.b)]


def _shared(adapter: Any) -> list[Slot]:
    return [Slot(f"vera_{name}", getattr(adapter, name), axes=(1, 0), prefix=_ROOT) for name in "AB"]


def _left_out(config: Mapping[str, Any]) -> tuple[str, ...]:
    return () if config.get("save_projection", True) else (f"{_ROOT}vera_A", f"{_ROOT}vera_B")


VERA = module_codec(
    "vera",
    "VERA",
    _tensors,
    {"rank": "r", "dropout": "vera_dropout", "d_initial": "d_initial", "projection_key": "projection_prng_key"},
    {"bias": "none", "init_weights": True, "save_projection": True},
    in_out=True,
    excludes=False,
    shared=_shared,
    left_out=_left_out,
)
