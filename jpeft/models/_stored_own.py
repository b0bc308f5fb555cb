# SPDX-License-Identifier: Apache-2.0
"""Codes of any scheme in files: the leaves of a quantized kernel as they are, a tensor each.

Of a weight `name` kept as `scheme`, seen as a matrix `[d_in, d_out]`:

  name.scheme.matrix  int32 [3]: d_in, d_out, and which axis of the weight in floats is d_in (1 of torch's Linear, 0 of
                      GPT-2's Conv1D)
  name.scheme.leaf    every leaf of `_schemes` and `_groups`, by its own name, shape and dtype
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from .._schemes import FORMATS, SCHEMES, check_scheme
from ._files import CheckpointError, names
from ._safetensors import WORDS, Source, Tensor, is_finite, read_whole
from ._stored_config import Stored

#: A leaf's dtypes, in safetensors' words, and its shape.
Form = tuple[tuple[str, ...], tuple[int, ...]]


def weights(tensors: Mapping[str, Tensor], stored: Stored) -> dict[str, Any]:
    """Every weight in codes: shape, reader, names of its tensors.

    Raises:
      CheckpointError: a weight lacks a tensor or has one too many, or has one whose shape or dtype is not its scheme's.
      ValueError: a scheme that this device has no numbers for.
    """
    found: dict[str, Any] = {}
    for (name, scheme), own in _by_weight(tensors).items():
        if name in found:
            raise CheckpointError(f"{names([name])} is there in codes of two schemes, one of them {scheme}")
        if "matrix" not in own:
            raise CheckpointError(f"weights in codes lack {names([f'{name}.{scheme}.matrix'])}")
        described = own.pop("matrix")
        d_in, d_out, axis = _matrix(described, own)
        forms = _forms(f"{name}.{scheme}", scheme, d_in, d_out, own)
        shape = (d_out, d_in) if axis else (d_in, d_out)
        read = functools.partial(_read, own, scheme, forms)
        found[name] = (shape, read, [described.name, *(tensor.name for tensor in own.values())])
    return found


def sources(
    name: str,
    scheme: str,
    leaves: Callable[[], Mapping[str, np.ndarray]],
    matrix: tuple[int, int, int],
    forms: Mapping[str, tuple[tuple[int, ...], np.dtype]],
) -> dict[str, Source]:
    """What to write for the weight `name`, of one layer.

    Args:
      scheme: one of `FORMATS`.
      leaves: gives the layer's.
      matrix: d_in, d_out, and the axis of the weight in floats that is d_in.
      forms: shape and dtype of every leaf.
    """

    def fetch(leaf: str) -> np.ndarray:
        return leaves()[leaf]

    start = f"{name}.{scheme}."
    found = {start + leaf: Source(*form, functools.partial(fetch, leaf)) for leaf, form in forms.items()}
    return {f"{start}matrix": Source((3,), np.dtype(np.int32), lambda: np.array(matrix, np.int32)), **found}


def _by_weight(tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The leaves of every weight, by their names, by its name and scheme."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match key.rsplit(".", 2):
            case [name, scheme, leaf] if scheme in FORMATS:
                found.setdefault((name, scheme), {})[leaf] = tensor
            case [_, scheme, "matrix"]:
                raise CheckpointError(f"{names([key])} is of the scheme {scheme:.50}; read are {', '.join(FORMATS)}")
    return found


def _matrix(described: Tensor, own: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """d_in, d_out and the axis, which the codes are large enough for."""
    d_in, d_out, axis = read_whole(described, ("I32",), (3,)).tolist()
    codes = max((math.prod(own[leaf].shape) for leaf in ("codes", "flat_codes") if leaf in own), default=0)
    if min(d_in, d_out) < 1 or axis not in (0, 1) or d_in * d_out > 2 * codes:
        raise CheckpointError(f"{described.name} says {[d_in, d_out, axis]}, of {codes} codes: no such matrix")
    return d_in, d_out, axis


def _forms(name: str, scheme: str, d_in: int, d_out: int, own: Mapping[str, Tensor]) -> Mapping[str, Form]:
    """What the leaves must be."""
    forms = _made(scheme, d_in, d_out) if scheme in SCHEMES else _grouped(name, scheme, d_in, d_out, own)
    strays = {"lack": {*forms} - {*own}, "have, and must not,": {*own} - {*forms}}
    wrong = [f"{what} {names(f'{name}.{leaf}' for leaf in stray)}" for what, stray in strays.items() if stray]
    if wrong:
        raise CheckpointError(f"weights in codes {' and '.join(wrong)}")
    return forms


@functools.lru_cache(maxsize=256)
def _made(scheme: str, d_in: int, d_out: int) -> Mapping[str, Form]:
    """Those that quantizing gives."""
    check_scheme(scheme)
    made = jax.eval_shape(SCHEMES[scheme].quantize, jax.ShapeDtypeStruct((d_in, d_out), np.float32))
    return {leaf: ((WORDS[np.dtype(x.dtype)],), x.shape) for leaf, x in made.items()}


def _grouped(name: str, scheme: str, d_in: int, d_out: int, own: Mapping[str, Tensor]) -> Mapping[str, Form]:
    """Those of groups of any size, in any order where `rows` names them."""
    groups = own["scales"].shape[0] if "scales" in own and own["scales"].shape else 0
    if not groups or ("rows" not in own and d_in % groups):
        raise CheckpointError(f"{name} has {groups} groups of {d_in} inputs, and no rows that say which are whose")
    rows = -(-d_in // 2) if scheme == "grouped4" else d_in
    forms = {
        "codes": (("U8",), (rows, d_out)),
        "scales": (("F16", "BF16", "F32"), (groups, d_out)),
        "zeros": (("U8",), (groups, d_out)),
    }
    return {**forms, "rows": (("I32",), (d_in,))} if "rows" in own else forms


def _read(own: Mapping[str, Tensor], scheme: str, forms: Mapping[str, Form]) -> tuple[str, dict[str, np.ndarray]]:
    found = {leaf: read_whole(own[leaf], *form) for leaf, form in forms.items()}
    if "rows" in found:
        rows, groups = found["rows"], len(found["scales"])
        if rows.min() < 0 or rows.max() >= groups:
            raise CheckpointError(f"{own['rows'].name} names groups from {rows.min()} to {rows.max()}, of {groups}")
    codes = found.get("codes")
    if codes is not None and codes.dtype.kind not in "iu" and not is_finite(codes.astype(np.float32)):
        raise CheckpointError(f"{own['codes'].file}: {own['codes'].name} has values that are not finite")
    return scheme, found
