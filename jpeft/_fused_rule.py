# SPDX-License-Identifier: Apache-2.0
"""Where a product with a quantized kernel is taken by the Pallas kernel: where that was measured to be faster.

`MEASURED` is the whole rule. A product counts as measured where a line of it is of the same platform, scheme and dtype
and within a factor of `NEAR` in rows, d_in and d_out; the nearest line decides. Everywhere else XLA takes the product.
`benchmarks/fused.py` measures, and prints lines as they stand here.
"""

import math
from typing import Any, NamedTuple

import jax


class Line(NamedTuple):
    """How many times as fast as XLA's way the kernel took a product and its gradient: `gain`, of medians."""

    platform: str
    scheme: str
    dtype: str
    rows: int
    d_in: int
    d_out: int
    gain: float


#: How far from a measured size a size may be, as a factor.
NEAR = 2.0
#: The gain from which on the kernel is taken: less is within what two runs of one program differ by.
WORTH = 1.05

#: No TPU or GPU was there to measure on, so there XLA takes every product until lines for them stand here. On a CPU a
#: Pallas kernel is interpreted, and slower.
MEASURED: tuple[Line, ...] = (
    # 4 cores of a shared Intel Xeon, jax 0.10.2, 2026-11-23, benchmarks/fused.py --dtype float32
    Line("cpu", "nf4", "float32", 32, 768, 768, 0.435),
    Line("cpu", "nf4", "float32", 1024, 768, 768, 0.281),
    Line("cpu", "nf4", "float32", 32, 768, 3072, 0.46),
    Line("cpu", "nf4", "float32", 1024, 768, 3072, 0.258),
    Line("cpu", "int8", "float32", 32, 768, 768, 0.501),
    Line("cpu", "int8", "float32", 1024, 768, 768, 0.465),
    Line("cpu", "int8", "float32", 32, 768, 3072, 0.706),
    Line("cpu", "int8", "float32", 1024, 768, 3072, 0.383),
)

#: `quantized_products`' words.
WAYS = ("auto", "xla", "pallas")
#: Where the kernel runs: compiled, and on a CPU interpreted.
PLATFORMS = ("tpu", "cuda", "cpu")

_way = jax.make_user_context("auto")


def quantized_products(way: str) -> Any:
    """A context in which products with quantized kernels are taken in one way, whatever was measured.

    What is traced inside has that way, compiled programs too: a program compiled outside is compiled again.

    Args:
      way: `"xla"`, which builds the kernel and multiplies by it; `"pallas"`, which unpacks codes inside the product,
        on TPUs and NVIDIA GPUs, and on a CPU interpreted and slow; `"auto"`, as outside, which takes Pallas where it
        was measured to be faster. Pallas takes the `nnx.Linear`s of `nf4`, `nf4_double` (whose d_in must be a multiple
        of 64) and `int8`, in bfloat16 or float32; all others are taken by XLA. Pallas' products cannot be split among
        devices: on a mesh a TPU's compiler refuses them, and `"auto"` is `"xla"`.

    Raises:
      ValueError: another word.

    Example:
      >>> with jpeft.quantized_products("pallas"):
      ...     logits = jax.jit(lambda tokens: model(tokens))(tokens)
    """
    if way not in WAYS:
        raise ValueError(f"quantized_products takes one of {', '.join(WAYS)}; got {way!r}")
    return _way(way)


def way() -> str:
    """The way that holds where this is called."""
    return _way.value


def platforms(scheme: str, dtype: str, rows: int, d_in: int, d_out: int) -> tuple[str, ...]:
    """The platforms on which the kernel takes a product `[rows, d_in] @ [d_in, d_out]`; elsewhere XLA does.

    Where there are several devices it is XLA, which can split a product among them and cannot split a kernel.
    """
    if way() != "auto":
        return PLATFORMS if way() == "pallas" else ()
    if jax.device_count() > 1:
        return ()
    return tuple(platform for platform in PLATFORMS if gain(platform, scheme, dtype, rows, d_in, d_out) >= WORTH)


def gain(platform: str, scheme: str, dtype: str, rows: int, d_in: int, d_out: int) -> float:
    """What the nearest measured product gained; 0 where none is near."""
    near = {
        _distance(line, (rows, d_in, d_out)): line.gain
        for line in MEASURED
        if line[:3] == (platform, scheme, dtype) and _distance(line, (rows, d_in, d_out)) <= math.log(NEAR)
    }
    return near[min(near)] if near else 0.0


def _distance(line: Line, sizes: tuple[int, int, int]) -> float:
    """The largest factor between two products' sizes, as a logarithm."""
    return max(abs(math.log(a / b)) for a, b in zip((line.rows, line.d_in, line.d_out), sizes, strict=True))
