# SPDX-License-Identifier: Apache-2.0
"""Widths with the least padding, and batches that are each row once, of few shapes, in an order that repeats."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpeft.train.buckets import Buckets, choose_widths


def padded(lengths, widths):
    return sum(min(w for w in widths if w >= n) for n in lengths)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 4))
def test_the_widths_have_the_least_padding_of_all(lengths, num_widths):
    got = choose_widths(lengths, num_widths, 64)
    last = -(-max(lengths) // 8) * 8
    others = range(8, last, 8)
    best = min(
        padded(lengths, (*chosen, last))
        for count in range(num_widths)
        for chosen in itertools.combinations(others, min(count, len(others)))
    )
    assert padded(lengths, got) == best
    assert len(got) <= num_widths
    assert list(got) == sorted(got)
    assert all(width % 8 == 0 for width in got)


def test_no_width_is_above_max_length():
    assert choose_widths([3, 61], 4, 61)[-1] == 61
    with pytest.raises(ValueError, match=r"a row of 62 tokens is longer than max_length=61"):
        choose_widths([3, 62], 4, 61)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=100), st.integers(1, 4), st.integers(1, 9))
def test_an_epoch_is_every_row_once_in_few_shapes(lengths, num_widths, rows):
    buckets = Buckets(np.array(lengths), choose_widths(lengths, num_widths, 64), rows)
    for batches in (buckets.epoch(0, 0), buckets.in_order()):
        assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(len(lengths)))
        assert len(batches) == buckets.num_batches
        assert sum(len(batch.rows) < rows for batch in batches) <= 1
        assert {batch.width for batch in batches} <= set(buckets.widths)
        assert all(max(lengths[i] for i in batch.rows) <= batch.width for batch in batches)


def test_the_order_follows_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    buckets = Buckets(lengths, choose_widths(lengths, 4, 64), 8)

    def order(seed, epoch):
        return [(b.width, b.rows.tolist()) for b in buckets.epoch(seed, epoch)]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert order(1, 2) != [(b.width, b.rows.tolist()) for b in buckets.in_order()]


def test_sentences_of_unequal_length_are_padded_by_less_than_a_sixth():
    """As long as SST-2's sentences: batches in random order would pad them to about twice their tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(25, 11, 7000), 4, 66).astype(int)
    buckets = Buckets(lengths, choose_widths(lengths, 8, 128), 32)
    computed = sum(batch.width * 32 for batch in buckets.epoch(0, 0))
    usual = sum(32 * lengths[i : i + 32].max() for i in range(0, 7000, 32))
    assert lengths.sum() / computed > 5 / 6
    assert usual / computed > 1.6
