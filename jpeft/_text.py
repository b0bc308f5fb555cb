# SPDX-License-Identifier: Apache-2.0
"""What a method may ask about the running text: which tokens are text, of which example, and means over them.

A packed row holds several examples, and a padded one tokens that are none; a mean over a row would mix the first, and
make an output depend on the second.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._scope import current


def text_mean(x: Float[Array, "*batch n"]) -> Float[Array, "*means n"]:
    """The mean of `x` over the tokens of each token's own example: padding and virtual tokens do not count.

    `[batch seq n]` gives `[batch 1 n]`, in a packed row `[batch seq n]`. Without a token axis `x` itself; where the
    running call does not say what is text, or `x` is not of its tokens, all positions count.
    """
    if x.ndim < 3:
        return x
    scope = current()
    if scope.text is None or scope.text.shape != x.shape[:-1]:
        return x.mean(-2, keepdims=True)
    text = scope.text[:, None, :]
    own = text if scope.segments is None else text & (scope.segments[:, :, None] == scope.segments[:, None, :])
    count = jnp.maximum(own.sum(-1, keepdims=True), 1)
    return jnp.einsum("bqk,bkn->bqn", own.astype(x.dtype), x) / count.astype(x.dtype)


def gate(x: Float[Array, "*batch d_model"], weight: jax.Array, bias: jax.Array) -> Float[Array, "*means 1"]:
    """UniPELT's gate (Mao et al. 2022), one number per example: the mean of sigmoid(x · weight + bias) over its text.

    Args:
      x: what the gated module reads.
      weight: `[d_model, 1]`.
      bias: `[1]`.
    """
    bias = bias.reshape((1,) * x.ndim)
    return text_mean(jax.nn.sigmoid(x.astype(weight.dtype) @ weight + bias))
