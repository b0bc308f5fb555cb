# SPDX-License-Identifier: Apache-2.0
"""Beam search against `transformers.generate`: the ids of every text, for penalties, ends, and ways to stop."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
import torch
import transformers
from generation_reference import IDS, MASK, family
from llama_reference import TINY
from zoo_reference import build
from zoo_subjects import T5

import jpeft
from jpeft import models

NEW = 8
KEY = jax.random.key(0)
#: An id that ends no row, as it is in no vocabulary.
NEVER = 10**6


def found_by(theirs, ends, **options):
    """transformers' texts `[batch, texts, new]`, with 0 behind their ends (where it puts an end once more)."""
    told = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": ends, "pad_token_id": 0, **options}
    out = theirs.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK).long(), **told).numpy()
    out = out[:, 1 if theirs.config.is_encoder_decoder else IDS.shape[1] :]
    out = np.pad(out, ((0, 0), (0, NEW - out.shape[1])))
    stops = np.isin(out, ends)
    out = np.where(np.cumsum(stops, 1) - stops > 0, 0, out)
    return out.reshape(len(IDS), -1, NEW)


#: Some that stop early, some that cannot; lengths favoured, ignored and disfavoured.
CASES = (
    {"num_beams": 2},
    {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
    {"num_beams": 4, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 4, "num_return_sequences": 4, "early_stopping": False, "length_penalty": -1.5},
    {"num_beams": 3, "num_return_sequences": 3, "early_stopping": "never", "length_penalty": 0.0},
)


def check(ours, theirs, ends, options):
    expected = found_by(theirs, ends, **options)
    told = {"num_return_sequences": 1} | options
    found = models.generate(ours, IDS, MASK, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=0, **told)
    np.testing.assert_array_equal(found, expected)
    return expected


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers, of generation options that it does not read
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_texts_are_transformers(name, tmp_path):
    theirs = family(name)
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    free = check(ours, theirs, [NEVER, NEVER + 1], CASES[1])
    assert (free[:, 0] != free[:, 1]).any()
    ends = [int(free[0, 0, 3]), int(free[1, 1, 2])]
    ended = [check(ours, theirs, ends, case) for case in CASES]
    assert any(np.isin(texts, ends).any() for texts in ended)
    assert (ended[2][:, :2] != ended[3][:, :2]).any()  # the penalty of a length matters


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_penalty_of_repetition_is_transformers(tmp_path):
    """Of T5, for of the others transformers penalises the padding token too."""
    theirs = family("t5")
    theirs.save_pretrained(tmp_path)
    told = {"num_beams": 3, "num_return_sequences": 3, "repetition_penalty": 1.8}
    penalised = check(models.load(tmp_path), theirs, [NEVER], told)
    assert (penalised != found_by(theirs, [NEVER], **{**told, "repetition_penalty": 1.0})).any()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapted_texts_are_those_of_the_merged_model(tmp_path):
    model = build(TINY, "CAUSAL_LM")
    lora = jpeft.LoRA(rank=2, alpha=9.0, targets="all-linear")
    adapted = subjects.fill(jpeft.adapt(model, lora, key=KEY))
    models.save(jpeft.merge(adapted), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = check(adapted, theirs, [7, 11], CASES[1])
    assert (texts[:, 0] != models.generate(model, IDS, MASK, max_new_tokens=NEW, num_beams=3)).any()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_bank_searches_every_row_with_its_own_adapter(name):
    config, task = (TINY, "CAUSAL_LM") if name == "llama" else (T5.config, "SEQ_2_SEQ_LM")
    model = build(config, task)
    method = jpeft.PromptTuning(num_tokens=2) | jpeft.LoRA(rank=2, alpha=9.0)
    adapted = [subjects.fill(jpeft.adapt(model, method, key=KEY), seed) for seed in (0, 1)]
    which = jnp.array([2, 0, 1])

    def call(model, ids, mask):
        return models.generate(model, ids, mask, max_new_tokens=5, num_beams=2, num_return_sequences=2, eos_token_id=9)

    found = jpeft.apply_bank(jpeft.bank(adapted), which, call, jnp.asarray(IDS), jnp.asarray(MASK))
    for row, slot in enumerate(which):
        np.testing.assert_array_equal(found[row], call([model, *adapted][slot], IDS, MASK)[row])


def test_one_program_for_all_penalties_and_ends(monkeypatch):
    module = vars(sys.modules[models.generate.__module__])
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(module["_searches"], n=1), static_argnums=(0, 1, 2))
    monkeypatch.setitem(module, "_search", traced)
    model = build(TINY, "CAUSAL_LM")
    for seq, penalty in ((1, 0.5), (5, -1.0), (16, 2.0)):
        told = {"num_beams": 2, "length_penalty": penalty, "eos_token_id": seq}
        models.generate(model, jnp.ones((2, seq), int), max_new_tokens=3, bucket=16, **told)


def test_the_score_of_a_text_is_its_log_probability():
    """One beam after another by hand: of all texts of two tokens from six, a search with six beams finds the best."""
    model = build(TINY | {"vocab_size": 6, "pad_token_id": 0}, "CAUSAL_LM")
    prompt = jnp.array([[1, 4, 2]])
    pairs = jnp.array([(a, b) for a in range(6) for b in range(6)])
    log_p = jax.nn.log_softmax(model(jnp.concatenate([jnp.broadcast_to(prompt, (36, 3)), pairs], 1)), -1)
    rows = jnp.arange(36)
    sums = log_p[rows, 2, pairs[:, 0]] + log_p[rows, 3, pairs[:, 1]]
    best = pairs[jnp.argsort(-sums)[:6]]
    found = models.generate(model, prompt, max_new_tokens=2, num_beams=6, num_return_sequences=6)
    np.testing.assert_array_equal(found[0], best)
