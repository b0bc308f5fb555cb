# SPDX-License-Identifier: Apache-2.0
"""Means over the text of an example, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects

from jpeft._scope import scope
from jpeft._text import gate, text_mean
from jpeft.models._layers import in_front
from jpeft.seams import EVERY_SEGMENT

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 7, 3)).astype(np.float32)
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
SEGMENTS = np.array([[1, 1, 2, 2, 2, 3, 3], [1, 1, 1, 2, 2, 0, 0]])


def by_hand(x, text, segments):
    """The mean at every token, over the text of its own segment; 0 where there is none."""
    out = np.zeros(x.shape)
    for b, i in np.ndindex(x.shape[:2]):
        own = [x[b, j] for j in range(x.shape[1]) if text[b, j] and segments[b, i] == segments[b, j]]
        out[b, i] = np.mean(own, 0) if own else 0
    return out


@pytest.mark.parametrize("packed", [False, True])
def test_the_mean_is_over_the_text_of_the_same_example(packed):
    segments = jnp.asarray(SEGMENTS) if packed else None
    with scope(text=jnp.asarray(MASK != 0), segments=segments):
        mean = text_mean(jnp.asarray(X))
    expected = by_hand(X.astype(np.float64), MASK, SEGMENTS if packed else np.zeros_like(SEGMENTS))
    assert mean.shape == (X.shape if packed else (2, 1, 3))
    assert subjects.error(mean, expected if packed else expected[:, :1]) < subjects.FLOAT32


def test_without_a_word_about_the_text_all_positions_count():
    np.testing.assert_allclose(text_mean(jnp.asarray(X)), X.mean(1, keepdims=True), rtol=1e-6)
    with scope(text=jnp.ones((2, 4), bool)):
        np.testing.assert_allclose(text_mean(jnp.asarray(X)), X.mean(1, keepdims=True), rtol=1e-6)


def test_a_row_without_a_token_axis_is_its_own_mean():
    np.testing.assert_array_equal(text_mean(jnp.asarray(X[:, 0])), X[:, 0])


def test_a_gate_is_the_mean_of_a_sigmoid():
    weight, bias = RNG.standard_normal((3, 1)).astype(np.float32), np.float32([0.3])
    with scope(text=jnp.asarray(MASK != 0)):
        found = jax.jit(lambda x: gate(x, jnp.asarray(weight), jnp.asarray(bias)))(X.astype(jnp.bfloat16))
    x = np.asarray(X.astype(jnp.bfloat16), np.float64)
    one = 1 / (1 + np.exp(-(x @ weight.astype(np.float64) + bias)))
    assert found.dtype == jnp.float32
    assert subjects.error(found, by_hand(one, MASK, np.zeros_like(SEGMENTS))[:, :1]) < subjects.FLOAT32


def test_virtual_tokens_in_front_are_no_text():
    segments = np.pad(SEGMENTS, ((0, 0), (2, 0)), constant_values=EVERY_SEGMENT)
    told = in_front(2, (2, 7), jnp.asarray(MASK), segments)
    np.testing.assert_array_equal(told["text"], np.pad(MASK, ((0, 0), (2, 0))) != 0)
    assert told["segments"] is segments
    told = in_front(1, (2, 7), None, None)
    assert told["segments"] is None
    np.testing.assert_array_equal(told["text"], np.pad(np.ones((2, 7)), ((0, 0), (1, 0))) != 0)
