# SPDX-License-Identifier: Apache-2.0
"""Quantizing a checkpoint while it is read: one leaf is in its floats at a time, and one layer of it in float32."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from .._projections import Matmul, registered
from .._quantized import QuantizedKernel, quantize_module
from .._schemes import SCHEMES, check_scheme
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
    one = SCHEMES[scheme].quantize
    quantize = jax.jit(lambda leaf: one(leaf) if leaf.ndim == 2 else jax.lax.map(one, leaf))

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
        found = registered(module)
        if isinstance(found, Matmul) and path[0] not in heads:
            quantize_module(module, found, scheme)
    return model
