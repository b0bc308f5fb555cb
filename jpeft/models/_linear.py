# SPDX-License-Identifier: Apache-2.0
"""The zoo's projections."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from .._rows import along_rows
from .._scope import platform


class Linear(nnx.Linear):
    """`nnx.Linear`, whose kernel and bias have gradients that a CPU computes fast."""

    #: Told to what may compute it otherwise (`_fused`): the numbers are those of `nnx.Linear`.
    computes_as_linear = True

    def __call__(self, inputs: Float[Array, "*batch d_in"], out_sharding: Any = None) -> Float[Array, "*batch d_out"]:
        if out_sharding is not None or platform() != "cpu":
            return super().__call__(inputs, out_sharding)
        leaf = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], leaf), dtype=self.dtype)
        y = self._product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)
        return y if bias is None else y + along_rows(bias, y)

    def _product(self, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        """Over flat rows: of a product over more axes, the kernel's gradient transposes its rows first."""
        return self.dot_general(rows, kernel, (((1,), (0,)), ((), ())), precision=self.precision)
