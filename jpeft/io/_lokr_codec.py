# SPDX-License-Identifier: Apache-2.0
"""LoKr in PEFT's files: lokr_w1 `[l, m]` and lokr_w2 `[k, n]`, or their factors lokr_w1_a, lokr_w1_b, and so on.

lokr_w2_a `[k, rank]` is w2_out and lokr_w2_b `[rank, n]` is w2_in, turned.
"""

from collections.abc import Mapping
from typing import Any

from ._module_codec import module_codec
from ._slots import Slot

#: What PEFT calls the factors of a matrix.
_ENDS = {"_out": "_a", "_in": "_b"}


def _tensors(adapter: Any, layer: int) -> list[Slot]:
    rank = slice(adapter.method.ranks(adapter.site).ranks[layer])
    return [
        Slot(
            f"lokr_{name[:2]}{_ENDS.get(name[2:], '')}",
            getattr(adapter, name),
            tuple(rank if size is None else slice(None) for size in sizes),
            (1, 0),
        )
        for name, sizes in adapter.method.shapes(adapter.site).items()
    ]


def _write(method: Any) -> dict[str, Any]:
    return {"init_weights": "lycoris" if method.init == "lycoris" else True}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"init": "lycoris" if config.get("init_weights") == "lycoris" else "default"}


LOKR = module_codec(
    "lokr",
    "LOKR",
    _tensors,
    {
        "rank": "r",
        "alpha": "alpha",
        "rank_dropout": "rank_dropout",
        "rank_dropout_scale": "rank_dropout_scale",
        "module_dropout": "module_dropout",
        "decompose_both": "decompose_both",
        "decompose_factor": "decompose_factor",
    },
    {"use_effective_conv2d": False},
    patterns=True,
    write=_write,
    read=_read,
    reads="init_weights",
)
