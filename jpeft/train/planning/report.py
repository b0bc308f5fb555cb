# SPDX-License-Identifier: Apache-2.0
"""A plan in lines, and as plain values."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..sections.model import SEEING
from .advice import Change
from .compiling import Program
from .devices import GIB
from .estimate import Estimate, Memory
from .request import Request

_PARTS = {
    "weights": "base weights",
    "adapters": "trained leaves",
    "optimizer": "optimizer state",
    "fetched": "fetched state",
    "gradients": "gradients",
    "activations": "kept for backward",
    "working": "working memory",
}


def lines(found: Estimate, program: Program | None, advice: Sequence[Change] = ()) -> str:
    """What is asked, what it takes by shape and compiled, and what to change."""
    out = [_asked(found.request), "", *_memory(found, program), "", *_work(found)]
    if program is not None:
        out += _compiled(program)
    if advice:
        out += ["", "it does not fit; what each change would make of it:"]
        out += [f"  {_verdict(change.then):<14} {_gib(change.then.memory.total)}  {change.what}" for change in advice]
    return "\n".join(out)


def values(found: Estimate, program: Program | None, advice: Sequence[Change] = ()) -> dict[str, Any]:
    """The same for a program: bytes, FLOPs, seconds."""
    out: dict[str, Any] = {
        "request": _request(found.request),
        "by_shape": dataclasses.asdict(found.memory) | {"total": found.memory.total},
        "parameters": found.base,
        "trainable": found.trainable,
        "flops": found.flops,
        "flops_by_convention": found.convention,
        "seconds": found.seconds,
        "tokens_per_second": found.rate,
        "fits": found.fits,
    }
    if program is not None:
        figures = dataclasses.asdict(program) | {"total": program.total}
        out["compiled"] = {name: value for name, value in figures.items() if name != "text"}
    if advice:
        out["changes"] = [{"what": c.what, "total": c.then.memory.total, "fits": c.then.fits} for c in advice]
    return out


def _request(request: Request) -> dict[str, Any]:
    out = dataclasses.asdict(request) | {"machine": str(request.machine)}
    return {name: value for name, value in out.items() if name not in ("arrays", "sums", "labels", "dropout")}


def _asked(request: Request) -> str:
    base = request.dtype if request.quantize is None else f"{request.quantize} and {request.dtype}"
    method, rule = " and ".join(map(_named, request.parts)), request.optimizer
    rule = f", {rule.name}" + (" with its state in host memory" if rule.offload else "") + (", ema" * request.ema)
    rule = "" if rule == ", adamw" else rule
    times = "" if request.accumulation == 1 else f" x {request.accumulation}"
    rows = "images" if request.task in SEEING else "rows"
    return (
        f"{request.model} in {base}, {method}{rule}, remat {request.remat}\n"
        f"{request.batch} {rows}{times} of {request.seq} tokens on {request.machine}, mesh {request.axes}"
    )


def _named(method: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in method.items() if name != "kind")
    return method["kind"] + (f" ({options})" if options else "")


def _memory(found: Estimate, program: Program | None) -> list[str]:
    out = table(found.memory, found.request.machine.chip.memory, program)
    if found.memory.cache:
        out.append(f"{'cache, to generate':<20}{_gib(found.memory.cache)}   (beside weights, not beside a step)")
    return out


def table(memory: Memory, has: float | None, program: Program | None) -> list[str]:
    """The parts of a step's memory on one device, which has so much, by shape and compiled."""
    out = [f"{'a device':<20}{'by shape':>12}" + (f"{'compiled':>14}" if program else "")]
    parts = {said: getattr(memory, part) for part, said in _PARTS.items()}
    out += [f"{said:<20}{_gib(size)}" for said, size in parts.items() if size or said != _PARTS["fetched"]]
    total = f"{'total':<20}{_gib(memory.total)}"
    if program is not None:
        apart = 100 * (memory.total / program.total - 1)
        total += f"{_gib(program.total):>14}   ({apart:+.1f} %)"
    out.append(total)
    if has is not None:
        needed = memory.total if program is None else program.total
        room = f"{(has - needed) / GIB:.2f} GiB left" if needed <= has else f"{(needed - has) / GIB:.2f} GiB too much"
        out.append(f"{'it has':<20}{_gib(has)}   {room}")
    if memory.host:
        out.append(f"{'in host memory':<20}{_gib(memory.host)}" + (f"{_gib(program.host):>14}" if program else ""))
    return out


def _work(found: Estimate) -> list[str]:
    request = found.request
    share = 100 * found.trainable / found.base
    out = [
        f"trainable   {found.trainable:,} of {found.base:,} parameters ({share:.4f} %)",
        f"FLOPs       {found.flops / 1e12:,.2f} T a step in matrix products; {found.convention / 1e12:,.2f} T by the "
        f"convention of {'6' if request.full else '4'} N a token",
    ]
    chip = request.machine.chip
    if found.seconds is None or found.rate is None or chip.flops is None:
        return [*out, f"time        no figure: {chip.source}"]
    return [
        *out,
        f"time        {found.seconds:.3f} s a step, {found.rate:,.0f} tokens/s, if products reach "
        f"{request.share:.0%} of {chip.flops / 1e12:,.0f} TFLOP/s a device (communication not counted)",
        f"            {chip.source}",
    ]


def _compiled(program: Program) -> list[str]:
    if program.needed is not None:
        return ["compiled    refused by the compiler: the program needs more memory than there is"]
    out = [
        f"compiled    arguments {_gib(program.arguments).strip()}, temporary {_gib(program.temporary).strip()}, code "
        f"{_gib(program.code).strip()}; in {program.seconds:.1f} s"
    ]
    return out + exchanged(program)


def exchanged(program: Program) -> list[str]:
    """What the devices of a compiled step say to each other, and what of it goes between slices."""
    out = []
    if program.collectives:
        out.append(f"collectives {_listed(program.collectives)}; of a loop's body once")
    if program.over_dcn:
        out.append(f"over dcn    {_listed(program.over_dcn)}")
    return out


def _listed(kinds: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{count} {kind} ({size / 2**20:,.1f} MiB)" for kind, (count, size) in kinds.items())


def _verdict(found: Estimate) -> str:
    return {True: "fits", False: "does not fit", None: ""}[found.fits]


def _gib(size: float) -> str:
    return f"{size / GIB:>8.2f} GiB" if not 0 < size < GIB / 100 else f"{size / 2**20:>8.2f} MiB"
