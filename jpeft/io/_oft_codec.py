# SPDX-License-Identifier: Apache-2.0
"""OFT in PEFT's files: oft_R.weight `[blocks, block_size (block_size - 1) / 2]`, one block with `block_share`.

PEFT's exact form (`use_cayley_neumann=False`) is the inverse of the paper's and of what its own series tends to, so
there the tensor is the negative of Q. Its series of 3 terms is that of 4. Before 0.18 the series was another, which is
refused.
"""

from collections.abc import Mapping
from typing import Any

from ._module_codec import module_codec
from ._slots import Slot


def _tensors(adapter: Any, layer: int) -> list[Slot]:
    return [Slot("oft_R.weight", adapter.Q, sign=-1 if adapter.method.neumann_terms is None else 1)]


def _write(method: Any) -> dict[str, Any]:
    return {
        "r": method.rank or 0,
        "oft_block_size": method.block_size or 0,
        "use_cayley_neumann": method.neumann_terms is not None,
        "num_cayley_neumann_terms": 5 if method.neumann_terms is None else method.neumann_terms,
    }


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "block_size": config.get("oft_block_size", 32) or None,
        "rank": config.get("r") or None,
        "neumann_terms": None,
    }
    if config.get("use_cayley_neumann", True):
        version = str(config.get("peft_version") or "0")
        if _numbers(version) < (0, 18):
            raise ValueError(
                f"peft_version is {version}, and before 0.18 PEFT's series (use_cayley_neumann) was another function "
                "of the same tensors; train the adapter again, in a newer PEFT or here"
            )
        terms = config.get("num_cayley_neumann_terms", 5)
        fields["neumann_terms"] = 4 if terms == 3 else terms
    return fields


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in version.split("@")[0].split(".")[:2] if part.isdigit())


OFT = module_codec(
    "oft",
    "OFT",
    _tensors,
    {"coft": "coft", "eps": "eps", "block_share": "block_share", "block_dropout": "module_dropout"},
    {"bias": "none", "fan_in_fan_out": False, "init_weights": True},
    write=_write,
    read=_read,
    reads="r oft_block_size use_cayley_neumann num_cayley_neumann_terms",
)
