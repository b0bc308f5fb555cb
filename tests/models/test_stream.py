# SPDX-License-Identifier: Apache-2.0
"""Several texts of a prompt that is read once, and ids that come in chunks: the same as written one by one, at once."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_reference import IDS, MASK
from llama_reference import TINY
from zoo_reference import build
from zoo_subjects import T5

import jpeft
from jpeft import models

KEY = jax.random.key(3)
NEW = 7


@pytest.fixture(name="model", scope="module")
def _model():
    return build(TINY, "CAUSAL_LM")


def test_texts_of_a_prompt_are_those_of_repeated_prompts(model):
    told = {"max_new_tokens": NEW, "temperature": 1.5, "repetition_penalty": 1.2}
    found = models.generate(model, IDS, MASK, num_return_sequences=3, key=KEY, **told)
    assert found.shape == (3, 3, NEW)
    fold = jax.random.fold_in
    keys = jnp.stack([jnp.stack([fold(fold(KEY, row), text) for text in range(3)]) for row in range(3)])
    alone = models.generate(model, np.repeat(IDS, 3, 0), np.repeat(MASK, 3, 0), key=keys.reshape(-1), **told)
    np.testing.assert_array_equal(found.reshape(9, NEW), alone)
    np.testing.assert_array_equal(models.generate(model, IDS, MASK, num_return_sequences=3, key=keys, **told), found)
    assert len({tuple(row) for row in found.reshape(9, NEW).tolist()}) == 9


def test_texts_of_an_encoded_prompt_in_a_bank():
    base = build(T5.config, "SEQ_2_SEQ_LM")
    bank = jpeft.bank([jpeft.adapt(base, jpeft.LoRA(rank=2, init="gaussian"), key=KEY)])
    keys = jax.random.split(KEY, 3)

    def call(model, ids, mask, keys):
        told = {"max_new_tokens": 4, "temperature": 2.0, "num_return_sequences": 2}
        return models.generate(model, ids, mask, key=keys, **told)

    found = jpeft.apply_bank(bank, jnp.zeros(3, int), call, jnp.asarray(IDS), jnp.asarray(MASK), keys)
    np.testing.assert_array_equal(found, call(base, IDS, MASK, keys))


def test_a_prompt_is_read_once(model, monkeypatch):
    rows = []
    read = type(model).prefill
    monkeypatch.setattr(
        type(model), "prefill", lambda self, cache, ids, *rest: rows.append(len(ids)) or read(self, cache, ids, *rest)
    )
    jax.clear_caches()
    models.generate(model, IDS, MASK, max_new_tokens=2, temperature=1.0, key=KEY, num_return_sequences=4)
    models.generate(model, IDS, MASK, max_new_tokens=2, num_beams=4)
    assert rows == [3, 3]


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_chunks_are_the_whole(model, chunk):
    told = {"max_new_tokens": NEW, "temperature": 1.5, "key": KEY, "num_return_sequences": 2}
    expected = models.generate(model, IDS, MASK, **told)
    chunks = list(models.stream(model, IDS, MASK, chunk=chunk, **told))
    assert [x.shape[-1] for x in chunks[:-1]] == [chunk] * (len(chunks) - 1)
    np.testing.assert_array_equal(np.concatenate(chunks, -1), expected)


def test_a_stream_stops_when_all_rows_have_ended(model):
    whole = models.generate(model, IDS, MASK, max_new_tokens=NEW)
    ends = {"eos_token_id": whole[:, 2].tolist(), "pad_token_id": 0}
    ended = np.asarray(models.generate(model, IDS, MASK, max_new_tokens=NEW, **ends))
    length = int((ended != 0).any(0).sum())
    assert length <= 3
    for chunk in (1, 2, 3, 5):
        found = np.concatenate(list(models.stream(model, IDS, MASK, max_new_tokens=NEW, chunk=chunk, **ends)), -1)
        np.testing.assert_array_equal(found, ended[:, :length])


def test_two_programs_for_all_prompts_chunks_numbers_and_adapters(model, monkeypatch):
    chunks = vars(sys.modules[models.stream.__module__])
    chex.clear_trace_counter()
    begins = jax.jit(chex.assert_max_traces(chunks["_begins"], n=1), static_argnums=(0, 1, 2))
    advances = jax.jit(chex.assert_max_traces(chunks["_advances"], n=1), static_argnums=0, donate_argnums=2)
    monkeypatch.setitem(chunks, "_begin", begins)
    monkeypatch.setitem(chunks, "_advance", advances)
    adapted = [jpeft.adapt(model, jpeft.LoRA(rank=rank, init="gaussian"), key=KEY) for rank in (2, 4)]
    bank = jpeft.bank(adapted)
    for slot, seq, chunk, temperature in ((0, 3, 1, 0.5), (1, 9, 4, 1.0), (2, 16, 2, 2.0)):
        speaker = bank.combine(*jpeft.select(bank, slot))
        told = {"max_new_tokens": 5, "temperature": temperature, "key": jax.random.key(slot), "bucket": 16}
        assert list(models.stream(speaker, jnp.ones((1, seq), int), chunk=chunk, **told))


def test_wrong_calls_are_refused(model):
    for told, message in (
        ({"num_return_sequences": 2}, "would be one text 2 times"),
        ({"num_return_sequences": 0}, "num_return_sequences is a whole number"),
        ({"num_beams": 0}, "num_beams is a whole number"),
        ({"num_beams": 2, "num_return_sequences": 3}, "ends with as many texts, not with 3"),
        ({"num_beams": 2, "temperature": 1.0, "key": KEY}, "temperature draws one"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 is a rule of a search"),
        ({"early_stopping": True}, "early_stopping=True is a rule of a search"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is True, False or 'never'"),
        (
            {"temperature": 1.0, "num_return_sequences": 2, "key": jax.random.split(KEY, 4)},
            r"or \[3, 2\]: one for each",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            models.generate(model, IDS, max_new_tokens=2, **told)
    with pytest.raises(ValueError, match="chunk is a number of tokens"):
        models.stream(model, IDS, max_new_tokens=2, chunk=0)
    with pytest.raises(ValueError, match="finds its text at the end alone"):
        models.stream(model, IDS, max_new_tokens=2, num_beams=2)
