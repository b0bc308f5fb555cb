# SPDX-License-Identifier: Apache-2.0
"""Codes of GPTQ and AWQ files as the leaves of `jpeft._groups`: whole numbers in int32, several in each.

Of a weight `[d_out, d_in]`, with n = 32 / bits numbers in an int32, the first in its low bits:

  GPTQ  qweight [d_in / n, d_out], along the inputs; qzeros [groups, d_out / n], along the outputs; scales
        [groups, d_out]; g_idx [d_in], the group of every input (any order, after `desc_act`). The first version of the
        format stores every zero less one.
  AWQ   qweight [d_in, d_out / 8] and qzeros [groups, d_out / 8], along the outputs, of eight numbers in the order 0, 2,
        4, 6, 1, 3, 5, 7; scales [groups, d_out].
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._files import CheckpointError, names
from ._safetensors import Tensor, read_whole
from ._stored_config import Stored

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = ("F16", "BF16", "F32")


def gptq(tensors: Mapping[str, Tensor], stored: Stored) -> dict[str, Any]:
    """Every weight of GPTQ: shape, reader, names of its tensors.

    Raises:
      CheckpointError: a weight lacks a tensor, or has one whose shape is no weight's.
    """
    found = {}
    for start, own in _weights(tensors, ("qweight", "qzeros", "scales"), ("g_idx",)).items():
        rows, d_out = _two(own["qweight"])
        d_in = rows * 32 // stored.bits
        read = functools.partial(_read_gptq, own, stored, d_in, d_out)
        found[f"{start}weight"] = ((d_out, d_in), read, [tensor.name for tensor in own.values()])
    return found


def awq(tensors: Mapping[str, Tensor], stored: Stored) -> dict[str, Any]:
    """Every weight of AWQ, as `gptq`."""
    found = {}
    for start, own in _weights(tensors, ("qweight", "qzeros", "scales"), ()).items():
        d_in, packed = _two(own["qweight"])
        read = functools.partial(_read_awq, own, stored, d_in, 8 * packed)
        found[f"{start}weight"] = ((8 * packed, d_in), read, [tensor.name for tensor in own.values()])
    return found


def alike(layers: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Layers of one stack, of which either all name the groups of their inputs, or none does."""
    if not any("rows" in layer for layer in layers) or all("rows" in layer for layer in layers):
        return [*layers]
    d_in = next(len(layer["rows"]) for layer in layers if "rows" in layer)
    return [{**layer, "rows": layer.get("rows", _in_order(d_in, len(layer["scales"])))} for layer in layers]


def _weights(
    tensors: Mapping[str, Tensor], needed: Sequence[str], allowed: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of every weight by their last name, by what stands before it."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        start, _, last = name.rpartition(".")
        if last in (*needed, *allowed):
            found.setdefault(f"{start}.", {})[last] = tensor
    lacking = [start + last for start, own in found.items() for last in needed if last not in own]
    if lacking:
        raise CheckpointError(f"weights in codes lack {names(lacking)}")
    return found


def _two(tensor: Tensor) -> tuple[int, int]:
    if len(tensor.shape) != 2 or not all(tensor.shape):
        raise CheckpointError(f"{tensor.name} is {list(tensor.shape)}; codes are a matrix")
    return tensor.shape[0], tensor.shape[1]


def _read_gptq(own: Mapping[str, Tensor], stored: Stored, d_in: int, d_out: int) -> tuple[str, dict[str, np.ndarray]]:
    number = 32 // stored.bits
    groups = _num_groups(own["qweight"], d_in, stored.size)
    codes = _unpacked(read_whole(own["qweight"], ("I32",), (d_in // number, d_out)).T, stored.bits).T
    zeros = _unpacked(read_whole(own["qzeros"], ("I32",), (groups, -(-d_out // number))), stored.bits)[:, :d_out]
    zeros = zeros + np.uint8(stored.plus_one) & np.uint8(2**stored.bits - 1)
    scales = read_whole(own["scales"], _FLOATS, (groups, d_out))
    rows = _in_order(d_in, groups, stored.size)
    if "g_idx" in own:
        rows = read_whole(own["g_idx"], ("I32",), (d_in,))
        if rows.min() < 0 or rows.max() >= groups:
            raise CheckpointError(f"{own['g_idx'].name} names groups from {rows.min()} to {rows.max()}, of {groups}")
    return _leaves(codes, zeros, scales, rows, stored.bits)


def _read_awq(own: Mapping[str, Tensor], stored: Stored, d_in: int, d_out: int) -> tuple[str, dict[str, np.ndarray]]:
    groups = _num_groups(own["qweight"], d_in, stored.size)
    place = np.argsort(_AWQ_ORDER)  # where among eight numbers each column lies

    def columns(packed: np.ndarray) -> np.ndarray:
        return _unpacked(packed, 4).reshape(len(packed), -1, 8)[..., place].reshape(len(packed), -1)

    codes = columns(read_whole(own["qweight"], ("I32",), (d_in, d_out // 8)))
    zeros = columns(read_whole(own["qzeros"], ("I32",), (groups, d_out // 8)))
    scales = read_whole(own["scales"], _FLOATS, (groups, d_out))
    return _leaves(codes, zeros, scales, _in_order(d_in, groups, stored.size), 4)


def _leaves(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, rows: np.ndarray, bits: int
) -> tuple[str, dict[str, np.ndarray]]:
    """The scheme and leaves of codes and zeros of one byte each."""
    if bits == 4:
        codes = np.pad(codes, [(0, len(codes) % 2), (0, 0)])
        codes = codes[::2] << 4 | codes[1::2]
    leaves = {"codes": np.ascontiguousarray(codes), "scales": scales, "zeros": np.ascontiguousarray(zeros)}
    plain = len(rows) % len(scales) == 0 and np.array_equal(rows, _in_order(len(rows), len(scales)))
    return f"grouped{bits}", leaves if plain else {**leaves, "rows": rows.astype(np.int32)}


def _in_order(d_in: int, groups: int, size: int = -1) -> np.ndarray:
    """The group of every input where they follow one another."""
    return np.arange(d_in, dtype=np.int32) // (d_in // groups if size == -1 else size)


def _num_groups(codes: Tensor, d_in: int, size: int) -> int:
    if not d_in:
        raise CheckpointError(f"{codes.name} holds no weight")
    return 1 if size == -1 else -(-d_in // size)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """`[n, m]` int32 as `[n, m * 32 / bits]` uint8, the low bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    found = np.ascontiguousarray(packed).view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)
    return found.astype(np.uint8).reshape(len(packed), -1)
