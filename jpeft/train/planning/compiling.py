# SPDX-License-Identifier: Apache-2.0
"""The step that `jpeft train` runs, compiled ahead of time for a machine that need not be there.

For a TPU the compiler is in the package `libtpu` (`pip install 'jpeft[tpu-plan]'`), which needs no TPU; for the CPU it
is this machine's own.
"""

import dataclasses
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ..losses import SUMS
from ..step import make_step
from .devices import GIB, Machine
from .request import Request
from .subject import subject

#: Settings of libtpu where there is no TPU: several processes may load it, it looks for no machine and keeps no log.
_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
_COLLECTIVES = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
#: Bits of what is no number of 32 bits.
_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s64": 64,
    "f64": 64,
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step; bytes are of one device.

    Attributes:
      arguments, outputs, aliased, temporary, code: as the compiler counts them; of outputs, `aliased` lie where
        arguments lay.
      collectives: how many of each kind the program's text holds (in a loop's body once), and their bytes.
      seconds: spent on compiling.
      needed: what the compiler asked for where it refused; the other figures are then 0.
      text: the optimised program, or "" where the compiler's text cannot be read back.
    """

    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporary: int = 0
    code: int = 0
    collectives: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    needed: int | None = None
    text: str = dataclasses.field(default="", repr=False)

    @property
    def total(self) -> int:
        """The most that is in memory at once."""
        if self.needed is not None:
            return self.needed
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


def compiled(request: Request, *, effort: str | None = None, read: bool = True) -> Program:
    """Compiles a request's step for its machine.

    Args:
      request: what is asked.
      effort: `"O0"` compiles a stack of layers in seconds, and its memory is within -6 to +3 % of the full effort's;
        None is JAX's own setting.
      read: whether the program's text, and so its collectives, is wanted.

    Raises:
      ValueError: as `subject`; or the machine cannot be compiled for here.
    """
    start = time.perf_counter()
    found = subject(request, _devices(request.machine))
    lowered = make_step(found.graphdef, SUMS[request.task], found.tx, groups=found.ways).lower(
        found.state, found.frozen, found.batch, None
    )
    try:
        program = _with_effort(lowered, effort)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
        if needed is None:
            raise
        unit = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}[needed[2]]
        return Program(needed=int(float(needed[1]) * unit), seconds=time.perf_counter() - start)
    seconds, m, text = time.perf_counter() - start, program.memory_analysis(), _text(program) if read else ""
    return Program(
        m.argument_size_in_bytes,
        m.output_size_in_bytes,
        m.alias_size_in_bytes,
        m.temp_size_in_bytes,
        m.generated_code_size_in_bytes,
        collectives(text),
        seconds,
        text=text,
    )


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """What devices say to each other in a program: kind -> (how many operations, bytes that come out of them)."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for kind, arrays in said(text):
        count[kind] += 1
        size[kind] += sum(_size(dtype, dims) for dtype, dims in arrays)
    return {kind: (count[kind], size[kind]) for kind in sorted(count)}


def said(text: str) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """Every collective operation of a program: its kind, and type and shape of each array that comes out of it."""
    for shape, kind in re.findall(rf" = (.*?) ({_COLLECTIVES})(?:-start)?\(", text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
        yield kind, [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in arrays]


def _size(dtype: str, dims: tuple[int, ...]) -> int:
    return math.prod(dims) * (8 if dtype.startswith("f8") else _BITS.get(dtype, 32)) // 8


def _devices(machine: Machine) -> Any:
    """The devices to compile for."""
    if machine.chip.platform == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < machine.count:
            raise ValueError(
                f"{machine.count} CPU devices are asked for and JAX has {len(devices)}; set "
                f"JAX_NUM_CPU_DEVICES={machine.count}"
            )
        return devices[: machine.count]
    if machine.topology is None:
        raise ValueError(
            f"a step is compiled for TPUs (--topology) and for the CPU; for {machine.chip.name} there is the "
            "estimate by shape (--no-compile)"
        )
    return _topology(machine.topology)


def _topology(name: str) -> Any:
    from jax.experimental import topologies

    for setting, value in _LIBTPU.items():
        os.environ.setdefault(setting, value)
    try:
        return topologies.get_topology_desc(name, platform="tpu").devices
    except (RuntimeError, ImportError) as error:
        raise ValueError(
            f"no compiler for {name}: {error}; it comes with libtpu, which needs no TPU: pip install 'jpeft[tpu-plan]' "
            "(or leave the compilation out: --no-compile)"
        ) from error


def _with_effort(lowered: Any, effort: str | None) -> Any:
    if effort is None:
        return lowered.compile()
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", effort)
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_optimization_level", before)


def _text(program: Any) -> str:
    """The program's text; libtpu writes some programs in a form that jaxlib of the same day cannot read."""
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError:
        return ""
