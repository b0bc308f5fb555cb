# SPDX-License-Identifier: Apache-2.0
"""Codes of bitsandbytes' files as leaves of a quantized kernel, and back.

A weight `name` `[d_out, d_in]` in 4 bits: `name` itself, bytes of two codes in any dtype; `name.absmax`, a magnitude a
block, float32 or (double quantization) codes; `name.quant_map`, the 16 values; `name.nested_absmax` and
`name.nested_quant_map` of the magnitudes' codes; and `name.quant_state.bitsandbytes__nf4` (or `fp4`), JSON with the
rest. In 8 bits: `name`, int8 `[d_out, d_in]`; `SCB` beside it, the largest magnitude of every row; and `weight_format`.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import _nf4
from .._schemes import INT8_STEP
from ._files import CheckpointError, names, parse_json
from ._safetensors import Source, Tensor, read_bytes, read_whole
from ._stored_config import Stored

_STATE = ".quant_state.bitsandbytes__"
_TABLES = {"nf4": _nf4.NF4, "fp4": _nf4.FP4}
_DTYPES = ("float16", "bfloat16", "float32")

#: Schemes of 4 bits: whether the magnitudes are codes themselves.
FOUR_BITS = {f"{kind}{ending}": bool(ending) for kind in _TABLES for ending in ("", "_double")}


def four_bits(tensors: Mapping[str, Tensor], stored: Stored) -> dict[str, Any]:
    """Every weight in 4 bits: shape, reader, names of its tensors.

    Raises:
      CheckpointError: a weight lacks a tensor, or its description is of no weight that bitsandbytes makes.
    """
    found = {}
    for key in [key for key in tensors if _STATE in key]:
        name, kind = key.split(_STATE, 1)
        state = parse_json(read_bytes(tensors[key]).tobytes(), f"{tensors[key].file}: {key}")
        shape = _described(key, kind, state)
        nested = "nested_absmax" in state or f"{name}.nested_absmax" in tensors
        endings = ("", ".absmax", ".quant_map", *((".nested_absmax", ".nested_quant_map") if nested else ()))
        lacking = [name + ending for ending in endings if name + ending not in tensors]
        if lacking:
            raise CheckpointError(f"weights in codes lack {names(lacking)}")
        own = {ending: tensors[name + ending] for ending in endings}
        offset = _offset(key, state) if nested else 0.0
        found[name] = (
            shape,
            functools.partial(_read, own, kind, shape, offset),
            [key, *(t.name for t in own.values())],
        )
    return found


def _described(key: str, kind: str, state: Mapping[str, Any]) -> tuple[int, int]:
    """The shape that a weight's description gives."""
    expected = {"quant_type": (kind,), "blocksize": (_nf4.BLOCK,), "dtype": _DTYPES}
    wrong = [f"{name}={state.get(name)!r:.50}" for name, values in expected.items() if state.get(name) not in values]
    if kind not in _TABLES or wrong:
        raise CheckpointError(f"{key} says {', '.join(wrong) or kind}; read are nf4 and fp4 in blocks of {_nf4.BLOCK}")
    match state.get("shape"):
        case [int(d_out), int(d_in)] if 0 < d_out < 2**31 and 0 < d_in < 2**31:
            return d_out, d_in
    raise CheckpointError(f"{key} says shape={state.get('shape')!r:.50}, which is no matrix's")


def _offset(key: str, state: Mapping[str, Any]) -> float:
    """The mean of the magnitudes."""
    expected = {"nested_blocksize": _nf4.SCALE_BLOCK, "nested_dtype": "float32"}
    wrong = [f"{name}={state.get(name)!r:.50}" for name, value in expected.items() if state.get(name) != value]
    offset: Any = state.get("nested_offset")
    if wrong or type(offset) not in (int, float) or not math.isfinite(offset) or abs(offset) > 3e38:
        raise CheckpointError(f"{key} says {', '.join(wrong) or f'nested_offset={offset!r:.50}'}, which is not read")
    return offset


def _read(
    own: Mapping[str, Tensor], kind: str, shape: tuple[int, int], offset: float
) -> tuple[str, dict[str, np.ndarray]]:
    d_out, d_in = shape
    blocks, double = -(-d_out * d_in // _nf4.BLOCK), ".nested_absmax" in own
    codes = read_bytes(own[""])
    if len(codes) != -(-d_out * d_in // 2):
        raise CheckpointError(f"{own[''].name} has {len(codes)} bytes of codes, of a weight {[d_out, d_in]}")
    _check_map(own[".quant_map"], _TABLES[kind])
    scales = read_whole(own[".absmax"], ("U8",) if double else ("F32",), (blocks,))
    extra = {}
    if double:
        _check_map(own[".nested_quant_map"], _nf4.CODE_BOOK)
        largest = read_whole(own[".nested_absmax"], ("F32",), (-(-blocks // _nf4.SCALE_BLOCK),))
        extra = {"scale_largest": largest, "scale_mean": np.float32(offset)}
    scheme = f"{kind}_double" if double else kind
    if d_in % _nf4.BLOCK:
        return scheme, {"flat_codes": codes, "flat_scales": scales, **extra}
    columns = {"codes": codes.reshape(d_out, -1).T, "scales": scales.reshape(d_out, -1).T}
    return scheme, {name: np.ascontiguousarray(value) for name, value in columns.items()} | extra


def _check_map(tensor: Tensor, table: np.ndarray) -> None:
    found = read_whole(tensor, ("F32",), table.shape)
    if not np.array_equal(found, table):
        raise CheckpointError(f"{tensor.name} holds other values than bitsandbytes' codes stand for")


def eight_bits(tensors: Mapping[str, Tensor], stored: Stored) -> dict[str, Any]:
    """Every weight in 8 bits, as `four_bits`."""
    found = {}
    for key in [key for key in tensors if key.endswith(".SCB")]:
        start = key.removesuffix("SCB")
        name, form = f"{start}weight", tensors.get(f"{start}weight_format")
        if name not in tensors:
            raise CheckpointError(f"weights in codes lack {names([name])}")
        if len(tensors[name].shape) != 2:
            raise CheckpointError(f"{name} is {list(tensors[name].shape)}; codes are a matrix")
        d_out, d_in = tensors[name].shape
        read = functools.partial(_read_eight, tensors[name], tensors[key], form)
        found[name] = ((d_out, d_in), read, [name, key, *([] if form is None else [form.name])])
    return found


def _read_eight(codes: Tensor, largest: Tensor, form: Tensor | None) -> tuple[str, dict[str, np.ndarray]]:
    if form is not None and read_bytes(form).any():
        raise CheckpointError(f"{form.name} is not 0: codes in the tiles of a GPU are not read; save them by rows")
    d_out, d_in = codes.shape
    scales = read_whole(largest, ("F32",), (d_out,))[None] * INT8_STEP
    return "int8", {"codes": np.ascontiguousarray(read_whole(codes, ("I8",), (d_out, d_in)).T), "scales": scales}


# Writing.


def sources(
    name: str, scheme: str, leaves: Callable[[], Mapping[str, np.ndarray]], shape: tuple[int, int], dtype: str
) -> dict[str, Source]:
    """What to write for the weight `name`, of one layer.

    Raises:
      CheckpointError: scales of int8, when they are fetched, that are no magnitude over 127.

    Args:
      scheme: one of `WRITTEN`.
      leaves: gives the layer's.
      shape: d_in and d_out.
      dtype: of the weight in floats.
    """
    if scheme == "int8":
        return _in_eight(name, leaves, shape)
    d_in, d_out = shape
    kind, double = scheme.partition("_")[0], FOUR_BITS[scheme]
    blocks = -(-d_in * d_out // _nf4.BLOCK)

    def flat(of: str) -> np.ndarray:
        found = leaves()
        return found[of].T.reshape(-1) if of in found else found[f"flat_{of}"]

    def described() -> np.ndarray:
        state = {"quant_type": kind, "blocksize": _nf4.BLOCK, "dtype": dtype, "shape": [d_out, d_in]}
        if double:
            mean = float(leaves()["scale_mean"])
            state |= {"nested_blocksize": _nf4.SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": mean}
        return np.frombuffer(json.dumps(state).encode().ljust(_STATE_BYTES), np.uint8)

    u8, f32 = np.dtype(np.uint8), np.dtype(np.float32)
    found = {
        "": Source((-(-d_in * d_out // 2), 1), u8, lambda: flat("codes")[:, None]),
        ".absmax": Source((blocks,), u8 if double else f32, lambda: flat("scales")),
        ".quant_map": Source((16,), f32, lambda: _TABLES[kind]),
        f"{_STATE}{kind}": Source((_STATE_BYTES,), u8, described),
    }
    if double:
        most = -(-blocks // _nf4.SCALE_BLOCK)
        found[".nested_absmax"] = Source((most,), f32, lambda: leaves()["scale_largest"])
        found[".nested_quant_map"] = Source((256,), f32, lambda: _nf4.CODE_BOOK)
    return {name + ending: source for ending, source in found.items()}


#: Room for a description, filled up with spaces.
_STATE_BYTES = 256
#: Schemes that bitsandbytes has.
WRITTEN = (*FOUR_BITS, "int8")


def _in_eight(name: str, leaves: Callable[[], Mapping[str, np.ndarray]], shape: tuple[int, int]) -> dict[str, Source]:
    start, (d_in, d_out) = name.removesuffix("weight"), shape
    return {
        name: Source((d_out, d_in), np.dtype(np.int8), lambda: leaves()["codes"].T),
        f"{start}SCB": Source((d_out,), np.dtype(np.float32), lambda: _largest(name, leaves()["scales"][0])),
        f"{start}weight_format": Source((), np.dtype(np.uint8), lambda: np.zeros((), np.uint8)),  # by rows
    }


def _largest(name: str, scales: np.ndarray) -> np.ndarray:
    """Magnitudes that `INT8_STEP` makes these scales of, bit for bit; of several the roundest, as 16 bits have them."""
    near = (scales / INT8_STEP).astype(np.float32)
    tried = np.stack([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))])
    right = tried * INT8_STEP == scales
    if not right.any(0).all():
        raise CheckpointError(f"{name} has scales of int8 that are no float32 times 1 / 127; quantize it anew")
    bits = tried.view(np.uint32).astype(np.int64)
    last = np.where(right, np.where(bits == 0, 2**32, bits & -bits), 0)  # the value of a number's last bit that is set
    return tried[last.argmax(0), np.arange(len(scales))]
