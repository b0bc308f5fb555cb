# SPDX-License-Identifier: Apache-2.0
"""Rows written token by token: what one such step knows, its start from a prompt, and the loop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._stack import take_apart
from ._cache import Cache, repeated, taken_apart
from ._prompt import Prompt, read
from ._sampling import Rules, choose


class How(NamedTuple):
    """What rows are written by: rules, a key for each row or None, ids that end a row, and what stands behind."""

    rules: Rules
    keys: Any
    ends: jax.Array
    pad: jax.Array


class State(NamedTuple):
    """What was written, `[rows, new]`, and how much of it; who has ended, what rows hold, and the cache."""

    count: jax.Array
    ids: jax.Array
    ended: jax.Array
    seen: Any
    cache: Cache


def begun(model: Any, prompt: Prompt, new: int, samples: int, how: How) -> State:
    """The prompts read, once each, and the first token written in each of their `samples` rows."""
    logits, cache, seen = read(model, prompt, new, how.rules.repetition_penalty is not None)
    if samples > 1:
        cache = repeated(cache, samples)
        logits, seen = jax.tree.map(lambda x: jnp.repeat(x, samples, 0), (logits, seen))
    cache = taken_apart(cache)
    empty = jnp.full((len(logits), new), how.pad, jnp.int32)
    return _written(State(jnp.zeros((), jnp.int32), empty, jnp.zeros(len(logits), bool), seen, cache), logits, how)


def advanced(model: Any, state: State, until: Any, how: How) -> State:
    """Goes on until `until` tokens are written in all, or every row has ended. Takes the model apart."""
    take_apart(model)

    def step(state: State) -> State:
        last = jax.lax.dynamic_slice_in_dim(state.ids, state.count - 1, 1, 1)
        hidden, cache = model.step(state.cache, last)
        return _written(state._replace(cache=cache), model.logits(hidden)[:, 0], how)

    return jax.lax.while_loop(lambda s: (s.count < until) & ~s.ended.all(), step, state)


def _written(state: State, logits: jax.Array, how: How) -> State:
    """The state with one token more in every row that has not ended."""
    token = jnp.where(state.ended, how.pad, choose(logits, state.seen, how.rules, how.keys, state.count))
    seen = None if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
    return state._replace(
        count=state.count + 1,
        ids=jax.lax.dynamic_update_slice_in_dim(state.ids, token[:, None], state.count, 1),
        ended=state.ended | jnp.isin(token, how.ends),
        seen=seen,
    )
