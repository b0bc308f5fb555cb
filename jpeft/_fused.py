# SPDX-License-Identifier: Apache-2.0
"""Products with a quantized matrix whose codes a Pallas kernel unpacks: `_fused_kernels` as a function of JAX.

It has the gradient of the input (the codes have none), and under `jax.vmap` inputs that meet one matrix are rows of
one product. The platform that a program is compiled for decides, not the one that traces it.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_batching import custom_vmap

from . import _fused_rule
from ._rows import add_to_rows

Leaves = Mapping[str, jax.Array]

#: What the kernels compute in.
DTYPES = ("bfloat16", "float32")


class Reading(NamedTuple):
    """How a scheme's leaves are read by the kernels.

    Attributes:
      columns: leaves, d_out -> codes `[d_in / parts, d_out]` and float32 scales `[groups, d_out]`.
      values: codes as int32 -> their weights before scaling, float32, one array a part.
    """

    columns: Callable[[Leaves, int], tuple[jax.Array, jax.Array]]
    values: Callable[[jax.Array], tuple[jax.Array, ...]]


class Matrix(NamedTuple):
    """A quantized matrix without its leaves: everything that is known when a program is traced."""

    scheme: str
    reading: Reading
    dequantize: Callable[[Leaves, int, int], jax.Array]
    d_in: int
    d_out: int
    dtype: str


def takes(module: Any, base: type, matrix: Matrix | None, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Whether a call of `module`, an `nnx.Linear` before it was quantized, goes through `linear`."""
    if matrix is None or options or len(inputs) != 1 or _fused_rule.way() == "xla":
        return False
    linear = base.__call__ is nnx.Linear.__call__ or vars(base).get("computes_as_linear", False)
    plain = linear and module.dot_general is jax.lax.dot_general
    if not plain or module.precision is not None or module.preferred_element_type is not None:
        return False
    x = inputs[0]
    rows = math.prod(x.shape[:-1])
    dtype = jax.eval_shape(lambda x: _promoted(module, x, matrix)[0], x).dtype.name
    if dtype not in DTYPES or rows == 0:
        return False
    return bool(_fused_rule.platforms(matrix.scheme, dtype, rows, matrix.d_in, matrix.d_out))


def linear(module: Any, matrix: Matrix, leaves: Leaves, x: jax.Array) -> jax.Array:
    """What `nnx.Linear` gives for the input `x` `[..., d_in]`."""
    x, bias = _promoted(module, x, matrix)
    rows: Any = product(matrix, x.reshape(-1, matrix.d_in), leaves)
    y = rows.reshape(*x.shape[:-1], matrix.d_out)
    return y if bias is None else add_to_rows(y, bias)


def _promoted(module: Any, x: jax.Array, matrix: Matrix) -> tuple[jax.Array, Any]:
    """Input and bias in the dtype in which the module computes."""
    bias = None if module.bias is None else module.bias[...]
    x, _, bias = module.promote_dtype((x, jnp.zeros((), matrix.dtype), bias), dtype=module.dtype)
    return x, bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(matrix: Matrix, x: jax.Array, leaves: Leaves) -> jax.Array:
    """`x @ W`, `[rows, d_in] @ [d_in, d_out]`, in `x`'s dtype, with float32 sums."""
    return _multiply(matrix, False)(x, leaves)


def _forward(matrix: Matrix, x: jax.Array, leaves: Leaves) -> tuple[jax.Array, Leaves]:
    return product(matrix, x, leaves), leaves


def _backward(matrix: Matrix, leaves: Leaves, dy: jax.Array) -> tuple[jax.Array, None]:
    return _multiply(matrix, True)(dy, leaves), None


product.defvjp(_forward, _backward)


@functools.cache
def _multiply(matrix: Matrix, transposed: bool) -> Callable[[jax.Array, Leaves], jax.Array]:
    """`x @ W`, or `x @ W.T`, of rows `x` and leaves."""

    def one(x: jax.Array, leaves: Leaves) -> jax.Array:
        ways = {
            platform: functools.partial(_by_kernel, matrix, transposed, platform) for platform in _fused_rule.PLATFORMS
        }
        chosen = _fused_rule.platforms(matrix.scheme, x.dtype.name, x.shape[0], matrix.d_in, matrix.d_out)
        default = None if _fused_rule.way() == "pallas" else functools.partial(_by_xla, matrix, transposed)
        return jax.lax.platform_dependent(x, leaves, default=default, **{name: ways[name] for name in chosen})

    multiply = custom_vmap(one)

    @multiply.def_vmap
    def _(size: int, batched: list[Any], x: jax.Array, leaves: Leaves) -> tuple[jax.Array, bool]:
        many, axes = batched[0], jax.tree.map(lambda own: 0 if own else None, batched[1])
        if any(jax.tree.leaves(batched[1])):
            return jax.vmap(one, in_axes=(0 if many else None, axes), axis_size=size)(x, leaves), True
        y = multiply(x.reshape(-1, x.shape[-1]), leaves)
        return y.reshape(size, -1, y.shape[-1]), True

    return multiply


def _by_kernel(matrix: Matrix, transposed: bool, platform: str, x: jax.Array, leaves: Leaves) -> jax.Array:
    """By Pallas; on a CPU the TPU's kernel is interpreted."""
    from . import _fused_kernels as kernels  # Pallas takes half a second to import, which few need

    codes, scales = matrix.reading.columns(leaves, matrix.d_out)
    weights = kernels.Weights(codes, scales, matrix.reading.values, matrix.dtype)
    multiply = kernels.backward if transposed else kernels.forward
    return multiply(x, weights, gpu=platform == "cuda", interpret=platform == "cpu")


def _by_xla(matrix: Matrix, transposed: bool, x: jax.Array, leaves: Leaves) -> jax.Array:
    kernel = matrix.dequantize(leaves, matrix.d_in, matrix.d_out).astype(matrix.dtype).astype(x.dtype)
    return x @ (kernel.T if transposed else kernel)
