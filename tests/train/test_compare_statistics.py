# SPDX-License-Identifier: Apache-2.0
"""Figures of merit against scikit-learn, intervals against their known coverage, tests against exact enumeration."""

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from jpeft.train.compare import outcomes, statistics
from jpeft.train.compare.outcomes import Classes, Texts


def classes(truth, predicted, size=None, confidence=None):
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    confidence = np.full(len(truth), 0.9) if confidence is None else np.asarray(confidence)
    return Classes(truth, predicted, confidence, size or int(max(truth.max(), predicted.max())) + 1)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, 4, 40), rng.integers(0, 3, 40)
    weights = rng.integers(0, 3, 40).astype(float)
    kept = weights > 0
    got = classes(truth, predicted, 5).scores(weights)
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth[kept], predicted[kept], average="macro", sample_weight=weights[kept], zero_division=0
    )
    want = accuracy_score(truth[kept], predicted[kept], sample_weight=weights[kept])
    np.testing.assert_allclose([*got.values()], [want, f1, precision, recall], rtol=1e-12)


def test_weights_are_copies_of_examples():
    texts = Texts(np.array([3.0, 8.0, 2.0]), np.array([2, 4, 1]))
    twice = Texts(np.array([3.0, 2.0, 2.0]), np.array([2, 1, 1]))
    assert texts.scores(np.array([1.0, 0.0, 2.0])) == pytest.approx(twice.scores())
    assert texts.scores()["perplexity"] == pytest.approx(math.exp(13 / 7))


def test_a_collapse_is_seen():
    assert classes([0, 1, 1], [1, 1, 1]).collapsed
    assert not classes([0, 1, 1], [1, 1, 0]).collapsed
    assert not classes([1, 1], [1, 1]).collapsed  # nothing else was there to be said
    assert outcomes.majority(classes([0, 1, 1], [0, 1, 1]), np.array([0, 0, 1])).predicted.tolist() == [0, 0, 0]


def test_calibration_error_by_hand():
    # bins of 1/15: 0.95 and 0.96 share the last; 0.5 has its own
    got = classes([1, 1, 0], [1, 0, 0], 2, [0.95, 0.96, 0.5]).calibration_error
    assert got == pytest.approx((abs(0.05 - 0.96) + 0.5) / 3)
    assert classes([1], [1], 2, [1.0]).calibration_error == 0


def test_what_is_saved_reads_back():
    for outcome in (classes([0, 2], [2, 1], 3, [0.25, 0.5]), Texts(np.array([0.1]), np.array([3]))):
        back = outcomes.read(outcome.saved())
        assert back.saved() == outcome.saved()
    with pytest.raises(ValueError, match="of classes, of texts or of written ones, got kind 'pictures'"):
        outcomes.read({"kind": "pictures"})


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        right = rng.random(150) < 0.7
        outcome = classes(np.ones(150, int), right.astype(int), 2)
        found = statistics.intervals([outcome], draws=200, seed=trial)["accuracy"]
        held += found.low <= 0.7 <= found.high
        assert found.mean == pytest.approx(right.mean())
    assert 0.90 <= held / 200 <= 0.99


def test_seeds_that_differ_widen_the_interval():
    truth = np.ones(200, int)
    alike = [classes(truth, np.arange(200) % 2, 2)] * 4
    apart = [classes(truth, (np.arange(200) < n).astype(int), 2) for n in (40, 80, 120, 160)]
    a, b = (statistics.intervals(group, draws=300)["accuracy"] for group in (alike, apart))
    assert a.mean == b.mean == 0.5
    assert b.high - b.low > 1.5 * (a.high - a.low)


def test_the_permutation_test_is_the_exact_one_up_to_its_draws():
    truth = np.ones(8, int)
    ours, theirs = np.array([1, 1, 1, 1, 1, 1, 0, 1]), np.array([1, 0, 0, 1, 0, 1, 1, 0])
    apart = abs(ours.mean() - theirs.mean())
    exact = np.mean([
        abs(np.where(s, theirs, ours).mean() - np.where(s, ours, theirs).mean()) >= apart - 1e-12
        for s in itertools.product([False, True], repeat=8)
    ])  # fmt: skip
    found = statistics.difference([classes(truth, ours, 2)], [classes(truth, theirs, 2)], draws=4000)
    assert found.interval.mean == pytest.approx(3 / 8)
    assert found.p == pytest.approx(exact, abs=0.03)


def test_equal_methods_differ_by_nothing():
    same = [classes([0, 1, 1], [0, 1, 0])] * 2
    found = statistics.difference(same, same, draws=50)
    assert found.interval == (0, 0, 0)
    assert found.p == 1


def test_only_the_same_seeds_and_examples_are_compared():
    a, b = classes([0, 1], [0, 1]), classes([0, 1, 1], [0, 1, 1])
    with pytest.raises(ValueError, match=r"same seeds and examples .* got \[2\] and \[3\]"):
        statistics.difference([a], [b])
    with pytest.raises(ValueError, match=r"got \[2\] and \[2, 2\]"):
        statistics.difference([a], [a, a])


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_groups_are_read_alone():
    whole = classes([0, 1, 1, 0], [0, 1, 0, 1], 2, [0.9, 0.8, 0.7, 0.6])
    part = outcomes.subset(whole, np.array([True, False, True, False]))
    assert part.saved() == classes([0, 1], [0, 0], 2, [0.9, 0.7]).saved()
    texts = outcomes.subset(Texts(np.array([1.0, 2.0]), np.array([3, 4])), np.array([False, True]))
    assert texts.scores()["loss"] == 0.5


def test_classes_said_and_found():
    got = classes([0, 0, 0, 1], [0, 0, 1, 1], 3)
    assert (got.shares, got.predicted_shares) == ([0.75, 0.25, 0.0], [0.5, 0.5, 0.0])
    assert got.recalls == [pytest.approx(2 / 3), 1.0, 0.0]
