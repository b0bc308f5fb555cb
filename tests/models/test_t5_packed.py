# SPDX-License-Identifier: Apache-2.0
"""Packed rows of T5: every example as by itself, in the encoder, in the decoder and between the two, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.models import T5, VOCAB
from contracts.table import QUICK

import jpeft

KEY = jax.random.key(0)
#: Some hundred roundings of 2^-53 in a row, the sums in another order.
EXACT = 1e-12

#: Padding at the ends and between; ids that do not rise; one example alone; as many as there is room for. An example
#: lies elsewhere in the decoder than in the encoder, and is of another length.
SEGMENTS = np.array([[9, 9, 9, 0, 2, 0, 0, 5, 5, 5, 5, 0], [7] * 11 + [0], [3, 1, 1, 2, 2, 2, 8, 8, 8, 4, 4, 4]])
OUT = np.array([[2, 2, 9, 5, 5, 5, 0, 0], [7] * 7 + [0], [1, 8, 8, 3, 4, 4, 4, 2]])
IDS = np.random.default_rng(0).integers(1, VOCAB, SEGMENTS.shape)
DECODER_IDS = np.random.default_rng(1).integers(1, VOCAB, OUT.shape)
EXAMPLES = [(row, i) for row in range(3) for i in np.unique(SEGMENTS[row]) if i]
ROOM = 5

PROMPTS = jpeft.PromptTuning(num_tokens=3, blocks=("encoder", "decoder"))
METHODS = {
    "full fine-tuning": jpeft.FullFineTune(),
    "all seams": (
        PROMPTS
        | jpeft.PrefixTuning(num_tokens=2, blocks=None)
        | jpeft.LoRA(rank=2, alpha=3.0, targets="all-linear")
        | jpeft.Houlsby(reduction_factor=2, cross=True)
        | jpeft.LoReFT(rank=2, first=2, last=1)
    ),
    "lora": jpeft.LoRA(rank=2, targets=["q", "v"]),
    "ia3": jpeft.IA3(),
    "prompt tuning": jpeft.PromptTuning(num_tokens=3),
    "prompts of both": PROMPTS,
    "p-tuning": jpeft.PTuning(num_tokens=2, hidden_size=3) | jpeft.PromptTuning(num_tokens=1, blocks="decoder"),
    "prefix tuning": jpeft.PrefixTuning(num_tokens=2),
    "prefixes of both, positions shifted": jpeft.PrefixTuning(num_tokens=2, blocks=None, shift_positions=True),
    "pfeiffer": jpeft.Pfeiffer(reduction_factor=2, cross=True),
    "mam": jpeft.MAM(num_tokens=2, hidden_size=3),
    "loreft": jpeft.LoReFT(rank=2, first=2, last=1),
}
FAST = ("full fine-tuning", "prompts of both")
CASES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in METHODS]


def apart(values, segments):
    """`values` of packed rows, every example in a row of its own, filled up with 0 behind."""
    rows = np.zeros((len(EXAMPLES), *values.shape[1:]), values.dtype)
    for at, (row, i) in enumerate(EXAMPLES):
        own = segments[row] == i
        rows[at, : own.sum()] = values[row][own]
    return rows


PACKED = {
    "input_ids": IDS, "attention_mask": SEGMENTS > 0, "segment_ids": SEGMENTS, "decoder_input_ids": DECODER_IDS,
    "decoder_attention_mask": OUT > 0, "decoder_segment_ids": OUT,
}  # fmt: skip
ALONE = {
    name: apart(value, OUT if "decoder" in name else SEGMENTS)
    for name, value in PACKED.items()
    if "segment_ids" not in name
}


@functools.cache
def base():
    return jpeft.models.build(T5, "SEQ_2_SEQ_LM", key=KEY)


def adapted(method):
    return subjects.fill(jpeft.adapt(base(), method, key=KEY))


def gradients(model):
    """(weights, inputs) -> the gradients of a sum of all outputs, and these; with room for 5 examples."""
    graphdef, trainable, frozen = jpeft.partition(model)

    def loss(trainable, weights, inputs):
        with jpeft.max_segments(ROOM):
            out = jpeft.combine(graphdef, trainable, frozen)(**inputs)
        return (weights * jnp.sin(out)).sum(), out

    compiled = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
    return lambda weights, inputs: compiled(trainable, weights, inputs)


@pytest.mark.parametrize("name", CASES)
def test_every_example_is_as_by_itself(name):
    """Outputs at its tokens, and the sum of its gradients."""
    weights = np.random.default_rng(5).standard_normal((*OUT.shape, VOCAB)) * (OUT > 0)[..., None]
    with jax.enable_x64(True):
        gradient = gradients(subjects.in_float64(adapted(METHODS[name])))
        found, out = gradient(weights, PACKED)
        expected, alone = gradient(apart(weights, OUT), ALONE)
    assert out.dtype == np.float64
    text = apart(OUT, OUT) > 0
    assert subjects.error(apart(np.asarray(out), OUT)[text], np.asarray(alone)[text]) < EXACT
    whole = np.linalg.norm([np.linalg.norm(value) for value in expected.values()])
    assert whole > 1e-3
    for path, value in expected.items():
        assert np.linalg.norm(found[path] - value) < EXACT * whole, path


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _run(graphdef, trainable, frozen, inputs):
    return jpeft.combine(graphdef, trainable, frozen)(**inputs)


def run(model, **changes):
    return np.asarray(_run(*jpeft.partition(model), PACKED | changes))


def test_positions_that_are_given_are_those_that_are_counted():
    """Counted, all rows share one bias, for tokens that see each other are as far apart as they stand."""
    counts = [np.zeros_like(segments) for segments in (SEGMENTS, OUT)]
    for count, segments in zip(counts, (SEGMENTS, OUT), strict=True):
        for row, i in EXAMPLES:
            own = segments[row] == i
            count[row][own] = np.arange(own.sum())
    given = dict(zip(("positions", "decoder_positions"), counts, strict=True))
    text = OUT > 0
    assert subjects.error(run(base(), **given)[text], run(base())[text]) < subjects.FLOAT32


def test_an_example_that_the_encoder_has_not_sees_nothing_of_the_others():
    """And one that the decoder has not changes nothing."""
    other = np.where(SEGMENTS == 9, (IDS + 1) % VOCAB, IDS)
    before, after = run(base(), decoder_segment_ids=OUT + (OUT == 9)), run(base(), input_ids=other)
    np.testing.assert_array_equal(before[OUT != 9], run(base())[OUT != 9])
    np.testing.assert_array_equal(after[OUT != 9], run(base())[OUT != 9])
    assert np.isfinite(before).all()
    assert (after[OUT == 9] != run(base())[OUT == 9]).any()


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_more_examples_than_room_are_nan(side):
    """In that row alone, whose fifth example has no copy of the prompt."""
    model = adapted(jpeft.PromptTuning(num_tokens=3, blocks=side))
    with jpeft.max_segments(ROOM - 1):
        out = run(model)
    assert np.isnan(out[2]).all()
    assert np.isfinite(out[:2]).all()


def test_prompts_need_to_know_how_many_examples_a_row_has():
    with pytest.raises(ValueError, match=r"what these become depends on its text.*jpeft.max_segments"):
        run(adapted(jpeft.PromptTuning(num_tokens=3, blocks="decoder")))


@pytest.mark.parametrize("alone", ["segment_ids", "decoder_segment_ids"])
def test_both_sides_are_packed_or_none(alone):
    inputs = {name: value for name, value in PACKED.items() if name == alone or "segment_ids" not in name}
    with pytest.raises(ValueError, match=rf"see those of the encoder that have its number .* got {alone} alone"):
        base()(**jax.tree.map(jnp.asarray, inputs))


def test_packed_rows_are_not_written_on():
    encoded = base().encode(IDS, segment_ids=SEGMENTS)
    with pytest.raises(ValueError, match="a row cannot pack several examples"):
        base().prefill(base().cache(3, 8), encoded, jnp.asarray(DECODER_IDS))


def test_every_segment_begins_with_the_start_token():
    model = jpeft.models.build(T5 | {"decoder_start_token_id": 9, "pad_token_id": 0}, "SEQ_2_SEQ_LM", key=KEY)
    labels, segments = np.array([[5, 6, 7, 8, -100, 3]]), np.array([[1, 1, 2, 2, 2, 3]])
    assert model.decoder_inputs(jnp.asarray(labels), segments).tolist() == [[9, 5, 9, 7, 8, 9]]
