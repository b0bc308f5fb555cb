# SPDX-License-Identifier: Apache-2.0
"""Quantizing a checkpoint while it is read: one kernel (of all layers of a stack) is in floats at a time."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from .._quantized import SCHEMES, QuantizedKernel, check_scheme, quantize_module
from ..seams import projection
from ._weights import Sharding

Convert = Callable[[str, jax.Array], Mapping[str, jax.Array]]


def reading(abstract: Any, scheme: str | None, sharding: Sharding | None) -> tuple[Any, tuple[str, ...], Convert]:
    """The model of shapes that comes out, the paths of the kernels that are quantized, and (path, leaf) -> its leaves.

    Raises:
      ValueError: an unknown scheme.
    """
    if scheme is None:
        return abstract, (), lambda path, leaf: {path: leaf}
    check_scheme(scheme)
    model = nnx.eval_shape(functools.partial(_quantized, scheme=scheme), abstract)
    kernels = tuple(
        "/".join(map(str, path)) for path, module in nnx.iter_modules(model) if isinstance(module, QuantizedKernel)
    )
    quantize = jax.jit(SCHEMES[scheme].quantize)

    def convert(path: str, leaf: jax.Array) -> Mapping[str, jax.Array]:
        if path not in kernels:
            return {path: leaf}
        found = {f"{path}/{name}": value for name, value in quantize(leaf).items()}
        return found if sharding is None else {p: jax.device_put(v, sharding(p, v)) for p, v in found.items()}

    return model, kernels, convert


def _quantized(model: Any, scheme: str) -> Any:
    """`model` with codes in every linear layer but the heads."""
    heads = {*model.head, *getattr(model, "before_head", ())}
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, nnx.Linear) and path[0] not in heads:
            quantize_module(module, projection(module), scheme)  # type: ignore[arg-type]
    return model
