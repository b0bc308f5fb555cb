# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens in packed rows: every example as by itself, with a copy of the prompt or the one that all share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.models import BERT, LLAMA, VOCAB
from virtual_oracle import run

import jpeft

KEY = jax.random.key(0)
ROBERTA = BERT | {"model_type": "roberta", "pad_token_id": 4, "max_position_embeddings": 24}
DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": VOCAB,
    "dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 12,
    "max_position_embeddings": 20,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 4}
MIXED = LLAMA | {"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
#: Their examples' virtual tokens differ: the model's tokens see those after them.
OWN = {
    "bert": BERT | {"max_position_embeddings": 20},
    "roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "classifying llama": LLAMA | {"model_type": "mistral", "sliding_window": 5, "max_position_embeddings": 24},
}
#: They share one prompt, and see it through a window of 4 positions, in all layers or one.
SHARED = {"windows": MISTRAL, "a window in one layer": MIXED}
CONFIGS = OWN | SHARED
PROMPT = jpeft.PromptTuning(num_tokens=3)
METHODS = {
    "prompt tuning": PROMPT,
    "p-tuning": jpeft.PTuning(num_tokens=3, hidden_size=5),
    "two prompts": PROMPT | jpeft.PTuning(num_tokens=2, reparam="lstm", hidden_size=5),
}
#: What becomes of a prefix, and of a prompt even in a causal model, depends on the text: on models of `OWN` alone.
GATED_PREFIX = jpeft.PrefixTuning(num_tokens=2, gate=True)
GATED = {
    "gated prefix": GATED_PREFIX,
    "gated prefix in a layer": jpeft.PrefixTuning(num_tokens=2, gate=True, layers=[1], shift_positions=True),
    "prompt and gates": PROMPT | GATED_PREFIX | jpeft.Pfeiffer(reduction_factor=2, gate=True),
    "unipelt": jpeft.UniPELT(num_tokens=2, hidden_size=5, reduction_factor=2),
}
FAST = [("roberta", "two prompts"), ("windows", "prompt tuning"), ("classifying llama", "prompt and gates")]
#: Padding at the ends and between, ids that do not rise; one example alone; as many as there is room for.
SEGMENTS = np.array([[9, 9, 9, 0, 2, 0, 0, 5, 5, 5, 5, 0], [7] * 11 + [0], [3, 1, 1, 2, 2, 2, 8, 8, 8, 4, 4, 4]])
MASK = np.where(SEGMENTS > 0, 1, 0)
IDS = np.random.default_rng(0).integers(5, VOCAB, SEGMENTS.shape)
EXAMPLES = [(row, SEGMENTS[row] == i) for row in range(3) for i in np.unique(SEGMENTS[row]) if i]
#: A float32 forward pass over rows of another length: the same sums in another order, through all layers.
PACKED = 1e-5
#: Likewise in float64, and of gradients.
EXACT = 1e-11


def adapted(config, method=PROMPT):
    task = "TOKEN_CLS" if config in OWN.values() else "CAUSAL_LM"
    return subjects.fill(jpeft.adapt(jpeft.models.build(config, task, key=KEY), method, key=KEY))


def packed(model, most=None):
    with jpeft.max_segments(6 if most is None else most):
        return run(model, IDS, MASK, segment_ids=SEGMENTS)


def apart(values, fill=0):
    """`values` of the packed rows, every example in a row of its own, filled up behind."""
    rows = np.full((len(EXAMPLES), *values.shape[1:]), fill, values.dtype)
    for at, (row, own) in enumerate(EXAMPLES):
        rows[at, : own.sum()] = values[row][own]
    return rows


CASES = [
    pytest.param(name, method, marks=() if (name, method) in FAST else pytest.mark.slow)
    for name in CONFIGS
    for method in METHODS | (GATED if name in OWN else {})
]


@pytest.mark.parametrize("name, method", CASES)
def test_every_example_is_as_by_itself(name, method):
    """Outputs at its tokens, and the sum of its gradients, in float64."""
    with jax.enable_x64(True):
        graphdef, trainable, frozen = jpeft.partition(
            subjects.in_float64(adapted(CONFIGS[name], (METHODS | GATED)[method]))
        )
        shape = (*IDS.shape, 2 if name in OWN else VOCAB)
        weights = np.random.default_rng(5).standard_normal(shape) * MASK[..., None]

        @jax.jit
        @functools.partial(jax.grad, has_aux=True)
        def gradient(trainable, weights, *inputs, **options):
            out = jpeft.combine(graphdef, trainable, frozen)(*inputs, **options)
            return (weights * jnp.sin(out)).sum(), out

        with jpeft.max_segments(6):
            gradients, out = gradient(trainable, weights, IDS, MASK, segment_ids=SEGMENTS)
        pad = CONFIGS[name].get("pad_token_id", 0)
        expected, alone = gradient(trainable, apart(weights), apart(IDS, pad), apart(MASK))
    text = apart(MASK) == 1
    assert out.dtype == np.float64
    assert subjects.error(apart(np.asarray(out))[text], alone[text]) < EXACT
    assert any(np.abs(value).max() > 1e-3 for value in expected.values())
    for path, value in expected.items():
        assert subjects.error(gradients[path], value) < EXACT, path


def test_room_that_no_example_needs_changes_nothing():
    """Outside of a compiled program the examples are counted; none of the copies left over is seen."""
    model = adapted(OWN["bert"])
    expected = model(IDS, MASK, segment_ids=SEGMENTS)
    assert subjects.error(packed(model, 9)[MASK == 1], expected[MASK == 1]) < PACKED
    whole = np.where(np.arange(12) < 5, 1, 2)[None]
    expected = np.concatenate([run(model, IDS[:1, :5]), run(model, IDS[:1, 5:])], 1)
    assert subjects.error(model(IDS[:1], segment_ids=whole), expected) < PACKED


def test_a_gate_of_a_virtual_token_is_its_own_examples():
    """LoRA's gate is a mean over an example's text, at its virtual tokens too."""
    model = adapted(OWN["bert"], PROMPT | jpeft.LoRA(rank=2, alpha=3.0, targets=["query"], gate=True))
    got, text = apart(packed(model)), apart(MASK) == 1
    assert subjects.error(got[text], run(model, apart(IDS), apart(MASK))[text]) < PACKED


@pytest.mark.parametrize("gates", [(True, False), (False, True), (True, True)])
def test_a_gated_prefix_beside_another(gates):
    """Some keys in front are for one example's queries, others for all."""
    model = adapted(OWN["bert"], jpeft.PrefixTuning(num_tokens=2, gate=gates[0]))
    model = subjects.fill(jpeft.adapt(model, jpeft.PrefixTuning(num_tokens=3, gate=gates[1]), name="second", key=KEY))
    got, text = apart(packed(model)), apart(MASK) == 1
    assert subjects.error(got[text], run(model, apart(IDS), apart(MASK))[text]) < PACKED


@pytest.mark.parametrize("kind", [jpeft.PromptTuning, functools.partial(jpeft.PrefixTuning, gate=True)])
def test_a_bank_of_virtual_tokens_of_several_lengths_packs(kind):
    models = [adapted(OWN["bert"], kind(num_tokens=n)) for n in (1, 3)]
    bank = jpeft.bank(models)
    got, expected = packed(bank.combine(*jpeft.select(bank, 1))), packed(models[0])
    assert subjects.error(got[MASK == 1], expected[MASK == 1]) < PACKED


# Room.


def test_more_examples_than_room_are_refused_or_nan():
    model = adapted(OWN["bert"])
    with (
        jpeft.max_segments(4),
        pytest.raises(ValueError, match=r"holds 5 examples, and .*max_segments allows 4; raise"),
    ):
        model(IDS, MASK, segment_ids=SEGMENTS)
    got = packed(model, 4)
    np.testing.assert_array_equal(np.isnan(got).all((1, 2)), [False, False, True])
    assert np.isfinite(got[:2]).all()


def test_a_compiled_program_is_told_how_many_examples_a_row_has():
    with pytest.raises(ValueError, match=r"not known while a program is compiled; say it by `with jpeft.max_segments"):
        run(adapted(OWN["bert"]), IDS, MASK, segment_ids=SEGMENTS)
    assert np.isfinite(run(adapted(LLAMA), IDS, MASK, segment_ids=SEGMENTS)).all()
    with pytest.raises(ValueError, match="max_segments's count must be a whole number of at least 1, got 0"):
        jpeft.max_segments(0).__enter__()


@pytest.mark.parametrize("name, tokens", [("roberta", 9), pytest.param("distilbert", 10, marks=pytest.mark.slow)])
def test_an_example_longer_than_the_positions_is_refused(name, tokens):
    """Of 11 tokens behind so many virtual ones the last has no position; the row itself may be as long as it likes."""
    fits, long = (adapted(CONFIGS[name], jpeft.PromptTuning(num_tokens=n)) for n in (tokens - 3, tokens))
    assert np.isfinite(packed(fits)).all()
    with pytest.raises(ValueError, match=rf"tokens behind {tokens} virtual ones are more than the (19|20) positions"):
        long(IDS, MASK, segment_ids=SEGMENTS)
