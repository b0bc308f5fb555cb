# SPDX-License-Identifier: Apache-2.0
"""The safetensors file format: 8 bytes of header length, a JSON header, then the tensors' bytes.

Read by `pread`, a block of rows at a time, and written as a stream, so that neither needs a second copy of the model;
the `safetensors` package's NumPy side has no bfloat16, and its memory maps count as used memory.
"""

import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ._files import MOST_BYTES, CheckpointError, names, parse_json

#: Safetensors' words for the dtypes that a weight may have.
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}

_WIDENED = FLOATS["BF16"], FLOATS["F32"]

#: Bits of the other dtypes' elements, for a check of where their tensors lie; weights are of none of them.
_BITS = {word: 8 * dtype.itemsize for word, dtype in FLOATS.items()} | {
    word: bits
    for bits, words in (
        (64, "I64 U64 C64"),
        (32, "I32 U32"),
        (16, "I16 U16"),
        (8, "BOOL I8 U8 F8_E5M2 F8_E4M3 F8_E8M0"),
    )
    for word in words.split()
}
#: The dtypes of codes.
_CODES = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}
#: Safetensors' word for a dtype.
WORDS = {dtype: word for word, dtype in (FLOATS | _CODES).items()}
#: What is read at a time: it stays in a core's cache while it is checked, converted and turned.
_BLOCK_BYTES = 2**20
#: Blocks that are read one after another, in one thread.
_BLOCKS = 16
#: Bytes of a cache line, at the first of which a CPU device wants its buffers to start.
_ALIGNMENT = 64


class Tensor(NamedTuple):
    """Where one tensor lies: its file, its name there, its dtype in safetensors' words, its shape and first byte."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Source(NamedTuple):
    """A tensor to be written: its shape and dtype now, its values when `fetch` is called."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]


def header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name; nothing but the header is read.

    Raises:
      CheckpointError: the file is cut short, too long, or not a safetensors file; or its tensors overlap, leave gaps,
        or are not as large as their shapes say.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file} is no safetensors file, or is cut short: {size} bytes")
        if length > MOST_BYTES:
            raise CheckpointError(f"{file} is no safetensors file: its header cannot be read, it has {length:,} bytes")
        text = stream.read(length)
    try:
        entries = parse_json(text, "it")
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(file, 8 + length, name, entry) for name, entry in entries.items()}
    except _HeaderError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{file} is no safetensors file: its header cannot be read ({error})") from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != end:
            raise CheckpointError(
                f"{file}: {names([tensor.name])} lies at byte {tensor.start}, and the tensors before it end at {end}"
            )
        end = tensor.stop
    if end != size:
        raise CheckpointError(f"{file} should have {end} bytes by its own header, has {size}: copy it again")
    return tensors


class _HeaderError(CheckpointError):
    """An entry of a header that contradicts itself."""


def _tensor(file: Path, begin: int, name: str, entry: Any) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if all(
            type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)
        ):
            nbytes = stop - start
            if nbytes < 0 or (dtype in _BITS and nbytes != math.prod(shape) * _BITS[dtype] // 8):
                raise _HeaderError(f"{names([name])} says {dtype} {shape} but lies at bytes {start} to {stop}")
            return Tensor(file, name, dtype, tuple(shape), begin + start, begin + stop)
    raise CheckpointError(f"{names([name])} has no dtype, shape and data_offsets that fit one another")


def read(tensor: Tensor, targets: Sequence[tuple[tuple[slice, ...], np.ndarray]]) -> None:
    """For each target `(index, out)` fills `out` with `tensor[index]`, in `out`'s dtype.

    Raises:
      CheckpointError: the file ends too early, or a value is not finite.
    """
    for job in reading(tensor, targets):
        job()


def reading(tensor: Tensor, targets: Sequence[tuple[tuple[slice, ...], np.ndarray]]) -> Iterator[Callable[[], None]]:
    """What `read` does, in parts that may run side by side.

    Each row that a target needs is read once, whatever the number of targets, and a part holds a block of rows beside
    them.
    """
    dtype = FLOATS[tensor.dtype]
    shape = tensor.shape or (1,)  # a scalar is one row
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    wanted = [
        _Target(*(index or (slice(0, 1),)), out=out.reshape(out.shape or (1,)), most=shape[0]) for index, out in targets
    ]
    cuts = sorted({row for target in wanted for row in (target.first, target.last)})

    def take(takers: Sequence[_Target], first: int, last: int) -> None:
        held = np.empty((min(step, last - first), *shape[1:]), dtype)
        with open(tensor.file, "rb", buffering=0) as stream:
            stream.seek(tensor.start + first * row_bytes)
            for row in range(first, last, step):
                block = held[: last - row]
                _fill(stream, block, tensor.file)
                block = _converted(tensor, block, takers[0].out.dtype)
                for taker in takers:
                    taker.take(row, block)

    for first, last in itertools.pairwise(cuts):
        takers = [target for target in wanted if target.first <= first and last <= target.last]
        for row in range(first, last, step * _BLOCKS) if takers else ():
            yield functools.partial(take, takers, row, min(row + step * _BLOCKS, last))


def read_bytes(tensor: Tensor) -> np.ndarray:
    """All bytes of a tensor.

    Raises:
      CheckpointError: the file ends too early.
    """
    found = np.empty(tensor.stop - tensor.start, np.uint8)
    with open(tensor.file, "rb", buffering=0) as stream:
        stream.seek(tensor.start)
        _fill(stream, found, tensor.file)
    return found


def read_whole(tensor: Tensor, words: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of one of these dtypes, in safetensors' words, and of this shape.

    Raises:
      CheckpointError: it is of another; the file ends too early; a float is not finite.
    """
    if tensor.dtype not in words or tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.file}: {names([tensor.name])} is {tensor.dtype} {list(tensor.shape)}; it must be "
            f"{' or '.join(words)} {list(shape)}"
        )
    found = read_bytes(tensor).view((FLOATS | _CODES)[tensor.dtype]).reshape(shape)
    return _converted(tensor, found, found.dtype) if tensor.dtype in FLOATS else found


class _Target:
    """Rows and columns of a tensor, and where they go."""

    def __init__(self, rows: slice, *columns: slice, out: np.ndarray, most: int):
        self.first, self.last, _ = rows.indices(most)
        self.columns, self.out = columns, out

    def take(self, row: int, block: np.ndarray) -> None:
        """Copies what of a block, which starts at `row`, is meant for it."""
        rows = slice(row - self.first, row - self.first + len(block))
        copy(self.out[rows], block[(slice(None), *self.columns)])


def _converted(tensor: Tensor, block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # seen below
        converted = _widened(block) if (block.dtype, dtype) == _WIDENED else block.astype(dtype, copy=False)
    if not is_finite(converted):
        as_dtype = "" if converted is block else f" as {dtype}"
        raise CheckpointError(f"{tensor.file}: {tensor.name} has values that are not finite{as_dtype}")
    return converted


def _widened(block: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, of which it is the upper half; NumPy converts numbers that it does not know one by one."""
    bits = block.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def copy(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, of one dtype and shape.

    Where one of them lies transposed beside the other, in strips as wide as a cache line of it holds numbers: NumPy by
    itself goes to each line once for every number in it, at a fifth of the rate. Matrices of numbers of 16 bits go by
    pairs of them, in half the steps.
    """
    bits = f"u{out.itemsize}"  # NumPy copies numbers that it does not know one by one
    out, values = out.view(bits), values.view(bits)
    if _turned(out) == _turned(values):
        out[...] = values
        return
    axis = 0 if _turned(out) else -1
    out, values = np.moveaxis(out, axis, 0), np.moveaxis(values, axis, 0)
    if out.ndim > 2 or out.itemsize != 2 or out.shape[0] % 2 or out.shape[1] % 2:
        _in_strips(out, values)
        return
    step = max(2, _BLOCK_BYTES // (2 * out.shape[1]) & ~1)
    for start in range(0, len(out), step):
        _in_pairs(out[start : start + step], values[start : start + step])


def _in_strips(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, where the numbers of `out` lie close along the first axis."""
    width = _ALIGNMENT // out.itemsize
    for start in range(0, len(out), width):
        out[start : start + width] = values[start : start + width]


def _in_pairs(out: np.ndarray, values: np.ndarray) -> None:
    """The same for matrices of 16 bits, of even sizes, whose numbers lie side by side: `values` along the last axis.

    Two numbers below each other, which lie side by side in `out`, are made one of 32 bits.
    """
    above, below = values[::2].view("u4"), values[1::2].view("u4")  # columns 2 j in the low half, 2 j + 1 in the high
    pairs = out.T.view("u4").T
    _in_strips(pairs[:, ::2], above & 0xFFFF | below << 16)
    _in_strips(pairs[:, 1::2], above >> 16 | below & 0xFFFF0000)


def _turned(array: np.ndarray) -> bool:
    """Whether numbers lie closer along the first axis than along the last."""
    return array.ndim > 1 and array.strides[0] < array.strides[-1]


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that starts where a CPU device wants its buffers to, so that it becomes one without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def is_finite(block: np.ndarray) -> bool:
    """Whether a contiguous block of floats holds neither inf nor nan, which have the largest bits of either sign.

    Read off the bits in two passes without a copy, for NumPy knows no bfloat16 and is slow to ask it.
    """
    if not block.size:
        return True
    bits = np.dtype(f"u{block.dtype.itemsize}")
    infinite = int(np.array(np.inf, block.dtype).view(bits))
    sign = 1 << 8 * bits.itemsize - 1
    flat = block.reshape(-1)
    return int(flat.view(f"i{bits.itemsize}").max()) < infinite and int(flat.view(bits).max()) < sign + infinite


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a checkpoint hold the same bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    nbytes = math.prod(one.shape) * FLOATS[one.dtype].itemsize
    for offset in range(0, nbytes, _BLOCK_BYTES):
        blocks = []
        for tensor in (one, other):
            block = np.empty(min(_BLOCK_BYTES, nbytes - offset), np.uint8)
            with open(tensor.file, "rb", buffering=0) as stream:
                stream.seek(tensor.start + offset)
                _fill(stream, block, tensor.file)
            blocks.append(block)
        if not np.array_equal(*blocks):
            return False
    return True


def _fill(stream: Any, block: np.ndarray, file: Path) -> None:
    view = block.reshape(-1).view(np.uint8).data
    while view:
        count = stream.readinto(view)
        if not count:
            raise CheckpointError(f"{file} ended while being read: copy it again")
        view = view[count:]


def write(file: Path, sources: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
    """Writes a file, fetching one tensor after the other."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    stop = 0
    for name, source in sources.items():
        start, stop = stop, stop + nbytes(source)
        entries[name] = {"dtype": WORDS[source.dtype], "shape": list(source.shape), "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for source in sources.values():
            values = np.empty(source.shape, source.dtype)
            copy(values, source.fetch())
            stream.write(values.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def nbytes(source: Source) -> int:
    """Bytes that a tensor takes in a file."""
    return math.prod(source.shape) * source.dtype.itemsize
