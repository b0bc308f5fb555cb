# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels that multiply by a quantized matrix without writing it down: a block of codes at a time is unpacked.

The matrix `[d_in, d_out]` comes as codes `[d_in / parts, d_out]`, of which each holds `parts` weights of neighbouring
rows (two of NF4, one of int8), and as scales `[groups, d_out]`, each of `d_in / groups` consecutive rows. Neighbouring
rows are not put together again: row `parts i + p` meets column `parts i + p` of the input, so a product is the sum
over `p` of the input's every `parts`-th column times the codes' p-th weights, and the gradient's columns come out so.

There are two kernels of either direction, because the two compilers want different loops: a TPU's runs over a grid
whose last axis adds up in memory of its own, and cuts what hangs over an edge; a GPU's (Triton) loops inside, over
arrays that are whole blocks. Sums are float32, weights are rounded to the dtype that the codes stand for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

#: Codes as int32 -> their weights before scaling, float32, one array for each of the parts.
Values = Callable[[jax.Array], tuple[jax.Array, ...]]

#: Rows, rows of codes and columns of a block. On a TPU many rows share one unpacking, which costs more than 25
#: operations a weight; a float32 sum of 1024 x 512 and its inputs, twice, take 8 of the 16 MiB that a kernel may hold.
TPU_BLOCK = (1024, 256, 512)
GPU_BLOCK = (64, 32, 64)
#: The fewest rows of a block: a TPU's tile of bfloat16, and what a GPU's matrix unit takes.
FEWEST_ROWS = 16

_ALONG, _ACROSS = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


class Weights(NamedTuple):
    """A quantized matrix, and how its codes are read."""

    codes: jax.Array
    scales: jax.Array
    values: Values
    dtype: Any

    @property
    def group(self) -> int:
        """How many rows of codes share a scale."""
        return self.codes.shape[0] // self.scales.shape[0]

    @property
    def alone(self) -> bool:
        """Whether a whole column shares one scale."""
        return self.scales.shape[0] == 1

    @property
    def parts(self) -> int:
        """How many weights a code holds."""
        return len(jax.eval_shape(self.values, jax.ShapeDtypeStruct((1, 1), jnp.int32)))


def forward(x: jax.Array, weights: Weights, *, gpu: bool, interpret: bool = False) -> jax.Array:
    """`x @ W`, `[rows, d_in] @ [d_in, d_out]`, in `x`'s dtype."""
    padded = _at_least(x, FEWEST_ROWS)
    parts = tuple(padded[:, part :: weights.parts] for part in range(weights.parts))
    return (_gpu_forward if gpu else _tpu_forward)(parts, weights, interpret)[: x.shape[0]]


def backward(dy: jax.Array, weights: Weights, *, gpu: bool, interpret: bool = False) -> jax.Array:
    """`dy @ W.T`, `[rows, d_out] @ [d_out, d_in]`, in `dy`'s dtype."""
    parts = (_gpu_backward if gpu else _tpu_backward)(_at_least(dy, FEWEST_ROWS), weights, interpret)
    return jnp.stack([part[: dy.shape[0]] for part in parts], -1).reshape(dy.shape[0], -1)


def _at_least(x: jax.Array, rows: int) -> jax.Array:
    """`x` with rows of zeros at its end, if it has fewer."""
    return jnp.pad(x, ((0, max(0, rows - x.shape[0])), (0, 0)))


def _unpacked(codes: jax.Array, scales: jax.Array, weights: Weights, compute: Any) -> tuple[jax.Array, ...]:
    """The weights of a block of codes `[n, columns]` with its scales `[n / group, columns]`, one array a part."""
    groups, columns = scales.shape
    if groups > 1:  # row by row: a TPU's compiler broadcasts no more than one along rows
        size = codes.shape[0] // groups, columns
        scales = jnp.concatenate([jnp.broadcast_to(scales[i : i + 1], size) for i in range(groups)])
    return tuple(
        (part * scales).astype(weights.dtype).astype(compute) for part in weights.values(codes.astype(jnp.int32))
    )


def _dot(x: jax.Array, w: jax.Array, contracted: Any) -> jax.Array:
    return jax.lax.dot_general(x, w, contracted, preferred_element_type=jnp.float32)


def _cost(rows: int, weights: Weights, dtype: Any) -> pl.CostEstimate:
    """What a compiler cannot read off a kernel."""
    d_in, d_out = weights.codes.shape[0] * weights.parts, weights.codes.shape[1]
    moved = weights.codes.size + 4 * weights.scales.size + rows * (d_in + d_out) * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(flops=2 * rows * d_in * d_out, transcendentals=0, bytes_accessed=moved)


# ---------------------------------------------------------------------------------------------------------------- TPU


class _Blocks(NamedTuple):
    """How a TPU's product is cut: sizes of a block's rows, rows of codes, rows of scales and columns."""

    rows: int
    codes: int
    scales: int
    columns: int


def _tpu_blocks(rows: int, weights: Weights) -> _Blocks:
    """A block ends at multiples of the tiles of memory, or is as long as the array."""
    most_rows, most_codes, most_columns = TPU_BLOCK
    num_codes, d_out = weights.codes.shape
    if weights.alone:
        codes, scales = min(num_codes, most_codes), 1
    else:
        codes = min(num_codes, max(most_codes, 8 * weights.group))
        scales = codes // weights.group
    return _Blocks(min(rows, most_rows), codes, scales, min(d_out, most_columns))


def _within(block: jax.Array, axis: int, index: Any, size: int) -> jax.Array:
    """`block`, the `index`-th along `axis`, with zeros where it hangs over an array of `size`."""
    if size % block.shape[axis] == 0:
        return block
    position = index * block.shape[axis] + jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(position < size, block, 0)


def _tpu_forward(x: tuple[jax.Array, ...], weights: Weights, interpret: bool) -> jax.Array:
    (rows, num_codes), d_out, dtype = x[0].shape, weights.codes.shape[1], x[0].dtype
    block = _tpu_blocks(rows, weights)

    def kernel(*refs: Any) -> None:
        *inputs, codes, scales, out, total = refs
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        for part, w in zip(inputs, _unpacked(codes[...], scales[...], weights, dtype), strict=True):
            total[...] += _dot(_within(part[...], 1, step, num_codes), _within(w, 0, step, num_codes), _ALONG)

        @pl.when(step == pl.num_programs(2) - 1)
        def _() -> None:
            out[...] = total[...].astype(dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, d_out), dtype),
        grid=(pl.cdiv(rows, block.rows), pl.cdiv(d_out, block.columns), pl.cdiv(num_codes, block.codes)),
        in_specs=[
            *(pl.BlockSpec((block.rows, block.codes), lambda i, j, k: (i, k)) for _ in x),
            pl.BlockSpec((block.codes, block.columns), lambda i, j, k: (k, j)),
            pl.BlockSpec((block.scales, block.columns), lambda i, j, k: (0 if weights.alone else k, j)),
        ],
        out_specs=pl.BlockSpec((block.rows, block.columns), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((block.rows, block.columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(rows, weights, dtype),
        interpret=interpret,
        name="quantized_product",
    )(*x, weights.codes, weights.scales)


def _tpu_backward(dy: jax.Array, weights: Weights, interpret: bool) -> list[jax.Array]:
    (rows, d_out), num_codes, dtype = dy.shape, weights.codes.shape[0], dy.dtype
    block, parts = _tpu_blocks(rows, weights), weights.parts

    def kernel(dy: Any, codes: Any, scales: Any, *refs: Any) -> None:
        out, totals = refs[:parts], refs[parts:]
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            for total in totals:
                total[...] = jnp.zeros_like(total)

        slope = _within(dy[...], 1, step, d_out)
        for total, w in zip(totals, _unpacked(codes[...], scales[...], weights, dtype), strict=True):
            total[...] += _dot(slope, _within(w, 1, step, d_out), _ACROSS)

        @pl.when(step == pl.num_programs(2) - 1)
        def _() -> None:
            for part, total in zip(out, totals, strict=True):
                part[...] = total[...].astype(dtype)

    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((rows, num_codes), dtype)] * parts,
        grid=(pl.cdiv(rows, block.rows), pl.cdiv(num_codes, block.codes), pl.cdiv(d_out, block.columns)),
        in_specs=[
            pl.BlockSpec((block.rows, block.columns), lambda i, k, j: (i, j)),
            pl.BlockSpec((block.codes, block.columns), lambda i, k, j: (k, j)),
            pl.BlockSpec((block.scales, block.columns), lambda i, k, j: (0 if weights.alone else k, j)),
        ],
        out_specs=[pl.BlockSpec((block.rows, block.codes), lambda i, k, j: (i, k))] * parts,
        scratch_shapes=[pltpu.VMEM((block.rows, block.codes), jnp.float32)] * parts,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(rows, weights, dtype),
        interpret=interpret,
        name="quantized_product_transposed",
    )(dy, weights.codes, weights.scales)


# ---------------------------------------------------------------------------------------------------------------- GPU


def _gpu_rows(rows: int) -> int:
    """Rows of a block: a power of two that wastes little on few rows."""
    return next((size for size in (FEWEST_ROWS, 2 * FEWEST_ROWS) if rows <= size), GPU_BLOCK[0])


def _filled(array: jax.Array, rows: int, columns: int) -> jax.Array:
    """`array` with zeros at its ends, to multiples of `rows` and `columns`."""
    return jnp.pad(array, ((0, -array.shape[0] % rows), (0, -array.shape[1] % columns)))


def _whole(weights: Weights) -> Weights:
    """`weights` in whole blocks; what is added is zero, because its scales are."""
    _, codes, columns = GPU_BLOCK
    assert weights.alone or codes == weights.group, "a block of codes has one row of scales"
    return weights._replace(codes=_filled(weights.codes, codes, columns), scales=_filled(weights.scales, 1, columns))


def _gpu_forward(x: tuple[jax.Array, ...], weights: Weights, interpret: bool) -> jax.Array:
    rows, d_out, dtype = x[0].shape[0], weights.codes.shape[1], x[0].dtype
    size, (_, step, columns) = _gpu_rows(rows), GPU_BLOCK
    cost, weights = _cost(rows, weights, dtype), _whole(weights)
    x = tuple(_filled(part, size, step) for part in x)
    (all_rows, num_codes), (groups, all_columns) = x[0].shape, weights.scales.shape

    def kernel(*refs: Any) -> None:
        *inputs, codes, scales, out = refs

        def add(k: Any, total: jax.Array) -> jax.Array:
            here = pl.ds(k * step, step)
            ws = _unpacked(codes[here, :], scales[pl.ds(0 if weights.alone else k, 1), :], weights, dtype)
            return sum((_dot(part[:, here], w, _ALONG) for part, w in zip(inputs, ws, strict=True)), total)

        total = jax.lax.fori_loop(0, num_codes // step, add, jnp.zeros((size, columns), jnp.float32))
        out[...] = total.astype(dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((all_rows, all_columns), dtype),
        grid=(all_rows // size, all_columns // columns),
        in_specs=[
            *(pl.BlockSpec((size, num_codes), lambda i, j: (i, 0)) for _ in x),
            pl.BlockSpec((num_codes, columns), lambda i, j: (0, j)),
            pl.BlockSpec((groups, columns), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((size, columns), lambda i, j: (i, j)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=cost,
        interpret=interpret,
        name="quantized_product",
    )(*x, weights.codes, weights.scales)[:rows, :d_out]


def _gpu_backward(dy: jax.Array, weights: Weights, interpret: bool) -> list[jax.Array]:
    rows, num_codes, dtype, parts = dy.shape[0], weights.codes.shape[0], dy.dtype, weights.parts
    size, (_, step, columns) = _gpu_rows(rows), GPU_BLOCK
    cost, weights = _cost(rows, weights, dtype), _whole(weights)
    dy = _filled(dy, size, columns)
    (all_rows, all_columns), all_codes = dy.shape, weights.codes.shape[0]

    def kernel(dy: Any, codes: Any, scales: Any, *out: Any) -> None:
        def add(j: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            here = pl.ds(j * columns, columns)
            ws = _unpacked(codes[:, here], scales[:, here], weights, dtype)
            return tuple(total + _dot(dy[:, here], w, _ACROSS) for total, w in zip(totals, ws, strict=True))

        totals = (jnp.zeros((size, step), jnp.float32),) * parts
        for part, total in zip(out, jax.lax.fori_loop(0, all_columns // columns, add, totals), strict=True):
            part[...] = total.astype(dtype)

    out = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((all_rows, all_codes), dtype)] * parts,
        grid=(all_rows // size, all_codes // step),
        in_specs=[
            pl.BlockSpec((size, all_columns), lambda i, k: (i, 0)),
            pl.BlockSpec((step, all_columns), lambda i, k: (k, 0)),
            pl.BlockSpec((1, all_columns), lambda i, k: (0 if weights.alone else k, 0)),
        ],
        out_specs=[pl.BlockSpec((size, step), lambda i, k: (i, k))] * parts,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=cost,
        interpret=interpret,
        name="quantized_product_transposed",
    )(dy, weights.codes, weights.scales)
    return [part[:rows, :num_codes] for part in out]
