# SPDX-License-Identifier: Apache-2.0
"""Runs of methods whose adapter is no low-rank one: they are saved, and are the same when they are opened."""

import json

import pytest

from jpeft.train import cli, config, loop

SLOW = pytest.mark.slow
PREFIX = {"kind": "prefix_tuning", "num_tokens": 4, "shift_positions": True}
CLASSIFY = [
    pytest.param({"kind": "prompt_tuning", "num_tokens": 4, "init": "vocabulary"}, id="prompt", marks=SLOW),
    pytest.param({"kind": "p_tuning", "num_tokens": 4, "hidden_size": 8}, id="p-tuning"),
    pytest.param(PREFIX | {"projection": True}, id="prefix", marks=SLOW),
]
GENERATE = [
    pytest.param({"kind": "prompt_tuning", "num_tokens": 4}, id="prompt", marks=SLOW),
    pytest.param(PREFIX, id="prefix"),
    pytest.param({"kind": "trainable_tokens", "token_indices": [5, 4, 9]}, id="tokens"),
]


def assert_saved(tree, method, reviews, capsys):
    """`jpeft eval` of what a run saved gives the run's own last figures."""
    result = loop.train(config.parse(tree | {"method": method}))
    last = [json.loads(line) for line in (result.adapter.parent / "metrics.jsonl").read_text().splitlines()][-1]
    capsys.readouterr()
    cli.main(["eval", "--adapter", str(result.adapter), "--data", str(reviews / "eval.jsonl")])
    figures = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[-len(result.evaluation.metrics) :])
    assert figures.keys() == result.evaluation.metrics.keys()
    for name, value in figures.items():
        assert float(value) == pytest.approx(last[f"eval_{name}"], rel=1e-4)
    return result


@pytest.mark.parametrize("method", CLASSIFY)
def test_a_classifier(method, classify, reviews, capsys):
    result = assert_saved(classify, method, reviews, capsys)
    texts = [json.loads(line)["text"] for line in (reviews / "eval.jsonl").read_text().splitlines()]
    cli.main(["predict", "--adapter", str(result.adapter), *texts])
    labels = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert labels == [("bad", "good")[i] for i in result.evaluation.predicted]


@pytest.mark.parametrize("method", GENERATE)
def test_a_language_model(method, generate, reviews, capsys):
    result = assert_saved(generate, method, reviews, capsys)
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize(
    "method, message",
    [
        (
            {"kind": "trainable_tokens", "token_indices": [5]},
            "a run saves its .*, and the adapter trains classifier",
        ),
        ({"kind": "prefix_tuning"}, "and PEFT counts a prefix as past tokens, .* adapt with shift_positions=True"),
    ],
)
def test_what_could_not_be_saved_is_not_trained(method, message, classify, tmp_path):
    with pytest.raises(config.ConfigError, match=message):
        loop.train(config.parse(classify | {"method": method}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
