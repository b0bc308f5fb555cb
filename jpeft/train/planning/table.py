# SPDX-License-Identifier: Apache-2.0
"""What fits of a model and a method on a machine: the most rows at each length."""

import math
from collections.abc import Sequence

from .estimate import memory
from .request import Request
from .subject import make_mesh, subject

#: Rows of a device beyond which nobody asks.
MOST_ROWS = 64


def most_rows(request: Request, lengths: Sequence[int]) -> dict[int, int]:
    """Length of a row -> how many rows, over all devices, fit by shape: a power of two on each device, or 0.

    The request's own batch and length are left aside. Beyond `MOST_ROWS` on a device nothing is tried.

    Raises:
      ValueError: nobody said how much memory the machine has.
    """
    ways = rows_at_least(request)
    return {length: ways * _most(request, ways, length) for length in lengths}


def rows_at_least(request: Request) -> int:
    """One row for each device along `data` and `fsdp`: the fewest that a request's mesh can take."""
    shape = make_mesh(request).shape
    return shape["data"] * shape["fsdp"]


def _most(request: Request, ways: int, length: int) -> int:
    """The largest power of two of rows a device that fits; memory grows with rows as a straight line."""

    def needs(rows: int) -> int:
        return memory(subject(request.but(batch=ways * rows, seq=length))).total

    has = request.machine.chip.memory
    if has is None:
        raise ValueError(f"nobody said how much memory {request.machine.chip.name} has, so anything fits")
    one, two = needs(1), needs(2)
    if one > has:
        return 0
    rows = min(MOST_ROWS, 2 ** int(math.log2(1 + (has - one) / (two - one))))
    while needs(rows) > has:
        rows //= 2
    return rows
