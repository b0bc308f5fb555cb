# SPDX-License-Identifier: Apache-2.0
"""What a method may ask about the running text: which tokens are text, of which example, means and ends of it.

A packed row holds several examples, and a padded one tokens that are none; a mean over a row would mix the first, and
make an output depend on the second.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ._scope import current
from .seams import InputEmbedding

#: Tasks whose outputs may depend on all of a causal model's input.
WHOLE_INPUT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


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
    return text_mean(jax.nn.sigmoid(x.astype(weight.dtype) @ weight + bias.reshape((1,) * x.ndim)))


def check_gate(model: Any) -> None:
    """Refuses a gate where a token's output must not depend on those after it.

    Raises:
      ValueError: the model is causal, and its task gives an output per token that predicts the next.
    """
    causal = any(isinstance(m, InputEmbedding) and m.causal for _, m in nnx.iter_modules(model))
    if causal and getattr(model, "task", None) not in WHOLE_INPUT:
        raise ValueError(
            "gate=True averages over all of an example's text, so the outputs of a causal model would depend on later "
            f"tokens; it fits bidirectional models and the tasks {', '.join(WHOLE_INPUT)}"
        )


def prompt_ends(shape: tuple[int, ...], first: int, last: int) -> tuple[Bool[Array, "*batch seq"], ...]:
    """Which tokens are among the `first` of their own example's prompt, and which among its `last`.

    Padding and virtual tokens are no part of it, and each example of a packed row has a prompt of its own. In a prompt
    shorter than first + last, a token that is among both belongs to the nearer end, the one in the middle to the front.
    Where the running call does not say what is text, all positions are; where not what is the prompt, all text is.

    Args:
      shape: `(*batch, seq)` of the running tokens, virtual ones counted in.
      first, last: numbers of tokens.

    Raises:
      ValueError: the call speaks of tokens of another shape.
    """
    prompt = _prompt(shape)
    segments = None if current().text is None else current().segments
    before = count_before(prompt, segments)
    after = jnp.flip(count_before(jnp.flip(prompt, -1), None if segments is None else jnp.flip(segments, -1)), -1)
    front, back = prompt & (before < first), prompt & (after < last)
    return front & ~(back & (after < before)), back & ~(front & (before <= after))


def count_before(
    counted: Bool[Array, "*batch seq"], segments: Int[Array, "*batch seq"] | None = None
) -> Int[Array, "*batch seq"]:
    """How many `counted` tokens stand before each token, in its own run of equal `segments`."""
    before = jnp.cumsum(counted, -1) - counted
    if segments is None:
        return before
    starts = jnp.diff(segments, prepend=segments[..., :1] - 1) != 0
    return before - jax.lax.cummax(jnp.where(starts, before, 0), axis=before.ndim - 1)


def _prompt(shape: tuple[int, ...]) -> Bool[Array, "*batch seq"]:
    """The running tokens that are text and prompt."""
    scope = current()
    text = jnp.ones(shape, bool) if scope.text is None else scope.text
    if text.shape != shape:
        raise ValueError(f"the running tokens are {shape}, and the call says of {text.shape} which are text")
    if scope.prompt is None:
        return text
    virtual = shape[-1] - scope.prompt.shape[-1]
    if scope.prompt.shape[:-1] != shape[:-1] or virtual < 0:
        raise ValueError(
            f"the running tokens are {shape}, virtual ones in front counted in, and the call says of "
            f"{scope.prompt.shape} which are the prompt; prompt_tokens takes a mask of the shape of the model's tokens"
        )
    return text & jnp.pad(scope.prompt != 0, (*((0, 0),) * (len(shape) - 1), (virtual, 0)))
