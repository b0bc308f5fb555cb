# SPDX-License-Identifier: Apache-2.0
"""The places of a model where a method may act. jpeft's own models are built from them.

Four kinds cover everything:
  projection        a module that contracts its input with a kernel (Linear, Einsum, Embed, Conv, ...)
  residual          where a block's output meets the stream: `Residual(h, x)`
  keys and values   an attention's keys, values and mask: `KeyValues(k, v, mask, x)`
  input             the embedded tokens before the first layer: `InputEmbedding(e, positions, mask, segments)`
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from ._grouped import Grouped, by_expert
from ._neftune import noised
from ._projections import (
    Convolution,
    Dims,
    Lookup,
    Matmul,
    Projection,
    held,
    projection,
    register,
    registered,
    rows_times,
)
from ._stream import split_embedded, split_rows

__all__ = [
    "EVERY_SEGMENT",
    "KINDS",
    "Convolution",
    "Dims",
    "Grouped",
    "InputEmbedding",
    "KeyValues",
    "Lookup",
    "Matmul",
    "Projection",
    "Residual",
    "Sizes",
    "beside",
    "by_expert",
    "held",
    "kind",
    "projection",
    "register",
    "rows_times",
    "sizes",
]


class Residual(nnx.Module):
    """Where a block's output `h` meets the residual stream `x`: `norm(h + x)`, or `h + x` in a pre-norm model.

    On a mesh, each device keeps its own rows of the stream.

    Args:
      d_model: width of the stream.
      block: whose output it is: `"attention"`, `"cross_attention"` or `"mlp"`, the last of a layer.
      norm: of a post-norm model.
    """

    def __init__(self, d_model: int, block: str, norm: nnx.Module | None = None):
        self.d_model, self.block, self.norm = d_model, block, norm

    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        y = split_rows(h + x)
        return y if self.norm is None else self.norm(y)


class KeyValues(nnx.Module):
    """What an attention is about to attend to.

    k, v: `[batch, keys, kv_heads, d_head]`, after the rotary embedding. mask: `[batch, keys]`, 0 for a key that nobody
    sees, or None. x: the attention's input, `[batch, seq, d_model]`. Keys put in front of the others are seen by every
    query, but for those that the mask that comes out hides, even where none went in; in a packed input it may say so of
    each query by itself, `[batch, seq, keys]`.

    Args:
      d_model: width of x.
      kv_heads, d_head: sizes of k and v.
      block: `"attention"` or `"cross_attention"`.
    """

    def __init__(self, d_model: int, kv_heads: int, d_head: int, block: str = "attention"):
        self.d_model, self.kv_heads, self.d_head, self.block = d_model, kv_heads, d_head, block

    def __call__(self, k: jax.Array, v: jax.Array, mask: Any, x: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        del x
        return k, v, mask


class InputEmbedding(nnx.Module):
    """The embedded input before the first layer.

    e: `[batch, seq, d_model]`. positions: `[batch or 1, seq]`. mask: `[batch, seq]`, 0 for padding, or None.
    segments: `[batch, seq]` of a packed input, or None. A method may put virtual tokens in front, in all four; the
    segment of a virtual token is that of the example that it is for, or `EVERY_SEGMENT`.

    Args:
      d_model: width of e.
      block: `"encoder"` or `"decoder"`.
      causal: whether the tokens see none after them.
      max_positions: how many positions the model has a vector for; None where it takes any.
      beyond: whether what a token becomes may depend on more than the tokens that it sees here: a decoder's on those of
        an encoder, and by a gate a classifier's on the whole text.
    """

    def __init__(self, d_model: int, block: str, causal: bool, max_positions: int | None = None, beyond: bool = False):
        self.d_model, self.block, self.causal, self.max_positions = d_model, block, causal, max_positions
        self.beyond = beyond

    def __call__(self, e: jax.Array, positions: Any, mask: Any, segments: Any) -> tuple[jax.Array, Any, Any, Any]:
        return split_embedded(noised(e, mask, segments, self.block)), positions, mask, segments


#: The segment of a virtual token for all examples of a packed row: all see it, and it sees itself and its like.
EVERY_SEGMENT = -1

#: The kinds of seam, in words for an error.
KINDS: Mapping[str, str] = {
    "projection": "projection (Linear, Einsum, Embed, Conv, or what jpeft.register knows)",
    "residual": "place where a block meets the residual stream (seams.Residual)",
    "keys_values": "place between keys, values and attention (seams.KeyValues)",
    "input": "place between embedding and layers (seams.InputEmbedding)",
}


def kind(module: Any) -> str | None:
    """`"projection"`, `"residual"`, `"keys_values"` or `"input"`; None where no method acts."""
    for seam, name in ((Residual, "residual"), (KeyValues, "keys_values"), (InputEmbedding, "input")):
        if isinstance(module, seam):
            return name
    return None if registered(module) is None else "projection"


def beside(module: Any) -> int:
    """How many of a projection's leading axes are of matrices that stand side by side; 0 of any other module."""
    found = registered(module)
    return 0 if found is None else found.beside


class Sizes(NamedTuple):
    """Any seam in numbers: leading (layer) axes, what goes in and comes out, heads of an attention, its block."""

    lead: tuple[int, ...]
    d_in: int
    d_out: int
    heads: int = 0
    block: str = ""


def sizes(module: Any, lead: tuple[int, ...]) -> Sizes:
    """Of a seam that stands in stacks of the sizes `lead`.

    Raises:
      ValueError: a projection has no matrix form.
    """
    if kind(module) == "projection":
        return Sizes(*projection(module).dims(module))
    if isinstance(module, KeyValues):
        return Sizes(lead, module.d_model, module.kv_heads * module.d_head, module.kv_heads, module.block)
    return Sizes(lead, module.d_model, module.d_model, 0, module.block)
