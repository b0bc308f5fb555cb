# SPDX-License-Identifier: Apache-2.0
"""NEFTune (Jain et al. 2024): uniform noise on the embedded tokens, in training only.

A token of an example of L real tokens and width d gets noise of [-1, 1] times alpha / sqrt(L d). The scope turns it on,
and it is drawn from the running call's key, as dropout is; without a key there is none.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._scope import current, fold_path


def noised(
    e: Float[Array, "batch seq d_model"], mask: Any, segments: Any, path: str
) -> Float[Array, "batch seq d_model"]:
    """`e` with noise where the running call has any.

    Args:
      e: embedded tokens.
      mask: `[batch, seq]`, 0 for padding, or None.
      segments: `[batch, seq]` of a packed input, each example in one piece, or None.
      path: what is embedded, unique in the model.
    """
    running = current()
    if not running.noise or running.key is None:
        return e
    lengths = _lengths(e.shape[1], mask, segments)
    noise = jax.random.uniform(fold_path(running.key, f"neftune/{path}"), e.shape, jnp.float32, -1.0, 1.0)
    return e + (noise * (running.noise / jnp.sqrt(lengths * e.shape[-1]))).astype(e.dtype)


def _lengths(seq: int, mask: Any, segments: Any) -> Float[Array, "#batch #seq 1"]:
    """How many real tokens the example of each token has."""
    if segments is not None:
        return _runs(jnp.asarray(segments))[..., None].astype(jnp.float32)
    if mask is None:
        return jnp.full((1, 1, 1), seq, jnp.float32)
    return jnp.maximum((jnp.asarray(mask) != 0).sum(axis=1), 1).astype(jnp.float32)[:, None, None]


def _runs(segments: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """How many neighbours are of the same segment, itself included."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    change = segments[:, 1:] != segments[:, :-1]
    starts = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(change, ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, index, segments.shape[1]), axis=1, reverse=True)
    return last - first + 1
