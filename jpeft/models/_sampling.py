# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen from its logits: pure functions on `[batch, vocab]`, each one formula.

A rule that is not asked for is None, and not in the compiled program; the numbers of those that are can change without
a new one. They are applied in the order of the fields of `Rules`, which is transformers' order, and -inf stands for
what is ruled out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped


class Rules(NamedTuple):
    """What `jpeft.models.generate` was asked for; a temperature of None is greedy, ids of None rule nothing out."""

    repetition_penalty: Any = None
    suppress: Any = None
    begin_suppress: Any = None
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None


def rules(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    suppress: Any = None,
    begin_suppress: Any = None,
) -> Rules:
    """The rules, checked.

    Raises:
      ValueError: a number outside of its range, or one that greedy decoding would not heed.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is 0 (greedy) or more, got {temperature}")
    if top_k is not None and (top_k != int(top_k) or top_k < 1):
        raise ValueError(f"top_k is a number of tokens, 1 or more, got {top_k}")
    for name, value in {"top_p": top_p, "min_p": min_p}.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is a probability above 0 and up to 1, got {value}")
        if value is not None and not temperature:
            raise ValueError(f"{name}={value} is a rule of sampling, and temperature=0 takes the likeliest token")
    if top_k is not None and not temperature:
        raise ValueError(f"top_k={top_k} is a rule of sampling, and temperature=0 takes the likeliest token")
    if repetition_penalty is not None and not 0 < repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty is above 0 (1 is none), got {repetition_penalty}")
    always, first = _ids("suppress_tokens", suppress), _ids("begin_suppress_tokens", begin_suppress)
    return Rules(repetition_penalty, always, first, temperature or None, top_k, top_p, min_p)


def _ids(name: str, ids: Any) -> np.ndarray | None:
    if ids is None:
        return None
    found = np.atleast_1d(np.asarray(ids))
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or (found < 0).any():
        raise ValueError(f"{name} are ids of tokens, 0 or more, got {ids}")
    return found.astype(np.int32)


def choose(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"] | None, rules: Rules, keys: Any, place: Any
) -> Int[Array, " batch"]:
    """The next token of every row: the likeliest, or one drawn by softmax(logits) as the rules leave them.

    Args:
      logits: in float32.
      seen: the tokens that a row holds; None without a repetition_penalty.
      rules: which to apply.
      keys: of every row, `[batch]`; None where the choice is greedy.
      place: how many tokens a row was given before; each is drawn by a key of its own.
    """
    if rules.repetition_penalty is not None:
        assert seen is not None
        logits = penalised(logits, seen, rules.repetition_penalty)
    logits = suppressed(logits, rules.suppress, rules.begin_suppress, place)
    if rules.temperature is None:
        return likeliest(logits)
    logits = logits / rules.temperature
    for rule, number in ((top_k, rules.top_k), (top_p, rules.top_p), (min_p, rules.min_p)):
        logits = logits if number is None else rule(logits, number)
    noise = jax.vmap(lambda key, row: jax.random.gumbel(jax.random.fold_in(key, place), row.shape, row.dtype))
    return likeliest(logits + noise(keys, logits))  # as jax.random.categorical draws


def likeliest(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The first place of the largest number, or of the first NaN: as `jnp.argmax`, which on a CPU takes far longer."""
    largest = logits.max(-1, keepdims=True)
    vocab = logits.shape[-1]
    return jnp.where((logits == largest) | jnp.isnan(logits), jnp.arange(vocab, dtype=jnp.int32), vocab).min(-1)


def penalised(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: Any
) -> Float[Array, "batch vocab"]:
    """logit / penalty for a token that a row holds, or logit · penalty where it is negative (Keskar et al. 2019)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def suppressed(logits: Float[Array, "batch vocab"], always: Any, first: Any, place: Any) -> Float[Array, "batch vocab"]:
    """Without the tokens `always`, and at place 0 without `first` (`[n]` ids, or None)."""
    for ids, now in ((always, True), (first, place == 0)):
        if ids is not None:
            banned = jnp.zeros((1, logits.shape[-1]), bool).at[0, ids].set(now)
            logits = jnp.where(banned, -jnp.inf, logits)
    return logits


def top_k(logits: Float[Array, "batch vocab"], k: Any) -> Float[Array, "batch vocab"]:
    """The k likeliest, and those that are as likely as the last of them (Fan et al. 2018)."""
    vocab = logits.shape[-1]
    least = jnp.sort(logits, -1)[:, jnp.maximum(vocab - k, 0)]
    return jnp.where(logits < least[:, None], -jnp.inf, logits)


def top_p(logits: Float[Array, "batch vocab"], p: Any) -> Float[Array, "batch vocab"]:
    """The smallest set of the likeliest whose probabilities sum to p or more (Holtzman et al. 2020).

    Summed from the least likely on, as transformers does: those are dropped whose sum is 1 - p or less.
    """
    order = jnp.argsort(logits, -1)
    below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, -1), -1), -1)
    dropped = (below <= 1 - p).at[:, -1].set(False)
    return jnp.where(jnp.take_along_axis(dropped, jnp.argsort(order, -1), -1), -jnp.inf, logits)


def min_p(logits: Float[Array, "batch vocab"], p: Any) -> Float[Array, "batch vocab"]:
    """Those that are at least p times as probable as the likeliest (Nguyen et al. 2024)."""
    probabilities = jax.nn.softmax(logits, -1)
    least = p * probabilities.max(-1, keepdims=True)
    return jnp.where(probabilities < least, -jnp.inf, logits)


def held(ids: Int[Array, "batch seq"], mask: Shaped[Array, "batch seq"], vocab: int) -> Bool[Array, "batch vocab"]:
    """Which tokens stand in each row, padding aside."""
    rows = jnp.arange(len(ids))[:, None]
    return jnp.zeros((len(ids), vocab), bool).at[rows, jnp.where(mask != 0, ids, vocab)].set(True, mode="drop")
