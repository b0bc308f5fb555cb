# SPDX-License-Identifier: Apache-2.0
"""Quantized kernels written code by code: as bitsandbytes writes them where it can, else in jpeft's own layout.

transformers loads the former with the same codes, and refuses the latter by its name.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from .._quantized import QuantizedKernel
from . import _stored_bnb, _stored_own
from ._files import CheckpointError
from ._safetensors import Source
from ._stored_bnb import FOUR_BITS, WRITTEN
from ._table import COPY, TRANSPOSE, Entry, Rule, fill, rules

#: The axis of a weight in floats that is d_in, by how its axes lie.
_INPUTS = {TRANSPOSE: 1, COPY: 0}


def kernels(model: Any) -> dict[str, QuantizedKernel]:
    """The quantized kernels of a model, by path."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, QuantizedKernel)
    }


def written(entries: Sequence[Entry], codes: Mapping[str, QuantizedKernel]) -> dict[str, Source]:
    """What to write for kernels in codes: that of each layer, under the name that the table gives it.

    Raises:
      CheckpointError: a kernel that is no matrix, or whose weight in files is neither it nor its transpose.
    """
    how = {rule.path: rule for rule in rules(entries)}
    known = _known_to_bitsandbytes(how, codes)
    held: dict[str, dict[str, np.ndarray]] = {}
    found: dict[str, Source] = {}
    for path, kernel in codes.items():
        found |= _of_kernel(how[path], kernel, known, held)
    return found


def described(entries: Sequence[Entry], codes: Mapping[str, QuantizedKernel]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    if not _known_to_bitsandbytes({rule.path: rule for rule in rules(entries)}, codes):
        return {"quant_method": "jpeft", "version": 1}
    some = next(iter(codes.values()))
    plain = [rule for rule in rules(entries) if rule.how == TRANSPOSE and rule.path not in codes]
    layers = max((kernel.lead[0] for kernel in codes.values() if kernel.lead), default=1)
    skipped = {fill(rule.hf.removesuffix(".weight"), i, 0) for rule in plain for i in range(layers)}
    own = _in_four(some) if some.scheme in FOUR_BITS else {"llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": some.scheme in FOUR_BITS,
        "load_in_8bit": some.scheme not in FOUR_BITS,
        "llm_int8_skip_modules": sorted(skipped) or None,
        **own,
    }


def _in_four(some: QuantizedKernel) -> dict[str, Any]:
    return {
        "bnb_4bit_quant_type": some.scheme.partition("_")[0],
        "bnb_4bit_use_double_quant": FOUR_BITS[some.scheme],
        "bnb_4bit_compute_dtype": np.dtype(some.dtype).name,
        "bnb_4bit_quant_storage": "uint8",
    }


def _known_to_bitsandbytes(how: Mapping[str, Rule], codes: Mapping[str, QuantizedKernel]) -> bool:
    """Whether all are of one scheme that bitsandbytes has, and weights of torch's Linear."""
    schemes = {kernel.scheme for kernel in codes.values()}
    return len(schemes) == 1 and schemes <= {*WRITTEN} and all(how[path].how == TRANSPOSE for path in codes)


def _of_kernel(
    rule: Rule, kernel: QuantizedKernel, known: bool, held: dict[str, dict[str, np.ndarray]]
) -> dict[str, Source]:
    """What to write for one kernel; `held` is the host's copy of one kernel at a time, by path."""
    lead = kernel.lead
    shape = kernel.shape[len(lead) :]
    if len(shape) != 2 or rule.how not in _INPUTS:
        raise CheckpointError(f"{rule.hf} is no matrix or its transpose, the two kinds that are written as codes")
    d_in, d_out = shape
    forms = {name: (leaf.shape[len(lead) :], np.dtype(leaf.dtype)) for name, leaf in kernel.leaves.items()}

    def layer(index: tuple[int, ...]) -> Mapping[str, np.ndarray]:
        if rule.path not in held:
            held.clear()
            held[rule.path] = {name: np.asarray(jax.device_get(leaf)) for name, leaf in kernel.leaves.items()}
        return {name: value[index] for name, value in held[rule.path].items()}

    found: dict[str, Source] = {}
    for index in np.ndindex(lead):
        name, leaves = fill(rule.file or rule.hf, *index), functools.partial(layer, index)
        if known:
            dtype = np.dtype(kernel.dtype).name
            found |= _stored_bnb.sources(name, kernel.scheme, leaves, (d_in, d_out), dtype)
        else:
            matrix = (d_in, d_out, _INPUTS[rule.how])
            found |= _stored_own.sources(name, kernel.scheme, leaves, matrix, forms)
    return found
