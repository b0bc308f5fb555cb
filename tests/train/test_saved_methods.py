# SPDX-License-Identifier: Apache-2.0
"""Runs of methods whose adapter is no low-rank one: they are saved, and are the same when they are opened."""

import json

import pytest

from jpeft.train import cli, config, loop

SLOW = pytest.mark.slow
PREFIX = {"kind": "prefix_tuning", "num_tokens": 4, "shift_positions": True}
CLASSIFY = [
    pytest.param({"kind": "prompt_tuning", "num_tokens": 4, "init": "vocabulary"}, id="prompt", marks=SLOW),
    pytest.param({"kind": "p_tuning", "num_tokens": 4, "hidden_size": 8}, id="p-tuning", marks=SLOW),
    pytest.param(PREFIX | {"projection": True}, id="prefix", marks=SLOW),
]
GENERATE = [
    pytest.param({"kind": "prompt_tuning", "num_tokens": 4}, id="prompt", marks=SLOW),
    pytest.param(PREFIX, id="prefix", marks=SLOW),
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


OWN = {
    "prefix": {"kind": "prefix_tuning", "num_tokens": 3},
    "bitfit": {"kind": "bitfit"},
    "houlsby": {"kind": "houlsby", "reduction_factor": 4},
    "head": {"kind": "last_layers", "n": 0, "final": []},
    "hybrid": [{"kind": "lora", "rank": 2, "init": "pissa"}, {"kind": "prompt_tuning", "num_tokens": 3}],
}


@pytest.mark.parametrize("method", [pytest.param(m, id=i, marks=() if i == "hybrid" else SLOW) for i, m in OWN.items()])
def test_what_peft_has_no_form_for_is_saved_in_a_format_of_its_own(method, classify, reviews, capsys):
    result = assert_saved(classify, method, reviews, capsys)
    assert (result.adapter / "jpeft_adapter.json").is_file()
    assert not (result.adapter / "adapter_config.json").exists()


def test_the_format_is_said_before_training(classify, capsys):
    loop.train(config.parse(classify | {"method": OWN["prefix"]}))
    out = capsys.readouterr().out
    assert out.index("saved in jpeft's own format, for PEFT's cannot hold it") < out.index("adapter: ")
