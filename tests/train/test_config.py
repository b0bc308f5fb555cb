# SPDX-License-Identifier: Apache-2.0
"""The configuration: read, overridden, checked; and what it says where something is wrong."""

import copy
import dataclasses

import pytest
import yaml

import jpeft
from jpeft.train import config

PLAIN = {
    "model": {"path": "base", "task": "SEQ_CLS"},
    "data": {"train": "train.jsonl"},
    "train": {"epochs": 1},
    "out": "out",
}


def parse(*overrides):
    return config.parse(config.overridden(PLAIN, overrides))


def test_what_is_written_out_reads_back_equal():
    full = parse("method={kind: lora, rank: 4, targets: [query, value]}", "data.eval=[a.csv, b.csv]", "mesh=data=2")
    assert config.parse(yaml.safe_load(config.dump(full))) == full
    assert full.data.eval == ("a.csv", "b.csv")
    assert full.mesh == "data=2"


def test_a_file_with_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(PLAIN))
    got = config.load(
        file, ["optimizer.lr=1e-3", "train.epochs=null", "train.max_steps=7", "optimizer.betas=[0.8, 0.9]"]
    )
    assert got.optimizer.lr == 1e-3
    assert (got.train.epochs, got.train.max_steps) == (None, 7)
    assert got.optimizer.betas == (0.8, 0.9)


def test_overriding_leaves_the_given_tree_alone():
    before = copy.deepcopy(PLAIN)
    parse("data.text=sentence", "method.rank=3")
    assert before == PLAIN


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("2.5E+1", 25.0), (".5e-1", 0.05), ("3", 3.0)])
def test_numbers_as_they_are_written(text, value):
    assert parse(f"optimizer.lr={text}").optimizer.lr == value


def test_environment_variables_in_paths(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/data")
    assert parse("data.train=$SOMEWHERE/a.jsonl").data.train == "/data/a.jsonl"
    with pytest.raises(config.ConfigError, match=r"\$NOWHERE_AT_ALL/a.*not set"):
        parse("data.train=$NOWHERE_AT_ALL/a.jsonl")


@pytest.mark.parametrize(
    "override, said",
    [
        ("optimizer.lrr=1", r"unknown key optimizer.lrr; did you mean optimizer.lr\?"),
        ("optimzer.lr=1", r"unknown key optimzer; did you mean optimizer\?"),
        ("lr=1", r"unknown key lr; did you mean optimizer.lr\?"),
        ("train.max_length=1", r"unknown key train.max_length; did you mean data.max_length\?"),
        ("data.zzz=1", "unknown key data.zzz; the keys are data.train, data.eval"),
        ("optimizer.lr=fast", "optimizer.lr: .*valid number.*got 'fast'"),
        ("optimizer.lr=-1", "optimizer.lr must be positive, got -1"),
        ("optimizer.clip=0", "optimizer.clip must be positive, got 0"),
        ("optimizer.warmup=1.5", r"optimizer.warmup is a share in \[0, 1\) or a whole number of updates, got 1.5"),
        ("optimizer.betas=[0.9, 1.0]", r"optimizer.betas must be in \[0, 1\), got 1"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay must not be negative"),
        ("optimizer.schedule=step", "optimizer.schedule: .*'linear', 'cosine', 'wsd' or 'polynomial', got 'step'"),
        ("train.batch_size=0", "train.batch_size must be 1 or more, got 0"),
        ("train.max_steps=5", "give one of train.epochs and train.max_steps"),
        ("train.epochs=null", "give one of train.epochs and train.max_steps"),
        ("train.eval_every=5", "train.eval_every is set, and data.eval names no file"),
        ("model.task=CLS", "model.task: .*'SEQ_CLS', .*'CAUSAL_LM'.* got 'CLS'"),
        ("model.task=CAUSAL_LM", None),
        ("data.train=[]", "data.train names no file"),
        ("data.longer=split", "data.longer=split is for CAUSAL_LM"),
        ("data.label_names=[a]", "data.label_names needs two or more different names"),
        ("data.label_names=[a, a]", "data.label_names needs two or more different names"),
        ("optimizer=3", "optimizer: .*got 3"),
        ("out.x=1", "override 'out.x=1': out is a value"),
        ("seed", r"an override has the form section.key=value, got 'seed'"),
    ],
)
def test_what_is_wrong_is_said_by_its_key(override, said):
    if said is None:
        parse(override)
        return
    with pytest.raises(config.ConfigError, match=said):
        parse(override)


def test_labels_are_for_classification():
    with pytest.raises(config.ConfigError, match=r"data.label_names is for SEQ_CLS"):
        parse("model.task=CAUSAL_LM", "data.label_names=[a, b]")


def test_lora_plus_is_for_lora():
    with pytest.raises(config.ConfigError, match=r"optimizer.lora_plus_ratio is for method.kind=lora, got 'other'"):
        parse("method.kind=other", "optimizer.lora_plus_ratio=16")


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(config.ConfigError) as error:
        parse("optimizer.lrr=1", "data.max_lenght=1")
    assert len(str(error.value).splitlines()) == 2


def test_a_missing_key():
    with pytest.raises(config.ConfigError, match=r"model.path is missing"):
        config.parse({**PLAIN, "model": {"task": "SEQ_CLS"}})


@pytest.mark.parametrize(
    "text, said",
    [("a: [", "is not YAML"), ("- 1", "holds a list; a configuration is a mapping"), ("", "model is missing")],
)
def test_a_broken_file(tmp_path, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(config.ConfigError, match=said):
        config.load(file)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        config.load(tmp_path / "none.yaml")


def test_a_method_is_its_own_dataclass():
    got = config.method({"kind": "lora", "rank": 4, "alpha": 2, "targets": ["query"], "dropout": 0.5})
    assert got == jpeft.LoRA(rank=4, alpha=2, targets=["query"], dropout=0.5)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"kind": "lorra"}, "method.kind is one of lora.*got 'lorra'"),
        ({"rank": 4}, "method.kind is one of .*got None"),
        ([], "method is an empty list"),
        ([{"kind": "lora"}, {"kind": "lara"}], r"method\.1\.kind is one of .*got 'lara'"),
        ([{"kind": "lora", "rnk": 1}], r"unknown key method\.0\.rnk; did you mean method\.0\.rank\?"),
        ({"kind": "lora", "rnk": 4}, r"unknown key method.rnk; did you mean method.rank\?"),
        ({"kind": "lora", "rank": 0}, "method: .*rank"),
        ({"kind": "lora", "dropout": 2}, "method: .*dropout"),
    ],
)
def test_a_wrong_method(options, said):
    with pytest.raises(config.ConfigError, match=said):
        config.method(options)


def test_every_key_is_documented():
    for section in (config.Config, config.Model, config.Data, config.Optimizer, config.Train):
        for field in dataclasses.fields(section):
            assert field.name in (section.__doc__ or ""), f"{section.__name__}.{field.name}"
