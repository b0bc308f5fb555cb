# SPDX-License-Identifier: Apache-2.0
"""Token by token with a cache, every method computes what it computes for the whole text at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.models import VOCAB
from contracts.table import QUICK

import jpeft

pytestmark = pytest.mark.costly

IDS = jnp.asarray(np.random.default_rng(3).integers(0, VOCAB, (3, 8)))
#: Left-padded prompts of 5, 3 and 2 tokens, and what is written behind them.
MASK = jnp.arange(8)[None] >= jnp.array([[0], [2], [3]])
POSITIONS = jnp.maximum(jnp.cumsum(MASK, 1) - 1, 0)
PROMPT = 5


def test_cached_generation_equals_the_full_forward(case):
    """The logits after the prompt and after each further token; the prompt's ends are known to both."""
    if not case.row.caches:
        return
    graphdef, trainable, frozen = jpeft.partition(case.filled)
    expected = _at_once(graphdef, case.row.decodes, trainable, frozen)
    found = _in_steps(graphdef, case.row.decodes, trainable, frozen)
    assert found.shape == (3, 1 + IDS.shape[1] - PROMPT, VOCAB)
    assert subjects.error(found, expected[:, PROMPT - 1 :]) < subjects.FLOAT32


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _at_once(graphdef, decodes, trainable, frozen):
    model = jpeft.combine(graphdef, trainable, frozen)
    prompt = jnp.broadcast_to(np.arange(IDS.shape[1])[None] < PROMPT, IDS.shape)
    if not decodes:
        with jpeft.prompt_tokens(prompt):
            return model(IDS, MASK, positions=POSITIONS)
    encoded = model.encode(IDS, MASK, positions=POSITIONS)
    with jpeft.prompt_tokens(prompt):
        return model.logits(model.decode(encoded, IDS, MASK, POSITIONS))


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _in_steps(graphdef, decodes, trainable, frozen):
    model = jpeft.combine(graphdef, trainable, frozen)
    prompt = [x[:, :PROMPT] for x in (IDS, MASK, POSITIONS)]
    if decodes:
        prompt.insert(0, model.encode(IDS, MASK, positions=POSITIONS))
    hidden, cache = model.prefill(model.cache(3, IDS.shape[1]), *prompt)

    def step(cache, token):
        hidden, cache = model.step(cache, token[:, None])
        return cache, hidden[:, 0]

    _, later = jax.lax.scan(step, cache, IDS[:, PROMPT:].T)
    return model.logits(jnp.concatenate([hidden[:, -1:], later.swapaxes(0, 1)], 1))
