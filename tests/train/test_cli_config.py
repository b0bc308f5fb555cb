# SPDX-License-Identifier: Apache-2.0
"""`jpeft config`: the schema, a configuration in full, all its faults at once, and the recipes."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from jpeft.train import cli, config, recipes, schema


def jpeft_(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


@pytest.fixture
def written(classify, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(classify))
    return file


def test_the_schema_has_every_key_with_its_meaning(capsys):
    code, out, _ = jpeft_(capsys, "config", "schema")
    assert code == 0
    found = json.loads(out)
    assert found["additionalProperties"] is False
    for kind in schema.sections():
        part = found if kind is config.Config else found["$defs"][kind.__name__]
        assert set(part["properties"]) == {field.name for field in dataclasses.fields(kind)}
        assert all(len(value["description"]) > 5 for value in part["properties"].values()), kind
    optimizer = found["$defs"]["Optimizer"]["properties"]
    assert optimizer["name"]["enum"] == ["adamw", "adafactor", "lion", "sgd", "muon"]
    assert optimizer["lr"]["description"] == "highest learning rate."


def test_show_writes_every_key_out(capsys, written, classify):
    code, out, err = jpeft_(capsys, "config", "show", written, "optimizer.lr=1e-3", "--train.seed", "5")
    assert code == 0, err
    assert config.parse(yaml.safe_load(out)) == config.load(written, ["optimizer.lr=1e-3", "train.seed=5"])
    assert yaml.safe_load(out)["optimizer"]["groups"] == []


def test_validate_says_all_at_once(capsys, written):
    assert jpeft_(capsys, "config", "validate", written)[0] == 0
    overrides = ("optimizer.lr=-1", "train.batch_size=0", "method.rankk=3", "train.z_loss=-1")
    code, _, err = jpeft_(capsys, "config", "validate", written, *overrides)
    assert code == 1
    assert len(err.splitlines()) == 4
    for said in ("optimizer.lr must", "train.batch_size must", "unknown key method.rankk", "train.z_loss must"):
        assert said in err


def test_validate_looks_for_the_files(capsys, written):
    code, _, err = jpeft_(capsys, "config", "validate", written, "model.path=./nowhere", "data.train=nowhere.jsonl")
    assert code == 1
    assert "model.path: no folder ./nowhere" in err
    assert "data.train: no data file nowhere.jsonl" in err


def test_recipes_are_listed_and_copied(capsys, tmp_path):
    code, out, _ = jpeft_(capsys, "config", "recipes")
    assert code == 0
    assert "sst2_minilm_lora\n    SST-2" in out
    assert jpeft_(capsys, "config", "recipes", "sst2_minilm_lora", tmp_path / "mine.yaml")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() == recipes.text("sst2_minilm_lora")
    assert jpeft_(capsys, "config", "recipes", "sst2_minilm_lora", tmp_path / "mine.yaml")[0] == 2  # not overwritten
    code, _, err = jpeft_(capsys, "config", "recipes", "sst2_minilm_lara")
    assert code == 2
    assert "did you mean sst2_minilm_lora?" in err


@pytest.mark.parametrize("tree", ["classify", "generate"])
def test_the_plan_compiles_the_step_and_writes_nothing(capsys, tmp_path, tree, request):
    settings = request.getfixturevalue(tree)
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(settings))
    code, out, err = jpeft_(capsys, "train", file, "--dry-run", "train.ema=0.9", "optimizer.name=adafactor")
    assert code == 0, err
    for said in ("trainable", "10 updates", "compiled in", "memory ", "MiB: base, adapter", "An estimate"):
        assert said in out
    assert not (tmp_path / "run").exists()


def test_the_page_has_the_tables_of_this_schema():
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page.partition("<!-- written by: jpeft config schema --markdown -->\n\n")[2].strip() == (
        schema.markdown().strip()
    ), "write it anew: jpeft config schema --markdown"
