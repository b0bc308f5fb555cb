# SPDX-License-Identifier: Apache-2.0
"""What devices say to each other in a compiled program, read off its text: the kinds, the bytes, and who takes part."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

#: Type and shape of each array that comes out of an operation.
Arrays = list[tuple[str, tuple[int, ...]]]

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


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """What devices say to each other in a program: kind -> (how many operations, bytes that come out of them)."""
    return _counted(said(text))


def over_dcn(text: str, slices: Sequence[int]) -> dict[str, tuple[int, int]]:
    """The same of those operations in which devices of several slices take part, by the slice of every device.

    The compiler for TPUs makes two of such an operation: one within each slice, which `collectives` counts, and a
    transfer between hosts (a `recv` of the runtime named Megascale), which is counted here.
    """
    across = (
        (kind, arrays)
        for kind, arrays, rest in _operations(text, _COLLECTIVES)
        if any(len({slices[device] for device in group}) > 1 for group in groups(rest, len(slices)))
    )
    sent = (
        (kind[1].lower().replace("_", "-"), arrays[:1])
        for _, arrays, rest in _operations(text, "recv")
        if (kind := re.search(r'_xla_megascale_transfer_type="(\w+)"', rest))
    )
    return _counted([*across, *sent])


def said(text: str) -> Iterator[tuple[str, Arrays]]:
    """Every collective operation of a program: its kind, and type and shape of each array that comes out of it."""
    return ((kind, arrays) for kind, arrays, _ in _operations(text, _COLLECTIVES))


def groups(rest: str, num_devices: int) -> list[list[int]]:
    """The devices that speak with each other in an operation, by number, from what its line says after its name.

    XLA writes them out (`{{0,1},{2,3}}`), as a grid turned (`[2,4]<=[4,2]T(1,0)`), or as axes of a mesh
    (`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}`, an axis perhaps in part: `'a':(2)2`, 2 of it after 2).
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", rest)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    grid = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if grid:
        return _numbered(grid[2]).reshape(_numbers(grid[1])).tolist()
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\]\S*?)\))? \{(.*?)\}", rest)
    if mesh:
        return _along(mesh[1], mesh[2], mesh[3])
    return [list(range(num_devices))]  # all of them, where no groups stand


def _along(mesh: str, numbers: str | None, axes: str) -> list[list[int]]:
    """The groups along axes of a mesh whose axes are first cut into the parts that are named."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    named = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    shape, chosen = [], []
    for name, size in sizes.items():
        cuts = {1, size}
        spans = [
            (int(before), int(before) * int(n)) if before else (1, size) for axis, before, n in named if axis == name
        ]
        cuts |= {edge for span in spans for edge in span}
        edges = sorted(cuts)
        for first, last in itertools.pairwise(edges):
            if any(begin <= first and last <= end for begin, end in spans):
                chosen.append(len(shape))
            shape.append(last // first)
    count = math.prod(shape)
    ids = (np.arange(count) if numbers is None else _numbered(numbers)).reshape(shape)
    rest = [axis for axis in range(len(shape)) if axis not in chosen]
    return ids.transpose(rest + chosen).reshape(-1, math.prod(shape[axis] for axis in chosen)).tolist()


def _numbered(grid: str) -> np.ndarray:
    """`[2,4]T(1,0)`: numbers counted through a grid, whose axes are then turned."""
    shape, _, order = grid.partition("]")
    sides = _numbers(shape.strip("["))
    ids = np.arange(math.prod(sides)).reshape(sides)
    return ids.transpose(_numbers(order[2:-1])) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _operations(text: str, kinds: str) -> Iterator[tuple[str, Arrays, str]]:
    """Of every operation its kind, what comes out of it, and what its line says after that."""
    for shape, kind, rest in re.findall(rf" = (.*?) ({kinds})(?:-start)?\((.*)", text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
        yield kind, [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in arrays], rest


def _counted(operations: Iterable[tuple[str, Arrays]]) -> dict[str, tuple[int, int]]:
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for kind, arrays in operations:
        count[kind] += 1
        size[kind] += sum(_size(dtype, dims) for dtype, dims in arrays)
    return {kind: (count[kind], size[kind]) for kind in sorted(count)}


def _size(dtype: str, dims: tuple[int, ...]) -> int:
    return math.prod(dims) * (8 if dtype.startswith("f8") else _BITS.get(dtype, 32)) // 8
