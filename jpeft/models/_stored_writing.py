# SPDX-License-Identifier: Apache-2.0
"""Quantized kernels written as bitsandbytes writes them, so that transformers loads the folder with the same codes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from .._quantized import QuantizedKernel
from ._files import CheckpointError, names
from ._safetensors import Source
from ._stored_bnb import WRITTEN, sources
from ._table import TRANSPOSE, Entry, Rule, fill, rules


def kernels(model: Any) -> dict[str, QuantizedKernel]:
    """The quantized kernels of a model, by path.

    Raises:
      CheckpointError: they are of schemes that no folder holds, or of several.
    """
    found = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, QuantizedKernel)
    }
    schemes = {kernel.scheme for kernel in found.values()}
    if len(schemes) > 1 or not schemes <= {*WRITTEN}:
        raise CheckpointError(
            f"kernels are kept as {names(schemes)}; a folder holds {' or '.join(WRITTEN)}, the same for all: merge or "
            "strip adapters, and dequantize, before saving"
        )
    return found


def written(entries: Sequence[Entry], codes: Mapping[str, QuantizedKernel]) -> dict[str, Source]:
    """What to write for kernels in codes: that of each layer, under the name that the table gives it."""
    how = {rule.path: rule for rule in rules(entries)}
    found: dict[str, Source] = {}
    for path, kernel in codes.items():
        found |= _of_kernel(how[path], kernel)
    return found


def _of_kernel(rule: Rule, kernel: QuantizedKernel) -> dict[str, Source]:
    lead = kernel.lead
    shape = kernel.shape[len(lead) :]
    if rule.how != TRANSPOSE or len(shape) != 2:
        raise CheckpointError(f"{rule.hf} is no torch Linear's weight, the one kind that is written as codes")
    held: dict[str, np.ndarray] = {}

    def layer(index: tuple[int, ...]) -> Mapping[str, np.ndarray]:
        if not held:
            held.update({name: np.asarray(jax.device_get(leaf)) for name, leaf in kernel.leaves.items()})
        return {name: value[index] for name, value in held.items()}

    found: dict[str, Source] = {}
    for index in np.ndindex(lead):
        name = fill(rule.file or rule.hf, *index)
        dtype = np.dtype(kernel.dtype).name
        found |= sources(name, kernel.scheme, functools.partial(layer, index), (shape[0], shape[1]), dtype)
    return found


def described(entries: Sequence[Entry], codes: Mapping[str, QuantizedKernel]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    some = next(iter(codes.values()))
    plain = [rule for rule in rules(entries) if rule.how == TRANSPOSE and rule.path not in codes]
    layers = max((kernel.lead[0] for kernel in codes.values() if kernel.lead), default=1)
    skipped = {fill(rule.hf.removesuffix(".weight"), i, 0) for rule in plain for i in range(layers)}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": some.scheme.partition("_")[0],
        "bnb_4bit_use_double_quant": WRITTEN[some.scheme],
        "bnb_4bit_compute_dtype": np.dtype(some.dtype).name,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(skipped) or None,
    }
