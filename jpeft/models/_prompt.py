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
      ids: tokens; or what a model reads that reads none, with its own axes behind the batch.
      mask: which of the tokens are; None of what is no tokens.
      marked: what `jpeft.prompt_tokens` says, or None.
      begun: of a decoder beside an encoder, its first tokens.
    """

    ids: jax.Array
    mask: jax.Array | None
    marked: jax.Array | None
    begun: jax.Array | None = None


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


def prepared(model: Any, ids: jax.Array, mask: Any, new: int, bucket: int, begun: Any = None) -> Prompt:
    """The prompts, their padding moved to the left and filled up to a multiple of `bucket`.

    Raises:
      ValueError: a row has no token; ids, mask and what `jpeft.prompt_tokens` says differ in shape; `begun` for a model
        that has no decoder beside an encoder.
    """
    begun = _begun(model, len(ids), begun)
    if hasattr(model, "input_shape"):
        return _sensed(model, ids, mask, begun)
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

    return Prompt(ready(ids), ready(mask), None if marked is None else ready(marked != 0), begun)


def _sensed(model: Any, read: jax.Array, mask: Any, begun: jax.Array | None) -> Prompt:
    """A prompt that is no tokens, and has nothing that could be padding."""
    marked = current().prompt
    if read.shape[1:] != model.input_shape or mask is not None or marked is not None:
        shape = ", ".join(map(str, model.input_shape))
        raise ValueError(
            f"a {model.config.model_type} model reads [batch, {shape}], without an attention_mask and without "
            f"prompt_tokens; got {read.shape}, {'no' if mask is None else 'a'} mask and "
            f"{'no' if marked is None else 'some'} prompt_tokens"
        )
    return Prompt(read, None, None, begun)


def _begun(model: Any, rows: int, ids: Any) -> jax.Array | None:
    """The first tokens of a decoder beside an encoder: those given, or its start token."""
    if not hasattr(model, "encode"):
        if ids is not None:
            raise ValueError("decoder_input_ids are for an encoder with a decoder; put them behind the prompt")
        return None
    if ids is None:
        return model.decoder_inputs(jnp.zeros((rows, 1), jnp.int32))
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or len(ids) != rows or not ids.shape[1]:
        raise ValueError(f"decoder_input_ids are [{rows}, seq] with one token or more in every row; got {ids.shape}")
    return ids.astype(jnp.int32)


def read(model: Any, prompt: Prompt, new: int, holds: bool) -> Reading:
    """Runs the model over the prompts; the cache has room for `new` tokens more. `holds` asks for `seen`."""
    ids, mask, marked, begun = prompt
    positions = None if mask is None else jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    with scope(prompt=marked):
        if begun is not None:
            encoded = model.encode(ids) if mask is None else model.encode(ids, mask, positions=positions)
            ids, mask = begun, None
            with scope(prompt=None):
                hidden, cache = model.prefill(model.cache(len(ids), ids.shape[1] + new - 1), encoded, ids)
        else:
            cache = model.cache(len(ids), ids.shape[1] + new)
            hidden, cache = model.prefill(cache, ids, mask, positions)
    logits = model.logits(hidden[:, -1:])[:, 0]
    if not holds:
        return Reading(logits, cache, None)
    return Reading(logits, cache, held(ids, jnp.ones_like(ids) if mask is None else mask, logits.shape[-1]))
