# SPDX-License-Identifier: Apache-2.0
"""The ends of a prompt, against a loop over tokens in plain Python; and how a call tells what its prompt is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.models import LLAMA
from contracts.table import QUICK

import jpeft
from jpeft._scope import current, scope
from jpeft._text import count_before, prompt_ends
from jpeft.seams import EVERY_SEGMENT
from jpeft.train import losses


def brute_force(text, segments, prompt, first, last):
    """Front and back of every example's prompt, token by token: the nearer end has what is in both."""
    front, back = np.zeros(text.shape, bool), np.zeros(text.shape, bool)
    for row in range(len(text)):
        for segment in sorted(set(segments[row])):
            of_prompt = [i for i in range(text.shape[1]) if segments[row, i] == segment]
            of_prompt = [i for i in of_prompt if text[row, i] and prompt[row, i]]
            for before, i in enumerate(of_prompt):
                after = len(of_prompt) - 1 - before
                in_front, in_back = before < first, after < last
                front[row, i] = in_front and not (in_back and after < before)
                back[row, i] = in_back and not front[row, i]
    return front, back


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("virtual", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_ends_are_those_of_a_loop(seed, virtual, packed):
    rng = np.random.default_rng(seed)
    shape, first, last = (5, 11), int(rng.integers(0, 5)), int(rng.integers(0, 5))
    text, prompt = rng.random(shape) < 0.8, rng.random(shape) < 0.7
    segments = np.sort(rng.integers(0, 4, shape)) if packed else np.zeros(shape, int)
    expected = brute_force(text, segments, prompt, first, last)
    front = ((0, 0), (virtual, 0))
    running = {"text": jnp.pad(text, front), "prompt": jnp.asarray(prompt)}
    if packed:
        running["segments"] = jnp.pad(segments, front, constant_values=EVERY_SEGMENT)
    with scope(**running):
        got = jax.jit(prompt_ends, static_argnums=(0, 1, 2))((5, 11 + virtual), first, last)
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine[:, virtual:], theirs)
        assert not mine[:, :virtual].any()
    assert not (got[0] & got[1]).any()


@pytest.mark.parametrize(
    ("length", "front", "back"),
    [(0, "", ""), (1, "1", "0"), (2, "10", "01"), (3, "110", "001"), (4, "1100", "0011"), (5, "11000", "00111")],
)
def test_in_a_short_prompt_a_token_belongs_to_the_nearer_end(length, front, back):
    with scope(text=jnp.ones((1, length), bool)):
        got = prompt_ends((1, length), 2, 3)
    assert ["".join(map(str, np.asarray(end[0], int))) for end in got] == [front, back]


def test_where_nothing_is_said_all_positions_are_text():
    front, back = prompt_ends((2, 4), 1, 2)
    np.testing.assert_array_equal(front, [[1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(back, [[0, 0, 1, 1]] * 2)


def test_counting_starts_again_in_each_run():
    counted, segments = np.array([[1, 0, 1, 1, 1, 1]], bool), np.array([[7, 7, 7, 7, 2, 2]])
    np.testing.assert_array_equal(count_before(jnp.asarray(counted), jnp.asarray(segments)), [[0, 1, 1, 2, 0, 1]])


def test_a_prompt_of_another_shape_is_refused():
    with scope(text=jnp.ones((2, 4), bool)):
        with pytest.raises(ValueError, match=r"\(2, 5\), and the call says of \(2, 4\) which are text"):
            prompt_ends((2, 5), 1, 0)
        for shape in ((2, 5), (1, 4), (4,)):
            with (
                jpeft.prompt_tokens(np.ones(shape)),
                pytest.raises(ValueError, match="prompt_tokens takes a mask of the shape of the model's tokens"),
            ):
                prompt_ends((2, 4), 1, 0)


def test_prompt_tokens_say_what_the_prompt_is():
    assert current().prompt is None
    with jpeft.prompt_tokens([[1, 0]]):
        np.testing.assert_array_equal(current().prompt, [[1, 0]])
        with jpeft.prompt_tokens(None):
            assert current().prompt is None
    assert current().prompt is None


IDS = np.random.default_rng(0).integers(1, 11, (2, 6))
BATCH = {
    "input_ids": IDS,
    "attention_mask": np.ones_like(IDS),
    "labels": np.where(np.arange(6) < [[3], [4]], -100, IDS),
}


def test_a_language_models_loss_takes_the_prompt_from_its_labels_or_from_the_caller():
    model = jpeft.adapt(
        jpeft.models.build(LLAMA, "CAUSAL_LM", key=jax.random.key(1)),
        jpeft.DiReFT(first=0, last=1),
        key=jax.random.key(0),
    )

    @functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
    def loss(prompt, adapted=True):
        with jpeft.prompt_tokens(prompt):
            return losses.lm_loss(model if adapted else jpeft.strip(model), BATCH)

    up_to = lambda first, second: np.arange(6) < np.array([[first], [second]])  # noqa: E731
    assert loss(up_to(3, 4)) == pytest.approx(float(loss(None)), rel=1e-6)
    assert loss(up_to(1, 2)) != pytest.approx(float(loss(None)), rel=1e-3)
    assert loss(up_to(0, 0)) == pytest.approx(float(loss(None, False)), rel=1e-6)
