# SPDX-License-Identifier: Apache-2.0
"""LoHa in PEFT's files: hada_w1_a `[d_out, rank]` is B1 and hada_w1_b `[rank, d_in]` is A1, turned; so is hada_w2."""

from typing import Any

from ._module_codec import module_codec
from ._slots import Slot


def _tensors(adapter: Any, layer: int) -> list[Slot]:
    rank = slice(adapter.method.ranks(adapter.site).ranks[layer])
    return [
        slot
        for n in "12"
        for slot in (
            Slot(f"hada_w{n}_a", getattr(adapter, f"B{n}"), (rank,), (1, 0)),
            Slot(f"hada_w{n}_b", getattr(adapter, f"A{n}"), (slice(None), rank), (1, 0)),
        )
    ]


LOHA = module_codec(
    "loha",
    "LOHA",
    _tensors,
    {"rank": "r", "alpha": "alpha", "rank_dropout": "rank_dropout", "module_dropout": "module_dropout"},
    {"init_weights": True, "use_effective_conv2d": False},
    patterns=True,
)
