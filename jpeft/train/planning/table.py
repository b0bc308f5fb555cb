# SPDX-License-Identifier: Apache-2.0
"""What fits of a model and a method on a machine: the largest batch at each length, and one of them compiled."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from .compiling import Program, compiled
from .devices import GIB
from .estimate import memory
from .request import Request
from .subject import make_mesh, subject

#: Rows of a device beyond which nobody asks.
MOST_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Cell:
    """What fits.

    Attributes:
      request: what was compiled: the most rows at its length, by shape, then halved until the compiler agreed.
      rows: length -> rows of a device by shape; 0 where not even one fits.
      by_shape: bytes on a device of `request`'s step.
      program: the compiled step; None where it was not compiled.
    """

    request: Request
    rows: dict[int, int]
    by_shape: int
    program: Program | None


def cell(request: Request, lengths: Sequence[int], at: int, effort: str | None = "O0", compiling: bool = True) -> Cell:
    """What of a request fits; its batch and length are left aside.

    Args:
      request: model, method, machine and mesh.
      lengths: of a row.
      at: the length of which the largest batch is compiled, or one row where none fits.
      effort, compiling: of the compiler, and whether it is asked.
    """
    ways = _ways(request)
    rows = {length: _most(request, ways, length) for length in lengths}
    asked = request.but(batch=ways * max(1, rows[at]), seq=at)
    program = None
    for chosen in _halved(asked, ways) if compiling else ():
        asked, program = chosen, compiled(chosen, effort=effort, read=False)
        if program.needed is None:
            break
    return Cell(asked, rows, memory(subject(asked)).total, program)


def line(found: Cell) -> str:
    """The cell as a row of a Markdown table, without its first columns."""
    request, program = found.request, found.program
    rows = " | ".join(str(n * _ways(request)) if n else "–" for n in found.rows.values())
    asked = f"{request.batch} x {request.seq}"
    if program is None:
        return f"{rows} | {asked} | {found.by_shape / GIB:.2f} | not compiled |"
    said = f"{program.total / GIB:.2f}" + ("" if program.needed is None else ", refused")
    return f"{rows} | {asked} | {found.by_shape / GIB:.2f} | {said} |"


def _ways(request: Request) -> int:
    shape = make_mesh(request).shape
    return shape["data"] * shape["fsdp"]


def _most(request: Request, ways: int, length: int) -> int:
    """The largest power of two of rows a device that fits by shape; memory grows with rows as a straight line."""

    def needs(rows: int) -> int:
        return memory(subject(request.but(batch=ways * rows, seq=length))).total

    has = request.machine.chip.memory
    assert has is not None
    one, two = needs(1), needs(2)
    if one > has:
        return 0
    rows = min(MOST_ROWS, 2 ** int(math.log2(1 + (has - one) / (two - one))))
    while needs(rows) > has:
        rows //= 2
    return rows


def _halved(request: Request, ways: int) -> Iterator[Request]:
    """The request, then with half its rows, down to one of a device."""
    batch = request.batch
    while batch >= ways:
        yield request.but(batch=batch)
        batch //= 2
