# SPDX-License-Identifier: Apache-2.0
"""Convolutions as products of matrices."""

from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .._rows import add_to_rows, product


class Windows(nnx.Conv):
    """`nnx.Conv` as one product of the kernel with what stands in every window.

    XLA's convolutions have slow gradients on a CPU: a step that trains a small Whisper whole took seven times as long
    as one that trains a LoRA. Windows lie beside each other, as those of an image's patches, or slide along one axis.
    """

    def __call__(self, inputs: Float[Array, "batch *places d_in"], out_sharding: Any = None) -> Float[Array, "..."]:
        leaf = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], leaf), dtype=self.dtype)
        y = product(self._apart(x), kernel.reshape(-1, kernel.shape[-1]))
        return y if bias is None else add_to_rows(y, bias)

    def _apart(self, x: Float[Array, "batch *places d_in"]) -> Float[Array, "batch *windows d_window"]:
        """What stands in each window, in the order of the kernel's axes."""
        sizes, steps = cast("tuple[int, ...]", self.kernel_size), cast("tuple[int, ...]", self.strides)
        if self.padding == "VALID" and sizes == steps:
            return _beside(x, sizes)
        (size,), (step,), (around,) = sizes, steps, cast("tuple[tuple[int, int]]", self.padding)
        x = jnp.pad(x, ((0, 0), around, (0, 0)))
        span = (x.shape[1] - size) // step * step + 1
        return jnp.concatenate([x[:, at : at + span : step] for at in range(size)], -1)


def _beside(x: Float[Array, "batch *places d_in"], sizes: tuple[int, ...]) -> Float[Array, "batch *windows d_window"]:
    """The windows that do not overlap; what is left over behind the last ones is not read."""
    batch, *places, d_in = x.shape
    counts = [place // size for place, size in zip(places, sizes, strict=True)]
    x = x[:, *(slice(count * size) for count, size in zip(counts, sizes, strict=True))]
    x = x.reshape(batch, *(n for pair in zip(counts, sizes, strict=True) for n in pair), d_in)
    axes = range(len(sizes))
    order = [0, *(1 + 2 * axis for axis in axes), *(2 + 2 * axis for axis in axes), 1 + 2 * len(sizes)]
    return x.transpose(order).reshape(batch, *counts, -1)
