# SPDX-License-Identifier: Apache-2.0
"""A prompt made ready, and read: all padding on the left, filled up to a bucket of lengths, into a cache at once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from .._scope import current, scope
from ._cache import Cache
from ._sampling import held


class Prompt(NamedTuple):
    """Prompts with all padding on the left, each `[batch, seq]`.

    Attributes:
      ids: tokens.
      mask: which of them are.
      marked: what `jpeft.prompt_tokens` says, or None.
    """

    ids: jax.Array
    mask: jax.Array
    marked: jax.Array | None


class Reading(NamedTuple):
    """A prompt that was read.

    Attributes:
      logits: of the first new token, `[batch, vocab]`.
      cache: with the prompt in it.
      seen: which tokens each row holds, `[batch, vocab]`; None where nobody asks.
    """

    logits: jax.Array
    cache: Cache
    seen: Any


def prepared(model: Any, ids: jax.Array, mask: Any, new: int, bucket: int) -> Prompt:
    """The prompts, their padding moved to the left and filled up to a multiple of `bucket`.

    Raises:
      ValueError: a row has no token; ids, mask and what `jpeft.prompt_tokens` says differ in shape.
    """
    if ids.ndim != 2 or 0 in ids.shape or (mask is not None and jnp.shape(mask) != ids.shape):
        raise ValueError(
            f"input_ids and attention_mask are [batch, seq] with one token or more; got {ids.shape} and "
            f"{None if mask is None else jnp.shape(mask)}"
        )
    mask = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask) != 0
    if not isinstance(mask, core.Tracer) and not bool(mask.any(1).all()):
        rows = np.flatnonzero(~np.asarray(mask).any(1)).tolist()
        raise ValueError(f"a prompt needs a token, and attention_mask hides all of the rows {rows[:5]}")
    marked = current().prompt
    if marked is not None and marked.shape != ids.shape:
        raise ValueError(
            f"prompt_tokens says of {marked.shape} tokens which are the prompt, and generate reads {ids.shape}; "
            "leave it out where all of the text is prompt"
        )
    order = jnp.argsort(mask, axis=1, stable=True)
    size = ids.shape[1] + -ids.shape[1] % bucket
    limit = None if hasattr(model, "encode") else model.config.max_cached
    if limit is not None:
        virtual = jax.eval_shape(lambda: model.cache(1, 1)).slots - 1
        size = max(ids.shape[1], min(size, limit - new - virtual))

    def ready(x: jax.Array) -> jax.Array:
        return jnp.pad(jnp.take_along_axis(x, order, 1), ((0, 0), (size - ids.shape[1], 0)))

    return Prompt(ready(ids), ready(mask), None if marked is None else ready(marked != 0))


def read(model: Any, prompt: Prompt, new: int, holds: bool) -> Reading:
    """Runs the model over the prompts; the cache has room for `new` tokens more. `holds` asks for `seen`."""
    ids, mask, marked = prompt
    positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    with scope(prompt=marked):
        if hasattr(model, "encode"):
            encoded = model.encode(ids, mask, positions=positions)
            ids = model.decoder_inputs(jnp.zeros((len(ids), 1), jnp.int32))
            mask = jnp.ones_like(ids, bool)
            with scope(prompt=None):
                hidden, cache = model.prefill(model.cache(len(ids), new), encoded, ids)
        else:
            cache = model.cache(len(ids), ids.shape[1] + new)
            hidden, cache = model.prefill(cache, ids, mask, positions)
    logits = model.logits(hidden[:, -1:])[:, 0]
    return Reading(logits, cache, held(ids, mask, logits.shape[-1]) if holds else None)
