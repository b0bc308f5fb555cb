# SPDX-License-Identifier: Apache-2.0
"""Generation: a prompt is read into a cache at once, and each further token costs one step, in one compiled loop.

Works for every model of the zoo that has a cache, plain or adapted, and under `jpeft.apply_bank` with an adapter for
every row. Methods act as they do without a cache: virtual tokens are read once with the prompt, a prefix stands in
front of every step's keys, and what acts on a prompt's ends (LoReFT) acts on those of the text that is given.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import core
from jaxtyping import Array, Int, Shaped

from .._scope import current, scope
from ._cache import Cache
from ._sampling import Rules, choose, held, rules

#: The tasks whose models write.
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def generate(
    model: Any,
    input_ids: Int[Any, "batch seq"],
    attention_mask: Shaped[Any, "batch seq"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    key: jax.Array | None = None,
    bucket: int = 64,
) -> Int[Array, "batch new"]:
    """What the model writes after each prompt: `[batch, max_new_tokens]` ids, without the prompt.

    A row that has ended is filled up with padding, and the loop stops when all rows have. Positions count the tokens
    of a prompt alone, so padding on any side changes nothing. One program serves all prompts of a bucket of lengths.

    Args:
      model: of a task in `TASKS`; adapted or not.
      input_ids: prompts; of an encoder with a decoder, what the encoder reads.
      attention_mask: 1 where there is a token, 0 where there is padding; None where all are tokens.
      max_new_tokens: how many tokens are written at most. Another number is another program.
      temperature: 0 takes the likeliest token; else tokens are drawn by softmax(logits / temperature).
      top_k: draw among the k likeliest.
      top_p: draw among the likeliest whose probabilities sum to p.
      min_p: draw among those that are p times as probable as the likeliest.
      repetition_penalty: divides the logits of what the text holds already (multiplies them where negative).
      eos_token_id: what ends a row, one id or several; None writes max_new_tokens.
      pad_token_id: what fills up a row that has ended; None is the config's, or else the first of `eos_token_id`.
      key: for drawing: one key, of which row i draws by `fold_in(key, i)`, or one for every row, `[batch]`. What a row
        draws depends on its key and its logits alone.
      bucket: prompts are padded to a multiple of this length, so that other lengths need no other program.

    Raises:
      ValueError: the model has no cache; a row has no token; more tokens than the model has positions; wrong options.

    Example:
      >>> ids = jpeft.models.generate(model, prompt, max_new_tokens=32, temperature=0.8, top_p=0.95, key=key)
    """
    if getattr(model, "task", None) not in TASKS or not hasattr(model, "prefill"):
        raise ValueError(
            f"generate takes a model with a cache and a task that writes ({', '.join(TASKS)}); got "
            f"{type(model).__name__} with the task {getattr(model, 'task', None)}"
        )
    for name, value in {"max_new_tokens": max_new_tokens, "bucket": bucket}.items():
        if value != int(value) or value < 1:
            raise ValueError(f"{name} is a whole number, 1 or more, got {value}")
    asked = rules(temperature, top_k, top_p, min_p, repetition_penalty)
    prompt = _prompt(model, jnp.asarray(input_ids), attention_mask, max_new_tokens, bucket)
    ends = () if eos_token_id is None else tuple(np.atleast_1d(np.asarray(eos_token_id)).tolist())
    graphdef, flat = nnx.graph.flatten(model)
    return _compiled(
        graphdef,
        max_new_tokens,
        [leaf.get_value() for leaf in flat.leaves],
        prompt,
        asked,
        _keys(key, asked, len(prompt.ids)),
        jnp.asarray(ends, jnp.int32),
        jnp.asarray(_pad(model, pad_token_id, ends), jnp.int32),
    )


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


def _prompt(model: Any, ids: jax.Array, mask: Any, new: int, bucket: int) -> Prompt:
    """The prompts, their padding moved to the left and filled up to a multiple of `bucket`."""
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


def _keys(key: Any, asked: Rules, batch: int) -> Any:
    """A key for every row, or None where nothing is drawn."""
    if asked.temperature is None:
        return None
    if key is None:
        raise ValueError("tokens are drawn where temperature is above 0, which needs key=jax.random.key(seed)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key is made by jax.random.key(seed), or by split of one; got an array of {key.dtype}")
    if key.ndim == 0:
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key is one key, or one for each of the {batch} rows; got {key.shape}")
    return key


def _pad(model: Any, pad_token_id: int | None, ends: Sequence[int]) -> int:
    """What stands behind the end of a row; where there is no end, anything."""
    given = (pad_token_id, getattr(model.config, "pad_token_id", None), *ends, 0)
    return next(pad for pad in given if pad is not None)


class _State(NamedTuple):
    """The loop's: what was written and how much of it, who has ended, what rows hold, and the cache."""

    count: jax.Array
    ids: jax.Array
    ended: jax.Array
    seen: Any
    cache: Cache


def _sequence(
    graphdef: Any, new: int, leaves: Any, prompt: Prompt, asked: Rules, keys: Any, ends: jax.Array, pad: jax.Array
) -> Int[Array, "batch new"]:
    """`generate`, of a model given as NNX's graphdef and leaves."""
    model = nnx.graph.unflatten(graphdef, leaves)
    batch = len(prompt.ids)

    def write(state: _State, logits: jax.Array) -> _State:
        token = jnp.where(state.ended, pad, choose(logits, state.seen, asked, keys, state.count))
        seen = None if state.seen is None else state.seen.at[jnp.arange(batch), token].set(True)
        return state._replace(
            count=state.count + 1,
            ids=jax.lax.dynamic_update_slice_in_dim(state.ids, token[:, None], state.count, 1),
            ended=state.ended | jnp.isin(token, ends),
            seen=seen,
        )

    def step(state: _State) -> _State:
        last = jax.lax.dynamic_slice_in_dim(state.ids, state.count - 1, 1, 1)
        hidden, cache = model.step(state.cache, last)
        return write(state._replace(cache=cache), model.logits(hidden)[:, 0])

    logits, cache, seen = _read(model, prompt, new, asked.repetition_penalty is not None)
    empty = jnp.full((batch, new), pad, jnp.int32)
    first = write(_State(jnp.zeros((), jnp.int32), empty, jnp.zeros(batch, bool), seen, cache), logits)
    return jax.lax.while_loop(lambda s: (s.count < new) & ~s.ended.all(), step, first).ids


def _read(model: Any, prompt: Prompt, new: int, holds: bool) -> tuple[jax.Array, Cache, Any]:
    """The logits of the first new token, the cache with the prompt in it, and which tokens each row holds."""
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
    return logits, cache, held(ids, mask, logits.shape[-1]) if holds else None


_compiled = jax.jit(_sequence, static_argnums=(0, 1))
