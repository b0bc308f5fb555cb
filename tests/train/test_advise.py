# SPDX-License-Identifier: Apache-2.0
"""`jpeft advise`: rules, what they cite, and configurations that the program takes."""

import itertools
import json
import runpy
from importlib import resources
from pathlib import Path

import pytest
import yaml

from jpeft.train import cli, config
from jpeft.train.advising import advice, evidence
from jpeft.train.advising.advice import advise, fitting, ordered
from jpeft.train.advising.candidates import CANDIDATES
from jpeft.train.advising.needs import KINDS, LATENCIES, Needs, size
from jpeft.train.advising.rules import RULES

ROOT = Path(__file__).parents[2]
GRID = [
    Needs("m", task, examples, latency=latency, tenants=tenants, keep_base=keep)
    for task, examples, latency, tenants, keep in itertools.product(
        KINDS, (100, 1000, 200_000), LATENCIES, (1, 200), (False, True)
    )
    if not (latency == "strict" and keep and tenants == 1)
]


def order(needs):
    out = {}
    return [candidate.name for candidate, _ in ordered(needs, out)], out


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="absent: the benchmarks of the source tree")
def test_the_evidence_is_what_the_results_say():
    written = runpy.run_path(str(ROOT / "benchmarks" / "evidence.py"))["text"]()
    held = resources.files("jpeft.train.advising") / "evidence.json"
    assert held.read_text(encoding="utf-8") == written, "write it anew: python benchmarks/evidence.py"
    for fact in evidence.facts().values():
        assert (ROOT / fact.page).is_file(), fact


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_changes_something(rule):
    said = [opinion for needs in GRID for each in CANDIDATES if (opinion := rule(needs, each)) is not None]
    assert any(opinion.votes != 0 for opinion in said) or rule.__name__ == "task"
    assert all(opinion.reason for opinion in said)


def test_what_cannot_be_merged_is_out_where_answers_must_be_quick():
    names, out = order(Needs("m", latency="strict"))
    assert names[0] == "LoRA"
    assert {*out} == {"Pfeiffer's adapters", "prefix tuning", "prompt tuning"}
    assert all("cannot be merged" in why for why in out.values())


def test_many_tenants_share_a_base():
    names, out = order(Needs("m", tenants=200, latency="strict"))
    assert {*names[:2]} == {"LoRA", "(IA)³"}
    assert "200 whole models" in out["full fine-tuning"]


def test_few_examples_ask_for_few_parameters_and_many_for_more():
    assert order(Needs("m", examples=50))[0][0] == "(IA)³"
    assert order(Needs("m", examples=50))[0][-1] == "full fine-tuning"
    many = order(Needs("m", examples=500_000))[0]
    assert many.index("full fine-tuning") < many.index("prompt tuning")


def test_a_base_that_is_to_stay_is_not_trained():
    assert "full fine-tuning" in order(Needs("m", keep_base=True))[1]


@pytest.mark.parametrize("needs", GRID, ids=str)
def test_every_method_that_is_advised_is_a_configuration(needs):
    for candidate, _ in ordered(needs, {}):
        options = {key: value for key, value in candidate.method(needs).items() if key != "kind"}
        config.method({"kind": candidate.kind, **options})


def test_advice_fits_is_a_configuration_and_plans_what_fits(bert, tmp_path, capsys):
    arguments = ["advise", "--model", str(bert), "--task", "classification", "--examples", "300", "--seq", "32"]
    cli.main([*arguments, "--out", str(tmp_path / "run.yaml")])
    shown = capsys.readouterr().out
    assert shown.startswith("advised: ")
    assert "docs/results/" in shown
    found = config.load(tmp_path / "run.yaml", [])
    assert found.model.path == str(bert)
    assert found.data.max_length == 32
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--out", str(tmp_path / "run.yaml")])
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--out", str(tmp_path / "nowhere" / "run.yaml")])
    assert "there is no folder" in capsys.readouterr().err

    cli.main([*arguments, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == said["advised"][0]["configuration"]
    assert len(said["advised"]) == 3
    known = {tuple(fact) for fact in evidence.facts().values()}
    for choice in said["advised"]:
        for reason in choice["reasons"]:
            assert {(fact["said"], fact["page"]) for fact in reason["measured"]} <= known


def test_less_memory_halves_the_batch_before_it_gives_up(bert):
    roomy = fitting(Needs(str(bert), "classification", batch=16, seq=64), CANDIDATES[0])
    assert (roomy.request.remat, roomy.request.batch) == ("none", 16)
    less = Needs(str(bert), "classification", batch=16, seq=64, memory=0.3 * roomy.memory.total)
    tight = fitting(less, CANDIDATES[0])
    assert tight.fits
    assert tight.request.batch < 16
    assert tight.request.batch * tight.request.accumulation == 16


def test_memory_that_no_batch_fits_is_known_at_once(bert, monkeypatch):
    asked = []
    real = advice.estimate
    monkeypatch.setattr(
        advice, "estimate", lambda request: asked.append((request.batch, request.remat)) or real(request)
    )
    least = fitting(Needs(str(bert), "classification", batch=16, seq=16, memory=1000), CANDIDATES[0])
    assert asked == [(16, "none"), (1, "full")]
    assert (least.fits, least.request.accumulation) == (False, 16)


def test_a_method_that_the_model_has_no_room_for_leaves_the_others(bert):
    """A text as long as the model's 64 positions has none left for a prompt; a longer one has no method at all."""
    needs = Needs(str(bert), "classification", seq=64, tenants=1_000_000, memory=16e9, storage=1000)
    with pytest.raises(ValueError, match=r"--storage collide; nothing is left:") as stopped:
        advise(needs)
    assert "prompt tuning: 64 tokens behind 20 virtual ones are more than the 64 positions" in str(stopped.value)
    assert "LoRA: 1000000 adapters take" in str(stopped.value)
    with pytest.raises(ValueError, match=r"^'nothing' is no preset, folder or config.json"):
        advise(Needs("nothing"))


def test_demands_that_collide_are_named(bert):
    with pytest.raises(ValueError, match=r"--memory collide; nothing is left:\n.*LoRA: its step takes .* of 1e-06 GB"):
        advise(Needs(str(bert), "classification", batch=1, seq=16, memory=1000))
    with pytest.raises(ValueError, match=r"--latency strict and --keep-base collide"):
        Needs("m", latency="strict", keep_base=True)
    with pytest.raises(ValueError, match=r"--examples must be 1 or more, got 0"):
        Needs("m", examples=0)


@pytest.mark.parametrize(("text", "value"), [("24GB", 24e9), ("16 GiB", 16 * 2**30), ("1.5k", 1500), ("800mb", 8e8)])
def test_sizes(text, value):
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24 gigs", "0"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="a size is written as"):
        size(text)
