# SPDX-License-Identifier: Apache-2.0
"""Token by token with a cache, every method computes what it computes for the whole text at once."""

import functools
import itertools

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


@pytest.mark.slow
def test_a_bank_generates_for_every_row_by_its_own_adapter(case):
    """By two adapters and by none, each row with a cache of its own; under every order of the three."""
    if not case.row.caches:
        return
    models = [case.base, case.filled, subjects.fill(case.fresh(), seed=1, scale=0.2)]
    write = functools.partial(_write, decodes=case.row.decodes)
    alone = [_in_steps(*_parts(model, case.row.decodes)) for model in models]
    bank = jpeft.bank(models[1:])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def mixed(bank, which):
        def call(model, ids, mask, positions):
            return write(model, ids=ids, mask=mask, positions=positions)

        return jpeft.apply_bank(bank, which, call, IDS, MASK, POSITIONS)

    for which in itertools.permutations(range(3)):
        found = mixed(bank, np.array(which))
        for row, slot in enumerate(which):
            assert subjects.error(found[row], alone[slot][row]) < subjects.FLOAT32, (which, row)
    assert subjects.error(alone[1], alone[0]) > 1e-3


def _parts(model, decodes):
    graphdef, trainable, frozen = jpeft.partition(model)
    return graphdef, decodes, trainable, frozen


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
    return _write(jpeft.combine(graphdef, trainable, frozen), decodes, IDS, MASK, POSITIONS)


def _write(model, decodes, ids, mask, positions):
    prompt = [x[:, :PROMPT] for x in (ids, mask, positions)]
    if decodes:
        prompt.insert(0, model.encode(ids, mask, positions=positions))
    hidden, cache = model.prefill(model.cache(*ids.shape), *prompt)

    def step(cache, token):
        hidden, cache = model.step(cache, token[:, None])
        return cache, hidden[:, 0]

    _, later = jax.lax.scan(step, cache, ids[:, PROMPT:].T)
    return model.logits(jnp.concatenate([hidden[:, -1:], later.swapaxes(0, 1)], 1))
