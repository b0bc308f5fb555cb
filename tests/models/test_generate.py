# SPDX-License-Identifier: Apache-2.0
"""Generation against `transformers.generate`, its rules against transformers' and the formula of sampling."""

import functools
import importlib
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
import torch
import transformers
from generation_reference import IDS, MASK, family
from llama_reference import CONFIGS, TINY
from transformers.generation import logits_process
from zoo_reference import build
from zoo_subjects import GPT2

import jpeft
from jpeft import _stack, models
from jpeft.models import _cache, _sampling
from jpeft.models.llama import Llama

KEY = jax.random.key(0)
NEW = 9
#: An id that ends no row, as it is in no vocabulary.
NEVER = 10**6


def written(theirs, eos, **options):
    """What transformers writes, filled up with padding."""
    told = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 0, **options}
    out = theirs.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK).long(), **told).numpy()
    out = out[:, 1 if theirs.config.is_encoder_decoder else IDS.shape[1] :]
    return np.pad(out, ((0, 0), (0, NEW - out.shape[1])))


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers, of generation options that it does not read
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "t5", "t5 v1.1"])
def test_greedy_ids_are_transformers(name, tmp_path):
    theirs = family(name)
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    told = {"max_new_tokens": NEW, "pad_token_id": 0}
    expected = written(theirs, NEVER)
    assert len({*expected.flat}) > 2
    np.testing.assert_array_equal(models.generate(ours, IDS, MASK, eos_token_id=NEVER, **told), expected)
    end = int(expected[0, 3])  # ends the rows that come to it
    ended = written(theirs, end)
    assert (ended != expected).any()
    np.testing.assert_array_equal(models.generate(ours, IDS, MASK, eos_token_id=end, **told), ended)
    penalised = written(theirs, NEVER, repetition_penalty=1.7)
    assert (penalised != expected).any()
    if name.startswith("t5"):  # of others transformers penalises the padding token too
        found = models.generate(ours, IDS, MASK, eos_token_id=NEVER, repetition_penalty=1.7, **told)
        np.testing.assert_array_equal(found, penalised)


def test_stories260k_tells_its_story(data):
    folder = data / "models" / "stories260K"
    expected = json.loads((folder / "expected.json").read_text())
    start, story = expected["prompt_ids"], expected["greedy_ids"]
    new = len(story) - len(start)
    assert new == 200
    found = models.generate(models.load(folder), jnp.array([start]), max_new_tokens=new)
    assert found.tolist() == [story[len(start) :]]


# What must not matter -------------------------------------------------------------------------------------------------


@pytest.fixture(name="model", scope="module")
def _model():
    return build(TINY, "CAUSAL_LM")


def test_padding_and_buckets_change_nothing(model):
    expected = models.generate(model, IDS, MASK, max_new_tokens=NEW)
    right = MASK[:, ::-1]
    ids = np.full(IDS.shape, 17)
    ids[right] = IDS[MASK]
    np.testing.assert_array_equal(models.generate(model, ids, right, max_new_tokens=NEW), expected)
    np.testing.assert_array_equal(models.generate(model, IDS, MASK, max_new_tokens=NEW, bucket=5), expected)
    for row, start in enumerate([0, 3, 6]):
        alone = models.generate(model, IDS[row : row + 1, start:], max_new_tokens=NEW, bucket=1)
        np.testing.assert_array_equal(alone[0], expected[row])


def test_one_program_for_all_lengths_of_a_bucket_and_all_numbers(model, monkeypatch):
    chex.clear_trace_counter()
    module = importlib.import_module("jpeft.models.generate")
    traced = jax.jit(chex.assert_max_traces(module._writes, n=1), static_argnums=(0, 1, 2))
    monkeypatch.setattr(module, "_write", traced)
    for seq, temperature, seed in ((1, 0.7, 0), (5, 1.0, 1), (16, 2.5, 2)):
        told = {
            "temperature": temperature,
            "top_p": 0.3 * temperature,
            "eos_token_id": seed,
            "key": jax.random.key(seed),
        }
        models.generate(model, jnp.ones((2, seq), int), max_new_tokens=3, bucket=16, **told)
    with pytest.raises(AssertionError, match="traced"):
        models.generate(model, jnp.ones((2, 17), int), max_new_tokens=3, bucket=16, **told)


@pytest.mark.parametrize("beams", [1, 2])
def test_layers_apart_and_in_a_scan_write_the_same(model, beams, monkeypatch):
    """A loop takes a model's stacks apart on a CPU alone."""
    told = {"max_new_tokens": NEW, "num_beams": beams}
    apart = models.generate(model, IDS, MASK, **told)
    monkeypatch.setattr(_stack, "loops_apart", lambda: False)
    monkeypatch.setattr(_cache, "loops_apart", lambda: False)
    jax.clear_caches()
    np.testing.assert_array_equal(models.generate(model, IDS, MASK, **told), apart)
    jax.clear_caches()


def test_the_loop_stops_when_all_rows_have_ended(model, monkeypatch):
    first = models.generate(model, IDS, MASK, max_new_tokens=4)
    steps = []
    step = Llama.step
    monkeypatch.setattr(Llama, "step", lambda self, *inputs: jax.debug.callback(steps.append, 0) or step(self, *inputs))
    jax.clear_caches()
    found = models.generate(model, IDS, MASK, max_new_tokens=4, eos_token_id=first[:, 1].tolist(), pad_token_id=0)
    jax.effects_barrier()
    assert found[:, 2:].tolist() == [[0, 0]] * 3
    assert len(steps) == 1


def test_positions_run_out_by_real_length_alone():
    """A bucket wider than GPT-2's 19 positions is cut to what fits."""
    gpt2 = jpeft.adapt(build(GPT2.config, "CAUSAL_LM"), jpeft.PromptTuning(num_tokens=2), key=KEY)
    wide = models.generate(gpt2, IDS, MASK, max_new_tokens=9)
    np.testing.assert_array_equal(wide, models.generate(gpt2, IDS, MASK, max_new_tokens=9, bucket=1))
    with pytest.raises(ValueError, match=r"more than the 19 positions|longer than the 19 positions"):
        models.generate(gpt2, IDS, MASK, max_new_tokens=11)


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        jpeft.LoRA(rank=2, alpha=9.0, targets="all-linear"),
        jpeft.PromptTuning(num_tokens=3),
        jpeft.PrefixTuning(num_tokens=3),
        jpeft.LoReFT(rank=2, first=2, last=1),
    ],
    ids=lambda method: method.kind,
)
def test_a_bank_gives_every_row_its_own_adapter(model, method):
    adapted = [subjects.fill(jpeft.adapt(model, method, key=KEY), seed) for seed in (0, 1)]
    bank, which = jpeft.bank(adapted), jnp.array([2, 0, 1])

    def call(model, ids, mask):
        return models.generate(model, ids, mask, max_new_tokens=5)

    found = jpeft.apply_bank(bank, which, call, jnp.asarray(IDS), jnp.asarray(MASK))
    for row, slot in enumerate(which):
        alone = [model, *adapted][slot]
        np.testing.assert_array_equal(found[row], call(alone, IDS, MASK)[row])
    assert (found[0] != call(model, IDS, MASK)[0]).any()


def test_the_prompt_may_be_marked(model):
    """LoReFT acts on the marked tokens, wherever padding has moved them; what is written is never among them."""
    reft = subjects.fill(jpeft.adapt(model, jpeft.LoReFT(rank=2, first=0, last=1), key=KEY))
    marked = MASK & (np.arange(7)[None] < 6)
    marked[2, 6] = True
    with jpeft.prompt_tokens(marked):
        found = models.generate(reft, IDS, MASK, max_new_tokens=1)
        logits = reft(jnp.asarray(IDS), jnp.asarray(MASK), positions=jnp.maximum(jnp.cumsum(MASK, 1) - 1, 0))
    np.testing.assert_array_equal(found[:, 0], logits[:, -1].argmax(-1))
    with jpeft.prompt_tokens(marked[:, :3]), pytest.raises(ValueError, match=r"says of \(3, 3\) tokens"):
        models.generate(reft, IDS, MASK, max_new_tokens=1)


# Sampling -------------------------------------------------------------------------------------------------------------

LOGITS = np.random.default_rng(1).normal(scale=3.0, size=(8, 40)).astype(np.float32)
HELD = np.random.default_rng(2).integers(0, 40, (8, 6))
#: name -> (ours, theirs)
RULES = {
    "top_k=1": (functools.partial(_sampling.top_k, k=1), logits_process.TopKLogitsWarper(1)),
    "top_k=7": (functools.partial(_sampling.top_k, k=7), logits_process.TopKLogitsWarper(7)),
    "top_k=99": (functools.partial(_sampling.top_k, k=99), logits_process.TopKLogitsWarper(99)),
    "top_p=0.1": (functools.partial(_sampling.top_p, p=0.1), logits_process.TopPLogitsWarper(0.1)),
    "top_p=0.9": (functools.partial(_sampling.top_p, p=0.9), logits_process.TopPLogitsWarper(0.9)),
    "top_p=1": (functools.partial(_sampling.top_p, p=1.0), logits_process.TopPLogitsWarper(1.0)),
    "min_p=0.05": (functools.partial(_sampling.min_p, p=0.05), logits_process.MinPLogitsWarper(0.05)),
    "min_p=1": (functools.partial(_sampling.min_p, p=1.0), logits_process.MinPLogitsWarper(1.0)),
    "repetition_penalty=2": (  # of a power of two the quotients are exact
        lambda logits: _sampling.penalised(logits, _sampling.held(jnp.asarray(HELD), jnp.ones_like(HELD), 40), 2.0),
        logits_process.RepetitionPenaltyLogitsProcessor(2.0),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_transformers(name):
    ours, theirs = RULES[name]
    expected = theirs(torch.tensor(HELD), torch.tensor(LOGITS)).numpy()
    np.testing.assert_array_equal(ours(jnp.asarray(LOGITS)), expected)


def test_rules_follow_each_other_as_in_transformers():
    """All at once: what is left, seen by drawing often, is what their list leaves."""
    config = {"repetition_penalty": 1.3, "temperature": 2.0, "top_k": 12, "top_p": 0.8, "min_p": 0.1}
    processors = transformers.LogitsProcessorList(
        [
            logits_process.RepetitionPenaltyLogitsProcessor(config["repetition_penalty"]),
            logits_process.TemperatureLogitsWarper(config["temperature"]),
            logits_process.TopKLogitsWarper(config["top_k"]),
            logits_process.TopPLogitsWarper(config["top_p"]),
            logits_process.MinPLogitsWarper(config["min_p"]),
        ]
    )
    left = np.isfinite(processors(torch.tensor(HELD), torch.tensor(LOGITS)).numpy())
    rules, seen = _sampling.rules(**config), _sampling.held(jnp.asarray(HELD), jnp.ones_like(HELD), 40)
    draw = jax.vmap(lambda key: _sampling.choose(jnp.asarray(LOGITS), seen, rules, jax.random.split(key, 8), 0))
    drawn = np.asarray(draw(jax.random.split(KEY, 2000)))
    for row in range(8):
        assert {*drawn[:, row].tolist()} == {*np.flatnonzero(left[row]).tolist()}


def test_what_a_row_draws_depends_on_its_own_key(model):
    keys = jax.random.split(jax.random.key(4), 3)
    told = {"max_new_tokens": NEW, "temperature": 1.5}
    found = models.generate(model, IDS, MASK, key=keys, **told)
    np.testing.assert_array_equal(found, models.generate(model, IDS, MASK, key=keys, **told))
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(
        models.generate(model, IDS[order], MASK[order], key=keys[order], **told), found[order]
    )
    one = models.generate(model, IDS[[0, 0, 0]], MASK[[0, 0, 0]], key=KEY, **told)
    assert (one[0] != one[1]).any()


# Errors ---------------------------------------------------------------------------------------------------------------


def test_wrong_calls_are_refused(model):
    run = functools.partial(models.generate, model, IDS, max_new_tokens=2)
    for told, message in (
        ({"temperature": -1.0}, "temperature is 0"),
        ({"temperature": 1.0, "top_k": 0, "key": KEY}, "top_k is a number of tokens"),
        ({"temperature": 1.0, "top_p": 0.0, "key": KEY}, "top_p is a probability"),
        ({"temperature": 1.0, "min_p": 1.1, "key": KEY}, "min_p is a probability"),
        ({"top_k": 3}, "top_k=3 is a rule of sampling"),
        ({"top_p": 0.5}, "top_p=0.5 is a rule of sampling"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is above 0"),
        ({"temperature": 1.0}, "tokens are drawn where temperature is above 0"),
        ({"temperature": 1.0, "key": jnp.zeros(2, jnp.uint32)}, "key is made by jax.random.key"),
        ({"temperature": 1.0, "key": jax.random.split(KEY, 2)}, "one for each of the 3 rows"),
        ({"attention_mask": MASK[:, :3]}, r"got \(3, 7\) and \(3, 3\)"),
        ({"attention_mask": MASK & (np.arange(3) != 1)[:, None]}, r"hides all of the rows \[1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens is a whole number"),
        ({"bucket": 0}, "bucket is a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**told)
    with pytest.raises(ValueError, match="got Llama with the task FEATURE_EXTRACTION"):
        models.generate(build(CONFIGS["tied"], "FEATURE_EXTRACTION"), IDS, max_new_tokens=2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_no_step_copies_the_cache(name, tmp_path):
    """In the compiled loop nothing of the cache's shape is copied: slots are written where they lie."""
    family(name).save_pretrained(tmp_path)
    model = models.load(tmp_path)
    generate = importlib.import_module("jpeft.models.generate")
    call = generate._call(model, IDS, MASK, models.Options(max_new_tokens=NEW, bucket=8))
    program = generate._write.lower(*call.sizes, call.leaves, call.prompt, call.how).compile().as_text()
    loops = [_computation(program, name) for name in re.findall(r"body=%([\w.]+)", program)]
    slots = r"= (f32\[\d+,\d+,\d+,\d+\])\S* "  # of one layer; a prompt's are of all layers
    ((loop, written),) = [
        (loop, found) for loop in loops if (found := re.findall(rf"{slots}fusion\(.*dynamic_update_slice", loop))
    ]
    assert len(written) == 2 * jax.eval_shape(lambda: model.cache(1, 4)).kv.keys.shape[0]
    assert not {*written} & {*re.findall(rf"{slots}copy\(", loop)}


def _computation(program, name):
    """The text of one of a program's computations."""
    return program.split(f"\n%{name} (", 1)[1].split("\n}", 1)[0]
