# SPDX-License-Identifier: Apache-2.0
"""Chips: memory, peak rates, and where the figures are from; and machines of several of them, by name."""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it.

    Attributes:
      name: what it is called here.
      platform: `tpu`, `cuda` or `cpu`.
      memory: bytes that a program may use; None where the chip's name does not say.
      flops: products and sums a second of dense bfloat16 matrix products, at most; None likewise.
      bandwidth: bytes a second between chip and memory, at most; None likewise.
      source: where the figures are from.
    """

    name: str
    platform: str
    memory: float | None
    flops: float | None
    bandwidth: float | None
    source: str


_USABLE = "memory: what the compiler of libtpu 0.0.52 says a program may have"
_TPU = {
    # name: usable GiB a device, bfloat16 TFLOP/s a device, GB/s a device, page
    "v4": (30.75, 275, 1228, "cloud.google.com/tpu/docs/v4"),
    "v5e": (15.75, 197, 819, "cloud.google.com/tpu/docs/v5e"),
    "v5p": (95.73, 459, 2765, "cloud.google.com/tpu/docs/v5p"),
    "v6e": (31.24, 918, 1640, "cloud.google.com/tpu/docs/v6e"),
    "tpu7x": (94.74, 1153.5, 3690, "cloud.google.com/tpu/docs/tpu7x; two devices a chip"),
}
_GPU = {
    # name: memory GiB as CUDA reports it, dense bfloat16 TFLOP/s, GB/s, data sheet
    "a100-40gb": (39.4, 312, 1555, "NVIDIA A100 data sheet (SXM, 40 GB)"),
    "a100": (79.2, 312, 2039, "NVIDIA A100 data sheet (SXM, 80 GB)"),
    "h100": (79.1, 989.4, 3352, "NVIDIA H100 data sheet (SXM), without sparsity"),
    "h200": (139.8, 989.4, 4800, "NVIDIA H200 data sheet (SXM), without sparsity"),
    "b200": (178.4, 2250, 8000, "NVIDIA B200 data sheet, without sparsity"),
    "l4": (22.0, 121, 300, "NVIDIA L4 data sheet, without sparsity"),
    "rtx4090": (23.6, 165.2, 1008, "NVIDIA Ada architecture paper, float32 sums, without sparsity"),
}

#: Chips by name.
CHIPS: Mapping[str, Chip] = {
    **{n: Chip(n, "tpu", m * GIB, f * 1e12, b * 1e9, f"{s}; {_USABLE}") for n, (m, f, b, s) in _TPU.items()},
    **{n: Chip(n, "cuda", m * GIB, f * 1e12, b * 1e9, s) for n, (m, f, b, s) in _GPU.items()},
    "cpu": Chip("cpu", "cpu", None, None, None, "this machine; its name says nothing of its rates"),
}

#: The grid of a slice by its number of devices.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
_GRIDS: Mapping[str, Mapping[int, str]] = {"v5e": _FLAT, "v6e": _FLAT, "v4": _CUBES, "v5p": _CUBES}
#: Families whose slices are named by TensorCores, two of a device.
_BY_CORES = ("v4", "v5p")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that train together.

    Attributes:
      chip: each of them.
      count: how many.
      topology: libtpu's name of the slice, such as `v5e:2x4`; None for a GPU or a CPU.
      slices: how many slices of a pod, or hosts, a slower network joins, each with the same share of the devices.
    """

    chip: Chip
    count: int
    topology: str | None = None
    slices: int = 1

    def __post_init__(self) -> None:
        if self.slices < 1 or self.count % self.slices:
            raise ValueError(f"{self.count} devices do not make up {self.slices} slices of the same size")

    def __str__(self) -> str:
        apart = f"{self.slices} slices of " if self.slices > 1 else ""
        what = f"{apart}{self.topology or f'{self.count // self.slices}'}"
        return f"{self.count} x {self.chip.name}" + (f" ({what})" if self.topology or apart else "")


def topology(name: str) -> Machine:
    """A slice of a TPU pod: `v5e:2x4` by its grid, or `v5e-8` as Google names it.

    A name of Google's counts devices on v5e and v6e, and TensorCores, two of a device, on v4 and v5p.

    Raises:
      ValueError: no such family, or no such slice of it.
    """
    family, grid = _split(name)
    if family not in _TPU:
        near = difflib.get_close_matches(family, _TPU, 1) or [", ".join(_TPU)]
        raise ValueError(f"unknown TPU {family!r} in {name!r}; did you mean {near[0]}? A topology is such as v5e:2x4")
    if isinstance(grid, int):
        slices = _GRIDS.get(family, {})
        count = grid // 2 if family in _BY_CORES else grid
        found = slices.get(count)
        if found is None or (family in _BY_CORES and grid % 2):
            sizes = ", ".join(f"{family}-{n * (2 if family in _BY_CORES else 1)}" for n in slices)
            raise ValueError(f"there is no slice {name}; there are {sizes or f'{family}:2x2x1 and its like'}")
        grid = found
    sides = [int(side) for side in grid.split("x")]
    dims = 2 if family in ("v5e", "v6e") else 3
    if len(sides) != dims or not all(sides):
        raise ValueError(
            f"a slice of {family} is a grid of {dims} sides, as {family}:{'x'.join('2' * dims)}; got {name!r}"
        )
    return Machine(CHIPS[family], math.prod(sides) * (2 if family == "tpu7x" else 1), f"{family}:{grid}")


def machine(name: str, count: int) -> Machine:
    """`count` devices of a kind.

    Raises:
      ValueError: an unknown kind, or fewer than one device.
    """
    if name not in CHIPS:
        near = difflib.get_close_matches(name.lower(), CHIPS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the devices are {', '.join(CHIPS)}"
        raise ValueError(f"unknown device {name!r}; {hint}")
    if count < 1:
        raise ValueError(f"a machine has 1 device or more, got {count}")
    return Machine(CHIPS[name], count)


def _split(name: str) -> tuple[str, str | int]:
    """Family and grid, or family and Google's number."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    if found:
        return found[1], found[2]
    found = re.fullmatch(r"(\w+)-(\d+)", name)
    if found:
        return found[1], int(found[2])
    raise ValueError(f"a topology is a family and a grid, as v5e:2x4, or a slice's name, as v5e-8; got {name!r}")
