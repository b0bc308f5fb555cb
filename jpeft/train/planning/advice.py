# SPDX-License-Identifier: Apache-2.0
"""What to change where a step does not fit: each change alone, then all of them, with the memory that it leads to."""

import dataclasses
from collections.abc import Iterator

from .devices import Machine
from .estimate import Estimate, estimate
from .request import Request
from .subject import make_mesh

#: What a layer keeps, from most to least.
_REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Change:
    """A way to make a step smaller: what is changed, and the step then."""

    what: str
    then: Estimate


def changes(request: Request) -> list[Change]:
    """The changes that a request leaves open, those that fit first, and of these the fastest first.

    One is alone; where none of them does, several are tried together.
    """
    alone = [Change(what, estimate(other)) for what, other in _alone(request)]
    if not any(change.then.fits for change in alone):
        alone += [Change(what, estimate(other)) for what, other in _together(request)]
    return sorted(alone, key=lambda change: (not change.then.fits, -_rate(change.then)))


def _more(request: Request, count: int) -> Machine:
    """So many of the request's devices, in as many slices."""
    return Machine(request.machine.chip, count, slices=request.machine.slices)


def _rate(found: Estimate) -> float:
    """Tokens a second and device."""
    return (found.rate or 0.0) / found.request.machine.count


def _alone(request: Request) -> Iterator[tuple[str, Request]]:
    if request.remat in _REMAT:
        for policy in _REMAT[_REMAT.index(request.remat) + 1 :]:
            yield f"--remat {policy}", request.but(remat=policy)
    rows = make_mesh(request).shape["data"] * make_mesh(request).shape["fsdp"]
    if request.batch % (2 * rows) == 0:
        smaller = request.but(batch=request.batch // 2, accumulation=2 * request.accumulation)
        yield f"--batch {smaller.batch} --accumulation {smaller.accumulation}", smaller
    if request.dtype == "float32":
        yield "--dtype bfloat16", request.but(dtype="bfloat16")
    if request.quantize is None and not request.full:
        yield "--quantize nf4", request.but(quantize="nf4")
    count = 2 * request.machine.count
    more = request.but(machine=_more(request, count), mesh=None, batch=max(request.batch, count))
    if more.batch % count == 0:
        yield f"{count} devices, --mesh fsdp={count}, --batch {more.batch}", more


def _together(request: Request) -> Iterator[tuple[str, Request]]:
    """Everything that needs no other machine, and then more devices, until it is enough."""
    rows = make_mesh(request).shape["data"] * make_mesh(request).shape["fsdp"]
    least = request.but(remat="full", batch=rows, accumulation=max(1, request.batch // rows) * request.accumulation)
    said = f"--remat full --batch {rows} --accumulation {least.accumulation}"
    yield said, least
    if request.quantize is None and not request.full:
        yield f"{said} --quantize nf4", least.but(quantize="nf4")
    count = request.machine.count
    for _ in range(6):
        count *= 2
        more = least.but(machine=_more(request, count), mesh=None, batch=count, accumulation=1)
        yield f"{count} devices, --mesh fsdp={count} --remat full --batch {count}", more
        if estimate(more).fits:
            return
