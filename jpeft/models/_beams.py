# SPDX-License-Identifier: Apache-2.0
"""Beam search: the likeliest texts that a few partial ones, kept side by side, lead to.

Every step takes the likeliest continuations of a prompt's beams. Those that end there compete with what ended before
by score = Σ log p / length ** length_penalty; the best that go on are the next beams. The rules for when to stop are
those of transformers' `generate`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._stack import take_apart
from ._cache import Cache, reordered, repeated, taken_apart
from ._prompt import Prompt, read
from ._sampling import penalised, suppressed

#: The score of what must not be chosen, as finite as transformers'.
_NEVER = -1e9


class Search(NamedTuple):
    """What a search is asked for.

    Attributes:
      beams: how many texts are kept for a prompt.
      early: True stops when as many have ended; False when no beam of the length reached would score better; "never"
        when none could at any length.
    """

    beams: int
    early: bool | str


class Scoring(NamedTuple):
    """Numbers of a search: of scores, of `_sampling.penalised` or None, ids that end a text, what stands behind.

    And ids that are ruled out, everywhere or at the start, or None.
    """

    length_penalty: Any
    repetition_penalty: Any
    ends: jax.Array
    pad: jax.Array
    suppress: Any = None
    begin_suppress: Any = None


class _Texts(NamedTuple):
    """Ids `[batch, beams, new]` and their scores `[batch, beams]`, the best first."""

    ids: jax.Array
    scores: jax.Array

    def take(self, order: jax.Array) -> "_Texts":
        return _Texts(_taken(self.ids, order), _taken(self.scores, order))


class _State(NamedTuple):
    """The loop's.

    Attributes:
      count: tokens written.
      live, ended: beams that go on, scored by Σ log p, and the best texts that have ended.
      full: `[batch, beams]`, which places of `ended` hold a text.
      open: `[batch]`, whether a better text may still come.
      spent: whether no beam can go on.
      seen: which tokens each beam holds, `[batch · beams, vocab]`, or None.
      cache: of all beams.
    """

    count: jax.Array
    live: _Texts
    ended: _Texts
    full: jax.Array
    open: jax.Array
    spent: jax.Array
    seen: Any
    cache: Cache


def searched(model: Any, prompt: Prompt, new: int, search: Search, scoring: Scoring) -> Int[Array, "batch beams new"]:
    """The best texts of every prompt, the best first. Takes the model apart."""
    logits, cache, seen = read(model, prompt, new, scoring.repetition_penalty is not None)
    take_apart(model)
    batch, beams = len(logits), search.beams
    logits, seen = jax.tree.map(lambda x: jnp.repeat(x, beams, 0), (logits, seen))
    ids = jnp.full((batch, beams, new), scoring.pad, jnp.int32)
    start = _State(
        count=jnp.zeros((), jnp.int32),
        live=_Texts(ids, jnp.full((batch, beams), _NEVER).at[:, 0].set(0.0)),  # the beams are still one and the same
        ended=_Texts(ids, jnp.full((batch, beams), _NEVER)),
        full=jnp.zeros((batch, beams), bool),
        open=jnp.ones(batch, bool),
        spent=jnp.zeros((), bool),
        seen=seen,
        cache=taken_apart(repeated(cache, beams)),
    )

    def goes_on(state: _State) -> jax.Array:
        satisfied = state.full.all() if search.early is True else False
        return state.open.any() & ~state.spent & jnp.logical_not(satisfied)

    def step(state: _State) -> _State:
        last = jax.lax.dynamic_slice_in_dim(state.live.ids, state.count - 1, 1, 2)
        hidden, cache = model.step(state.cache, last.reshape(-1, 1))
        return _grown(state._replace(cache=cache), model.logits(hidden)[:, 0], search, scoring)

    return jax.lax.while_loop(goes_on, step, _grown(start, logits, search, scoring)).ended.ids


def _grown(state: _State, logits: jax.Array, search: Search, scoring: Scoring) -> _State:
    """The state with all beams one token longer."""
    batch, beams, new = state.live.ids.shape
    kept = max(2, 1 + len(scoring.ends)) * beams  # so many that `beams` of them go on, even where all others end
    log_p = jax.nn.log_softmax(logits, -1)
    if state.seen is not None:
        log_p = penalised(log_p, state.seen, scoring.repetition_penalty)
    log_p = suppressed(log_p, scoring.suppress, scoring.begin_suppress, state.count)
    sums = log_p.reshape(batch, beams, -1) + state.live.scores[..., None]
    scores, index = jax.lax.top_k(sums.reshape(batch, -1), kept)
    origin, token = index // logits.shape[-1], (index % logits.shape[-1]).astype(jnp.int32)
    ids = jax.lax.dynamic_update_slice_in_dim(_taken(state.live.ids, origin), token[..., None], state.count, 2)
    count = state.count + 1
    stops = jnp.isin(token, scoring.ends) | (count >= new)
    left, chosen = jax.lax.top_k(scores + jnp.where(stops, _NEVER, 0.0), beams)
    rows = (jnp.arange(batch)[:, None] * beams + _taken(origin, chosen)).reshape(-1)
    live = _Texts(_taken(ids, chosen), left)
    ended, full = _ended(state, _Texts(ids, scores), stops, count, search, scoring)
    seen = state.seen
    if seen is not None:
        seen = seen[rows].at[jnp.arange(len(rows)), _taken(token, chosen).reshape(-1)].set(True)
    longest = jnp.where(scoring.length_penalty > 0, new, count) if search.early == "never" else count
    best = live.scores[:, :1] / longest.astype(jnp.float32) ** scoring.length_penalty
    worst = jnp.where(full, ended.scores.min(-1, keepdims=True), _NEVER)
    may_come = state.open & (best > worst).any(-1)
    return _State(count, live, ended, full, may_come, stops.all(), seen, reordered(state.cache, rows))


def _ended(
    state: _State, found: _Texts, stops: jax.Array, count: jax.Array, search: Search, scoring: Scoring
) -> tuple[_Texts, jax.Array]:
    """The best texts that have ended, those of this step among them; and which places hold one.

    Only the first `beams` continuations may end a text: the others are there for beams to go on with.
    """
    beams = search.beams
    just = stops & (jnp.arange(stops.shape[1]) < beams)[None]
    closed = ~state.open if search.early is not True else ~state.open | state.full.all(-1)
    scores = found.scores / count.astype(jnp.float32) ** scoring.length_penalty
    scores = scores + jnp.where(closed[:, None], _NEVER, 0.0) + jnp.where(just, 0.0, _NEVER)
    both = _Texts(*(jnp.concatenate(pair, 1) for pair in zip(state.ended, (found.ids, scores), strict=True)))
    _, best = jax.lax.top_k(both.scores, beams)
    return both.take(best), _taken(jnp.concatenate([state.full, just], 1), best)


def _taken(x: jax.Array, order: jax.Array) -> jax.Array:
    """`x` `[batch, n, ...]` at the places `order` `[batch, m]` of its second axis."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)
