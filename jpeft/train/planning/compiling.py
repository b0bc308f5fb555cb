# SPDX-License-Identifier: Apache-2.0
"""The step that `jpeft train` runs, compiled ahead of time for a machine that need not be there.

For a TPU the compiler is in the package `libtpu` (`pip install 'jpeft[tpu-plan]'`), which needs no TPU; for the CPU it
is this machine's own.
"""

import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..step import make_step
from .devices import GIB, Machine
from .exchange import collectives, over_dcn
from .exchange import said as said
from .request import Request
from .subject import Subject, slice_of, subject, sums

#: Settings of libtpu where there is no TPU: several processes may load it, it looks for no machine and keeps no log.
_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step; bytes are of one device.

    Attributes:
      arguments, outputs, aliased, temporary, code: as the compiler counts them; of outputs, `aliased` lie where
        arguments lay.
      host: bytes in the host's memory.
      collectives: how many of each kind the program's text holds (in a loop's body once), and their bytes.
      over_dcn: those of them, by the same count, in which devices of several slices take part.
      seconds: spent on compiling.
      needed: what the compiler asked for where it refused; the other figures are then 0.
      text: the optimised program, or "" where neither the compiler wrote it nor JAX can.
    """

    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporary: int = 0
    code: int = 0
    host: int = 0
    collectives: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    over_dcn: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
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
    found = subject(request, _devices(request.machine))
    step = make_step(found.graphdef, sums(request), found.tx, groups=found.ways, ema=0.9 if request.ema else None)
    key = jax.eval_shape(lambda: jax.random.key(0)) if request.dropout else None
    lowered = step.lower(found.state, found.frozen, found.batch, key)
    return program(lowered, found, effort=effort, read=read)


def program(lowered: jax.stages.Lowered, found: Subject, *, effort: str | None = None, read: bool = True) -> Program:
    """Compiles the step of `found`, which is lowered; the rest as of `compiled`."""
    start, slices = time.perf_counter(), _slices(found)
    apart = read and found.request.machine.chip.platform == "tpu"
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = _with_effort(lowered, effort, _dumped(folder) if apart else {})
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
            if needed is None:
                raise
            unit = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}[needed[2]]
            return Program(needed=int(float(needed[1]) * unit), seconds=time.perf_counter() - start)
        seconds, m = time.perf_counter() - start, made.memory_analysis()
        text = _text(made, Path(folder)) if read else ""
    return Program(
        m.argument_size_in_bytes,
        m.output_size_in_bytes,
        m.alias_size_in_bytes,
        m.temp_size_in_bytes,
        m.generated_code_size_in_bytes,
        m.host_argument_size_in_bytes + m.host_temp_size_in_bytes,
        collectives(text),
        over_dcn(text, slices),
        seconds,
        text=text,
    )


def _slices(found: Subject) -> list[int]:
    """The slice of every device, in the order in which a program numbers them."""
    return [slice_of(device, found.request) for device in np.asarray(found.mesh.devices).flat]


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
    return _topology(machine.topology, machine.slices)


def _topology(name: str, slices: int) -> Any:
    from jax.experimental import topologies

    for setting, value in _LIBTPU.items():
        os.environ.setdefault(setting, value)
    try:
        return topologies.get_topology_desc(name, platform="tpu", num_slices=slices).devices
    except (RuntimeError, ImportError) as error:
        raise ValueError(
            f"no compiler for {name}: {error}; it comes with libtpu, which needs no TPU: pip install 'jpeft[tpu-plan]' "
            "(or leave the compilation out: --no-compile)"
        ) from error


def _with_effort(lowered: Any, effort: str | None, options: dict[str, Any]) -> Any:
    if effort is None:
        return lowered.compile(compiler_options=options)
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", effort)
    try:
        return lowered.compile(compiler_options=options)
    finally:
        jax.config.update("jax_optimization_level", before)


def _dumped(folder: str) -> dict[str, Any]:
    """Has the compiler write a program's text itself: libtpu makes some that jaxlib of the same day cannot read."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def _text(program: Any, folder: Path) -> str:
    """The program's text, as the compiler wrote it into a folder or as JAX has it; "" where neither is there."""
    written = next(folder.glob("*after_optimizations.txt"), None)
    if written is not None:
        return written.read_text(encoding="utf-8", errors="replace")
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError:
        return ""
