# SPDX-License-Identifier: Apache-2.0
"""Quantizing a checkpoint while it is read: some layers of one leaf are in floats at a time, one of them in float32."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .._freed import give_back
from .._projections import Matmul, registered
from .._quantized import QuantizedKernel, quantize_module
from .._schemes import SCHEMES, check_scheme
from ._weights import Read, Sharding

Leaves = Mapping[str, jax.Array]
Put = Callable[[Leaves, jax.Array, Any, Any], Leaves]
Convert = Callable[[str, jax.ShapeDtypeStruct, Read], Leaves]

#: Bytes of a leaf that are read before they are quantized, if one layer of it is not larger.
_AT_ONCE = 2**25


def reading(abstract: Any, scheme: str | None, sharding: Sharding | None) -> tuple[Any, tuple[str, ...], Convert]:
    """The model of shapes that comes out, the paths of the kernels that are quantized, and what reads a leaf so.

    Raises:
      ValueError: an unknown scheme.
    """
    if scheme is None:
        return abstract, (), lambda path, _, read: {path: read()}
    check_scheme(scheme)
    model = nnx.eval_shape(functools.partial(_quantized, scheme=scheme), abstract)
    kernels = tuple(
        "/".join(map(str, path)) for path, module in nnx.iter_modules(model) if isinstance(module, QuantizedKernel)
    )

    def convert(path: str, leaf: jax.ShapeDtypeStruct, read: Read) -> Leaves:
        if path not in kernels:
            return {path: read()}
        if leaf.ndim == 2:
            return _placed({f"{path}/{name}": x for name, x in _compiled(scheme)(read()).items()}, sharding)
        return _by_layers(path, leaf, read, scheme, sharding)

    return model, kernels, convert


def _placed(leaves: Leaves, sharding: Sharding | None) -> Leaves:
    if sharding is None:
        return leaves
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in leaves.items()}
    return {path: jax.device_put(x, sharding(path, shapes[path])) for path, x in leaves.items()}


def _layers_at_once(leaf: jax.ShapeDtypeStruct) -> int:
    """How many layers of a stack are read together: the most that divide it and do not exceed `_AT_ONCE`."""
    each = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
    return max(n for n in range(1, leaf.shape[0] + 1) if leaf.shape[0] % n == 0 and (n == 1 or n * each <= _AT_ONCE))


def _by_layers(path: str, leaf: jax.ShapeDtypeStruct, read: Read, scheme: str, sharding: Sharding | None) -> Leaves:
    """A stack's codes, each layer waited for before the next one, so that the floats of one alone are there."""
    one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    shapes = {
        name: jax.ShapeDtypeStruct((leaf.shape[0], *x.shape), x.dtype)
        for name, x in jax.eval_shape(SCHEMES[scheme].quantize, one).items()
    }
    places = {name: None if sharding is None else sharding(f"{path}/{name}", x) for name, x in shapes.items()}
    whole: Leaves = {name: jnp.zeros(x.shape, x.dtype, device=places[name]) for name, x in shapes.items()}
    put = _putting(scheme, None if sharding is None else tuple(places.items()))
    step = _layers_at_once(leaf)
    for first in range(0, leaf.shape[0], step):
        part = read(first, first + step)
        for layer in range(step):
            whole = jax.block_until_ready(put(whole, part, layer, first + layer))
        del part
        give_back()  # of what was float32 the C library keeps much
    return {f"{path}/{name}": x for name, x in whole.items()}


@functools.cache
def _putting(scheme: str, places: tuple[tuple[str, Any], ...] | None) -> Put:
    """(leaves of a stack, some of its layers, which of these, its place in the stack) -> the stack with it as codes.

    The stack stays in its memory. A loop over layers within a program would have each of its steps computed by one
    core, and on a CPU all layers in float32 before it.
    """

    def put(whole: Leaves, part: jax.Array, layer: jax.Array, at: jax.Array) -> Leaves:
        found = SCHEMES[scheme].quantize(jax.lax.dynamic_index_in_dim(part, layer, keepdims=False))
        return {name: jax.lax.dynamic_update_index_in_dim(x, found[name], at, 0) for name, x in whole.items()}

    return jax.jit(put, donate_argnums=0, out_shardings=None if places is None else dict(places))


@functools.cache
def _compiled(scheme: str) -> Callable[[jax.Array], Leaves]:
    """A matrix as codes; the next one of the same shape needs no other program."""
    return jax.jit(SCHEMES[scheme].quantize)


def _quantized(model: Any, scheme: str) -> Any:
    """`model` with codes in every linear layer but the heads."""
    heads = {*model.head, *getattr(model, "before_head", ())}
    for path, module in list(nnx.iter_modules(model)):
        found = registered(module)
        if isinstance(found, Matmul) and path[0] not in heads:
            quantize_module(module, found, scheme)
    return model
