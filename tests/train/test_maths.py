# SPDX-License-Identifier: Apache-2.0
"""Answers to mathematical problems: what is found in a text, and the verdicts of `maths_cases.tsv`, derived by hand."""

import json
import time
from pathlib import Path

import psutil
import pytest

from jpeft.train.scoring.maths import extract
from jpeft.train.scoring.maths.equal import Verdict, equal, equal_all
from jpeft.train.scoring.maths.workers import Workers


def cases():
    for line in (Path(__file__).parent / "maths_cases.tsv").read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            solution, answer, right, why = line.split("\t")
            marks = [pytest.mark.slow] if "tower" in why else []
            yield pytest.param(solution, answer, right == "yes", id=f"{why}: {solution} {answer}"[:80], marks=marks)


@pytest.fixture(scope="module")
def workers():
    with Workers(2, seconds=30.0) as found:
        yield found


@pytest.mark.parametrize("solution, answer, right", [*cases()])
def test_a_hard_case(workers, solution, answer, right):
    if answer.startswith("TEXT"):
        answer = extract.final_answer(answer.removeprefix("TEXT").strip().replace("⏎", "\n"))
    assert equal(solution, answer, workers).right == right


def test_there_are_200_hard_cases():
    assert len([*cases()]) >= 200


def test_a_question_without_end_is_killed_and_the_next_one_answered():
    me = psutil.Process()
    before = {child.pid for child in me.children()}
    with Workers(1, seconds=2.0) as workers:
        assert workers.ask("1", "1")  # started
        started = time.monotonic()
        assert equal("3", "9^{9^{9^{9}}}", workers) == Verdict(False, "timeout")
        assert time.monotonic() - started < 20
        assert {child.pid for child in me.children()} <= before
        assert workers.ask("1", "1")
    with Workers(2, seconds=30.0) as workers:
        pairs = [(r"\sqrt{8}", r"2\sqrt{2}"), ("x+1", "x+2"), ("7", None)]
        assert [verdict.right for verdict in equal_all(pairs, workers)] == [True, False, False]


def test_gsm8k_by_lm_evals_two_rules():
    """Expected values by hand from the task's published patterns: first match of one, last match of the other."""
    for text, strict, flexible in [
        ("#### 18", "18", "18"),
        ("#### 1,234.", "1,234.", "1,234."),
        ("she has $5.00 and 7", None, "7"),
        ("#### 18\nThis used 3 steps.", "18", "3"),
        ("####18", None, "18"),
        ("#### -5 and #### 6", "-5", "6"),
        ("none", None, None),
        ("it costs $80,000.", None, "$80,000."),
        ("well ...", None, "..."),
    ]:
        assert (extract.gsm8k_strict(text), extract.gsm8k_flexible(text)) == (strict, flexible), text
    assert extract.gsm8k_equal("... #### 1234", "$1,234.")
    assert not extract.gsm8k_equal("#### 1234", "1234.0")
    assert not extract.gsm8k_equal("#### 1234", None)


def test_every_published_solution_is_right_by_its_own_answer(data, workers):
    """Of MATH-500 the solution's last box (every tenth); of GSM8K the number behind the hashes."""
    rows = [json.loads(line) for line in (data / "math500" / "test.jsonl").read_text().splitlines()][::10]
    pairs = [(row["answer"], extract.final_answer(row["solution"])) for row in rows]
    assert [pair for pair in pairs if not equal(*pair, workers).right] == []
    answers = [json.loads(line)["answer"] for line in (data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    assert all(extract.gsm8k_equal(answer, extract.gsm8k_strict(answer)) for answer in answers)
    pairs = [(answer.rpartition("#### ")[2], extract.final_answer(answer)) for answer in answers]
    assert all(equal(*pair, workers).right for pair in pairs)
