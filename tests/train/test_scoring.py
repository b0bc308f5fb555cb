# SPDX-License-Identifier: Apache-2.0
"""Figures of predictions against exact rationals, scikit-learn and values by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from jpeft.train.scoring import classes, intervals, programs, texts

#: The product of up to 200 factors, each rounded once.
ROUNDING = 1e-13


def test_pass_at_k_is_the_exact_probability():
    for n in (1, 2, 5, 20, 200):
        for c in {0, 1, n // 2, n}:
            for k in {1, min(5, n), n}:
                exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
                assert programs.pass_at_k(n, c, k) == pytest.approx(float(exact), abs=ROUNDING)
    assert programs.pass_at_k(20, 2, 10) == pytest.approx(0.763, abs=5e-4)


@pytest.mark.parametrize("n, c, k", [(1, 0, 5), (4, 4, 5), (5, 0, 0)])
def test_pass_at_k_of_fewer_than_k_is_an_error(n, c, k):
    with pytest.raises(ValueError, match=rf"pass@{k} takes {k} or more programs of each problem, got {n}"):
        programs.pass_at_k(n, c, k)


def test_more_passed_than_drawn_is_an_error():
    with pytest.raises(ValueError, match="of 5 programs, 6 cannot have passed"):
        programs.pass_at_k(5, 6, 1)


def test_mean_pass_at_k_has_an_interval_over_problems():
    rows = [[True] * 5] * 40 + [[False] * 5] * 60
    found = intervals.mean(programs.each_pass_at_k(rows, 1))
    assert found.value == pytest.approx(0.4)
    # the binomial's 95 % interval around 0.4 of 100 is 0.4 +- 1.96 * 0.049
    assert found.low == pytest.approx(0.304, abs=0.02)
    assert found.high == pytest.approx(0.496, abs=0.02)
    assert {"pass@1": found} == intervals.means({"pass@1": programs.each_pass_at_k(rows, 1)})
    with pytest.raises(ValueError, match="no example"):
        intervals.mean([])


@pytest.mark.parametrize(
    "one, other, alike",
    [
        ("x = 1", "x = 1  # the same", 1.0),
        ("x = 1", "y = 1", 2 / 4),
        ("def f(x):\n    return x", "def f(x):\n  return x", 1.0),
        ("", "", 1.0),
        ("", "x", 0.0),
        ("if (", "if )", 1 / 3),
    ],
)
def test_token_jaccard(one, other, alike):
    assert programs.token_jaccard(one, other) == pytest.approx(alike)


def test_classes_are_scored_as_by_scikit_learn():
    rng = np.random.default_rng(0)
    for count in (2, 3, 5):
        y, p = rng.integers(0, count, 50), rng.integers(0, count, 50)
        found = classes.report(y, p, [f"c{i}" for i in range(count)])
        assert found.metrics["macro_f1"].value == pytest.approx(f1_score(y, p, average="macro"))
        assert found.metrics["accuracy"].value == pytest.approx((y == p).mean())
        table = [list(row.values())[:3] for row in found.by_class.values()]
        expected = [score(y, p, average=None) for score in (precision_score, recall_score, f1_score)]
        np.testing.assert_allclose(table, np.transpose(expected))
        assert found.collapsed is None
        for estimate in found.metrics.values():
            assert estimate.low < estimate.value < estimate.high
    found = classes.report([0, 1, 1, 0], [1, 1, 0, 0], ["no", "yes"])
    assert (found.metrics["precision"].value, found.metrics["recall"].value) == (0.5, 0.5)


def test_one_class_for_all_is_a_collapse():
    found = classes.report([0, 1, 1, 2], [1, 1, 1, 1], ["no", "yes", "maybe"])
    assert found.collapsed == "yes"
    assert found.majority == {"accuracy": 0.5, "macro_f1": pytest.approx(2 / 9)}
    assert found.metrics["accuracy"].value == found.majority["accuracy"]
    assert classes.report([1, 1], [1, 1], ["no", "yes"]).collapsed is None


def test_texts_are_scored_as_by_hand():
    # 4 of 5 words of each in order: precision, recall and F1 are 0.8
    assert texts.rouge_l(["the cat sat down here"], ["the cat sat down there"]).value == pytest.approx(80.0)
    found, signature = texts.bleu(["the cat sat on the mat"] * 3, ["the cat sat on the mat"] * 3)
    assert found.value == pytest.approx(100.0)
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    found, signature = texts.chrf(["abc", "abd"], ["abc", "xyz"])
    assert found.low <= found.value <= found.high
    assert signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
