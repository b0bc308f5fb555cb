# SPDX-License-Identifier: Apache-2.0
"""Parts that several models are made of: activations, RMS norm, the gate of an MLP, positions.

What is cheap to compute and large to keep is recomputed in the backward pass (`_recomputed`), so that a stack of
layers stores the inputs of its matrix products and little more.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .._given import Given
from .._rows import against_table, scale_rows
from .._scope import made_again
from .._wide import widened
from ..seams import held


def _gelu(x: jax.Array) -> jax.Array:
    """x Φ(x) in float32 or wider, by erf: `jax.nn.gelu` computes erfc, which takes three times as long on CPU."""
    y = widened(x)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_python": _gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


def _recomputed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, of which the backward pass keeps the inputs alone; for elementwise mathematics inside a scanned layer."""
    return jax.checkpoint(fn, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)


#: Activations by transformers' names (ACT2FN).
ACTIVATIONS = {name: _recomputed(fn) for name, fn in _ACTIVATIONS.items()}


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + eps) · (offset + scale), over the last axis, in float32 or wider."""

    def __init__(self, features: int, eps: float, *, dtype: Any, start: float = 1.0, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(features, start, dtype))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        @_recomputed
        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            y = widened(x)
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
            scale = widened(scale) + self.offset if self.offset else scale
            return scale_rows(y, scale).astype(x.dtype)

        return norm(made_again(x), self.scale[...])


def gated(activation: str, gate: Float[Array, "*batch d_ff"], up: Float[Array, "*batch d_ff"]) -> Any:
    """activation(gate) · up, the middle of a gated MLP."""
    return _recomputed(lambda gate, up: _ACTIVATIONS[activation](gate) * up)(gate, up)


def segment_positions(segment_ids: Int[Given, "batch seq"]) -> Int[Array, "batch seq"]:
    """Positions that count from 0 in each run of equal segment ids."""
    return _since_start(jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape), segment_ids)


def positions_of(seq: int, segment_ids: Any, limit: int | None, text: Any = None) -> Int[Array, "rows seq"]:
    """Positions of `seq` tokens, in a packed row counted in each segment, for a model that has `limit` of them.

    Args:
      seq: how many tokens there are.
      segment_ids: of a packed row, or None.
      limit: how many positions the model has a vector for; None where it takes any.
      text: `[batch, seq]`, which of the tokens are counted; the others stand at -1. None counts all.

    Raises:
      ValueError: there are more tokens than positions.
    """
    if limit is not None and segment_ids is None and seq > limit:
        raise ValueError(f"{seq} tokens are more than the {limit} positions this model has; cut the input")
    if text is None:
        return jnp.arange(seq)[None] if segment_ids is None else segment_positions(segment_ids)
    before = jnp.cumsum(text, 1) - text
    return jnp.where(text, before if segment_ids is None else _since_start(before, segment_ids), -1)


def _since_start(count: Int[Array, "batch seq"], segment_ids: Int[Given, "batch seq"]) -> Int[Array, "batch seq"]:
    """What a count that never falls has grown by since the start of each run of equal segment ids."""
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return count - jax.lax.cummax(jnp.where(starts, count, 0), axis=1)


class TokenTable(nnx.Embed):
    """A table of token vectors. As in torch, the row of the padding token `pad` is not trained by looking it up."""

    def __init__(self, vocab: int, d_model: int, pad: int | None, **options: Any):
        super().__init__(vocab, d_model, **options)
        self.untrained_row = pad

    def __call__(self, inputs: Any) -> Float[Array, "*batch d_model"]:
        return held(super().__call__(inputs), inputs, self)

    def attend(self, query: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """The product with every row of the table: the logits of a head that is tied to it."""
        return against_table(*self.promote_dtype((query, self.embedding[...]), dtype=self.dtype))


def token_table(vocab: int, d_model: int, std: float, pad: int | None, *, rngs: nnx.Rngs, dtype: Any) -> TokenTable:
    """A table of token vectors: normal, and 0 for the padding token `pad`, where there is one."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        rows = nnx.initializers.normal(std)(key, shape, dtype)
        return rows if pad is None else rows.at[pad].set(0)

    return TokenTable(vocab, d_model, pad, dtype=dtype, param_dtype=dtype, embedding_init=init, rngs=rngs)


def last_token(hidden: Float[Array, "batch seq d_model"], mask: Any) -> Float[Array, "batch d_model"]:
    """The state of each row's last token that is not masked."""
    if mask is None:
        return hidden[:, -1]
    index = jnp.max(jnp.where(mask != 0, jnp.arange(mask.shape[1])[None], 0), axis=1)
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def first_token(hidden: Float[Array, "batch seq d_model"], mask: Any) -> Float[Array, "batch d_model"]:
    """The state of each row's first token that is not masked; of virtual tokens, which no mask covers, the first."""
    if mask is None or hidden.shape[1] > mask.shape[1]:
        return hidden[:, 0]
    index = jnp.argmax(mask != 0, axis=1)
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def led(hidden: Float[Array, "batch seq d_model"], mask: Any, virtual: int, text: Any = 0) -> jax.Array:
    """`hidden` with the state at its head that a pooler reads: that of the first virtual token that is there.

    In a bank of prompts of several lengths the shorter ones have padding in front, which the mask hides, and the slot
    of the base has nothing else; there it is that of the text's own first token, `text` of each row.
    """
    if not virtual or mask is None:
        return hidden
    there = mask[:, :virtual] != 0
    index = jnp.where(there.any(1), jnp.argmax(there, axis=1), virtual + text)
    return hidden.at[:, 0].set(jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0])


def in_front(virtual: int, shape: tuple[int, ...], mask: Any, segments: Any) -> dict[str, Any]:
    """What the scope says of the layers' tokens, `virtual` ones in front of a text of `shape` `[batch, seq]`.

    `mask` is of the text; `segments` are of the virtual tokens too, as the input seam gives them.
    """
    text = jnp.ones(shape, bool) if mask is None else jnp.broadcast_to(mask != 0, shape)
    return {"text": jnp.pad(text, ((0, 0), (virtual, 0))), "segments": segments}
