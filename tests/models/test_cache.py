# SPDX-License-Identifier: Apache-2.0
"""A cache: token by token is the whole text at once, for every family, with padding, windows and virtual tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from llama_reference import CONFIGS, QUICK, TINY
from zoo_reference import build
from zoo_subjects import GEMMA2, GEMMA3, GPT2, PHI3, T5

import jpeft
from jpeft.models import _cache

#: Two float32 programs whose sums are over another number of (masked) terms, three layers deep.
ROUNDINGS = 2 * subjects.FLOAT32
VOCAB = 53
PROMPT, TOTAL = 7, 12
IDS = jnp.asarray(np.random.default_rng(0).integers(1, VOCAB, (3, TOTAL)))
#: Prompts of 7, 5 and 2 tokens.
MASK = jnp.arange(TOTAL)[None] >= jnp.array([[0], [2], [5]])
POSITIONS = jnp.maximum(jnp.cumsum(MASK, 1) - 1, 0)
FAMILIES = {name: CONFIGS[name] for name in ("llama", "mistral", "qwen2, windows", "qwen3")}
FAMILIES |= {"gpt2": GPT2.config, "gpt2 by layer": dict(GPT2.config) | dict(GPT2.variants["scores by layer"])}
FAMILIES |= {"gemma2": dict(GEMMA2.config), "gemma3": dict(GEMMA3.config)}
FAMILIES |= {"phi3": dict(PHI3.config) | dict(PHI3.variants["part of a head"])}
KEY = jax.random.key(0)


def whole(model, ids=IDS, mask=MASK, positions=POSITIONS):
    """Logits of the whole text; its first `PROMPT` columns are the prompt."""
    prompt = jnp.broadcast_to(np.arange(ids.shape[1])[None] < PROMPT, ids.shape)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model):
        with jpeft.prompt_tokens(prompt):
            return model(ids, mask, positions=positions)

    return run(model)


def in_steps(model, ids=IDS, mask=MASK, positions=POSITIONS, length=TOTAL):
    """Logits from the last token of the prompt on."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model):
        cache = model.cache(len(ids), length)
        first = (None if x is None else x[:, :PROMPT] for x in (ids, mask, positions))
        hidden, cache = model.prefill(cache, *first)

        def step(cache, token):
            hidden, cache = model.step(cache, token[:, None])
            return cache, hidden[:, 0]

        cache, later = jax.lax.scan(step, cache, ids[:, PROMPT:].T)
        return model.logits(jnp.concatenate([hidden[:, -1:], later.swapaxes(0, 1)], 1)), cache

    return run(model)


def check(model, **inputs):
    assert subjects.error(in_steps(model, **inputs)[0], whole(model, **inputs)[:, PROMPT - 1 :]) < ROUNDINGS


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_are_the_whole_text(name):
    check(build(FAMILIES[name], "CAUSAL_LM"))


def test_positions_count_padding_where_none_are_given():
    check(build(TINY, "CAUSAL_LM"), mask=None, positions=None)
    check(build(GPT2.config, "CAUSAL_LM"), positions=None)


METHODS = {
    "prompt": jpeft.PromptTuning(num_tokens=3),
    "p-tuning": jpeft.PTuning(num_tokens=2, hidden_size=5),
    "prefix": jpeft.PrefixTuning(num_tokens=3, shift_positions=True),
    "prompt and prefix": jpeft.PromptTuning(num_tokens=2) | jpeft.PrefixTuning(num_tokens=3, layers=[1]),
    "loreft": jpeft.LoReFT(rank=2, first=2, last=2) | jpeft.PromptTuning(num_tokens=2),
    "nice": jpeft.Pfeiffer(reduction_factor=2.0, invertible="nice"),
}


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_adapted_steps_are_the_whole_text(name, family):
    config = FAMILIES[family] | {"tie_word_embeddings": False}
    model = jpeft.adapt(build(config, "CAUSAL_LM"), METHODS[name], key=KEY)
    check(subjects.fill(model, scale=0.1))


@pytest.mark.parametrize("name", ["mistral", "qwen2, windows", "gemma3"])
def test_padding_between_virtual_tokens_and_the_text_changes_nothing_in_a_window(name):
    """A window is counted in positions there: the prompt stands in front of the row, however long the padding."""
    model = build(FAMILIES[name], "CAUSAL_LM")
    model = jpeft.adapt(model, jpeft.PromptTuning(num_tokens=3) | jpeft.PrefixTuning(num_tokens=2), key=KEY)
    padded = whole(model)
    for row, start in enumerate([0, 2, 5]):
        cut = {"ids": IDS[row : row + 1, start:], "mask": None, "positions": None}
        assert subjects.error(padded[row, start:], whole(model, **cut)[0]) < ROUNDINGS
    check(model)


def test_virtual_tokens_take_slots_and_a_prefix_takes_none():
    model = build(TINY, "CAUSAL_LM")
    assert model.cache(2, 5).kv.keys.shape == (3, 2, 2, 5, 6)
    prompt = jpeft.adapt(model, METHODS["prompt"], key=KEY)
    prefix = jpeft.adapt(model, METHODS["prefix"], key=KEY)
    assert (prompt.cache(2, 5).slots, prefix.cache(2, 5).slots) == (8, 5)
    _, cache = jax.jit(lambda model: model.prefill(model.cache(3, 9), IDS[:, :4], MASK[:, :4], POSITIONS[:, :4]))(
        prompt
    )
    assert cache.mask.astype(int).tolist()[1] == [1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert cache.places.tolist()[1][:7] == [0, 1, 2, 3, 3, 3, 4]
    assert (int(cache.used), cache.next.tolist()) == (7, [4, 2, 1])


@pytest.mark.parametrize("methods", [None, "prompts", "prefixes", "loreft"])
def test_a_decoder_beside_an_encoder(methods):
    """Encoded once: what comes of it is kept, with the virtual tokens of either side."""
    found = {
        "prompts": jpeft.PromptTuning(num_tokens=3, blocks=("encoder", "decoder")),
        "prefixes": jpeft.PrefixTuning(num_tokens=2, blocks=("attention", "cross_attention")),
        "loreft": jpeft.LoReFT(rank=2, first=1, last=2),
    }
    model = build(dict(T5.config) | {"num_decoder_layers": 3}, "SEQ_2_SEQ_LM")
    if methods:
        # an encoder of another depth than the decoder; a prefix needs them alike
        model = build(T5.config, "SEQ_2_SEQ_LM") if methods == "prefixes" else model
        model = subjects.fill(jpeft.adapt(model, found[methods], key=KEY), scale=0.1)
    text = jnp.asarray(np.random.default_rng(1).integers(1, VOCAB, (3, 9)))
    seen = jnp.arange(9)[None] >= jnp.array([[0], [3], [6]])
    prompt = jnp.broadcast_to(np.arange(TOTAL)[None] < PROMPT, IDS.shape)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model):
        encoded = model.encode(text, seen)
        with jpeft.prompt_tokens(prompt):
            expected = model.logits(model.decode(encoded, IDS, MASK, POSITIONS))
        first = (x[:, :PROMPT] for x in (IDS, MASK, POSITIONS))
        hidden, cache = model.prefill(model.cache(3, TOTAL), encoded, *first)

        def step(cache, token):
            hidden, cache = model.step(cache, token[:, None])
            return cache, hidden[:, 0]

        _, later = jax.lax.scan(step, cache, IDS[:, PROMPT:].T)
        return expected, model.logits(jnp.concatenate([hidden[:, -1:], later.swapaxes(0, 1)], 1)), cache.cross

    expected, logits, cross = run(model)
    assert subjects.error(logits, expected[:, PROMPT - 1 :]) < ROUNDINGS
    virtual = 3 if methods == "prompts" else 0
    assert cross.keys.shape == (model.config.num_decoder_layers, 3, 3, 9 + virtual, 10)


def test_a_longer_cache_changes_nothing():
    model = build(TINY, "CAUSAL_LM")
    assert subjects.error(in_steps(model, length=40)[0], in_steps(model)[0]) < subjects.FLOAT32


def test_a_full_cache_is_told_of():
    model = build(TINY, "CAUSAL_LM")
    logits, cache = in_steps(model, length=TOTAL - 1)  # compiled: the last step has no slot
    assert np.isnan(logits[:, -1]).all()
    assert not np.isnan(logits[:, :-1]).any()
    with pytest.raises(ValueError, match="all 11 slots of the cache are filled"):
        model.step(cache, IDS[:, :1])


def test_wrong_calls_are_refused():
    model = build(TINY, "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"3 rows and 12 tokens .* does not go into a cache of 3 rows and 5 slots"):
        jax.eval_shape(lambda: model.prefill(model.cache(3, 5), IDS))
    with pytest.raises(ValueError, match=r"3 rows and 12 tokens .* a cache of 2 rows"):
        jax.eval_shape(lambda: model.prefill(model.cache(2, 15), IDS))
    with pytest.raises(ValueError, match=r"a step reads one token .* got \(3, 12\)"):
        model.step(model.cache(3, 15), IDS)
    with pytest.raises(ValueError, match="a cache of 20 slots is longer than the 19 positions"):
        build(GPT2.config, "CAUSAL_LM").cache(1, 20)
    dynamic = build(CONFIGS["rope dynamic"], "CAUSAL_LM")
    assert dynamic.cache(1, 8).slots == 8
    with pytest.raises(ValueError, match=r"from 8 tokens on .* the dynamic rotary embedding"):
        dynamic.cache(1, 9)
    longrope = build(dict(PHI3.config) | dict(PHI3.variants["long"]), "CAUSAL_LM")
    assert longrope.cache(1, 8).slots == 8
    with pytest.raises(ValueError, match=r"from 8 tokens on \(original_max_position_embeddings\) the longrope"):
        longrope.cache(1, 9)


def test_the_place_of_a_token_is_one_for_all_rows_of_a_vmap():
    """What tells a compiler that slots are written last is 0, of any numbers, and has no axis of rows."""
    x = jnp.array([[1.0, -2.0], [jnp.nan, jnp.inf]])
    assert jax.vmap(_cache._nothing, out_axes=None)(x) == 0
    assert jax.jit(jax.vmap(_cache._nothing, out_axes=None))(x) == 0
