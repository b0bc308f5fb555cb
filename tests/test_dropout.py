# SPDX-License-Identifier: Apache-2.0
"""Masks by hashing: as random as a mask must be, and the same however the array is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import _dropout

SHAPE = (64, 48, 33)
SIZE = 64 * 48 * 33


def mask(seed, rate=0.3, shape=SHAPE):
    return np.asarray(_dropout.keeps(_dropout.make_seed(jax.random.key(seed)), rate, _dropout.linear_index(shape)))


def within(share, expected, trials):
    """Five standard deviations of a binomial."""
    return abs(share - expected) < 5 * (expected * (1 - expected) / trials) ** 0.5


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate(rate):
    dropped = ~mask(0, rate)
    assert within(dropped.mean(), rate, SIZE)
    for axis in range(3):  # and along every line of every axis, for all of them alike
        lines = dropped.mean(axis)
        assert abs(lines.std() - (rate * (1 - rate) / SHAPE[axis]) ** 0.5) < 0.1 * rate**0.5 / SHAPE[axis] ** 0.5
        assert within(lines.mean(), rate, SIZE)


def test_neighbours_and_powers_of_two_are_independent():
    flat = ~mask(1, 0.5).ravel()
    for shift in (1, 2, 3, 33, 48 * 33, *(2**n for n in range(4, 15))):
        both = (flat[shift:] & flat[:-shift]).mean()
        assert within(both, 0.25, SIZE - shift), shift


def test_seeds_are_independent():
    masks = np.stack([~mask(seed, 0.5) for seed in range(12)]).reshape(12, -1)
    for i in range(12):
        for j in range(i):
            assert within((masks[i] & masks[j]).mean(), 0.25, SIZE), (i, j)


def test_bits_of_the_seed_and_the_index_change_half_of_all_masks():
    index = _dropout.linear_index((4096,))
    seed = jnp.array([123, 456], jnp.uint32)
    before = np.asarray(_dropout.keeps(seed, 0.5, index))
    for word in range(2):
        for bit in range(32):
            after = np.asarray(_dropout.keeps(seed.at[word].set(seed[word] ^ np.uint32(1 << bit)), 0.5, index))
            assert within((before != after).mean(), 0.5, 4096), (word, bit)
    for bit in range(32):
        assert within(
            (before != np.asarray(_dropout.keeps(seed, 0.5, index ^ np.uint32(1 << bit)))).mean(), 0.5, 4096
        ), bit


def test_what_is_kept_is_scaled_and_differentiated():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    seed = _dropout.make_seed(jax.random.key(5))
    kept = mask(5)
    np.testing.assert_allclose(_dropout.drop(x, seed, 0.3), np.where(kept, x / 0.7, 0), rtol=1e-6)
    slope = jax.grad(lambda x: (_dropout.drop(x, seed, 0.3) ** 2).sum())(x)
    np.testing.assert_allclose(slope, np.where(kept, 2 * x / 0.49, 0), rtol=1e-5)
    assert _dropout.drop(x.astype(jnp.bfloat16), seed, 0.3).dtype == jnp.bfloat16


def test_the_place_is_that_of_the_whole_array():
    np.testing.assert_array_equal(_dropout.linear_index(SHAPE), np.arange(SIZE).reshape(SHAPE))
    assert _dropout.linear_index(()).shape == ()
