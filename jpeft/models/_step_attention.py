# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token in every row to a cache, which is read where it lies.

Nothing of the cache is copied, transposed or joined with the new token: scores of the two are joined instead, which are
d_head times smaller. A step so moves the weights and the cache once, and little else.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from .._given import Given
from .._wide import wide, widened
from ..seams import KeyValues
from ._cache import KV

#: Added to the score of a key that is not visible, as in `_attention`.
_HIDDEN = -1e30


def step_attention(
    seam: KeyValues,
    q: Float[Array, "batch 1 heads d_head"],
    past: KV,
    new: KV,
    x: Float[Array, "batch 1 d_model"],
    *,
    seen: Shaped[Given, "batch slots"] | None,
    scale: float,
    cap: float | None = None,
    bias: Float[Array, "rows heads 1 covered"] | None = None,
) -> Float[Array, "batch 1 heads d_head"]:
    """softmax(q kᵀ · scale + bias) v over the seen slots of a cache and the new keys, the softmax in float32 or wider.

    What a method puts in front of an attention's keys at the seam is put in front of the new ones.

    Args:
      seam: of the attention.
      q: the token's queries.
      past: of one layer, `[batch, kv_heads, slots, d_head]` each.
      new: keys and values `[batch, new, kv_heads, d_head]` that are not in the cache: the token's own, or none.
      x: the attention's input.
      seen: which of the slots are visible; None for all.
      scale: usually d_head^-0.5.
      cap: what scores approach, however great they are; None for no bound.
      bias: of the slots and then the new keys; keys that a method puts in front get none.
    """
    k, v, mask = seam(*new, None, x)
    batch, _, heads, d_head = q.shape
    rows = (widened(q) * scale).astype(q.dtype).reshape(batch, k.shape[2], -1, d_head)
    slots = past.keys.shape[-2]
    scores = _product("bhgd,bhkd->bhgk", rows, past.keys), _product("bhgd,bkhd->bhgk", rows, k)
    s = jnp.concatenate(scores, -1)
    s = s if cap is None else cap * jnp.tanh(s / cap)
    if bias is not None:
        front = k.shape[1] - (bias.shape[-1] - slots)
        whole = jnp.concatenate([bias[..., :slots], jnp.zeros((*bias.shape[:-1], front)), bias[..., slots:]], -1)
        s = s + whole.reshape(len(bias), *s.shape[1:3], -1)
    visible = _visible(seen, slots, mask, k.shape[1], batch)
    if visible is not None:
        s = s + jnp.where(visible, 0, _HIDDEN)[:, None, None]
    p = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
    weights = p.astype(v.dtype)
    y = _product("bhgk,bhkd->bhgd", weights[..., :slots], past.values)
    y = (y + _product("bhgk,bkhd->bhgd", weights[..., slots:], v)) / p.sum(-1, keepdims=True)
    return y.reshape(batch, 1, heads, d_head).astype(q.dtype)


def _visible(seen: Any, slots: int, mask: Any, new: int, batch: int) -> Bool[Array, "batch keys"] | None:
    """Which of the slots and of the new keys are; None where all are."""
    if seen is None and mask is None:
        return None
    sizes = zip((seen, mask), (slots, new), strict=True)
    return jnp.concatenate([jnp.ones((batch, n), bool) if x is None else x != 0 for x, n in sizes], 1)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b.astype(a.dtype), preferred_element_type=wide(a.dtype))
