# SPDX-License-Identifier: Apache-2.0
"""The zoo's projections."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from .._rows import add_to_rows, product


class Linear(nnx.Linear):
    """`nnx.Linear`, whose kernel and bias have gradients that a CPU computes fast."""

    #: Told to what may compute it otherwise (`_fused`): the numbers are those of `nnx.Linear`.
    computes_as_linear = True

    def __call__(self, inputs: Float[Array, "*batch d_in"], out_sharding: Any = None) -> Float[Array, "*batch d_out"]:
        if out_sharding is not None or self.dot_general is not jax.lax.dot_general or self.precision is not None:
            return super().__call__(inputs, out_sharding)
        leaf = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], leaf), dtype=self.dtype)
        y = product(x, kernel)
        return y if bias is None else add_to_rows(y, bias)
