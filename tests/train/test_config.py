# SPDX-License-Identifier: Apache-2.0
"""The configuration: read, overridden, checked; and what it says where something is wrong."""

import copy
import dataclasses

import pytest
import yaml

import jpeft
from jpeft.train import config, formats
from jpeft.train.sections.data import ROLES

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
    tree = {**PLAIN, "data": {"train": {"path": "a.jsonl"}}}
    config.overridden(tree, ["data.train.path=b.jsonl"])
    assert tree["data"] == {"train": {"path": "a.jsonl"}}


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("2.5E+1", 25.0), (".5e-1", 0.05), ("3", 3.0)])
def test_numbers_as_they_are_written(text, value):
    assert parse(f"optimizer.lr={text}").optimizer.lr == value


def test_environment_variables_in_paths(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/data")
    assert parse("data.train=$SOMEWHERE/a.jsonl").data.train == "/data/a.jsonl"
    kept = parse("data.cache=$SOMEWHERE/kept", "model.task=CAUSAL_LM", "data.template=$SOMEWHERE/own.jinja").data
    assert (kept.cache, kept.template) == ("/data/kept", "/data/own.jinja")
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
        ("data.train={path: a.jsonl, splt: x}", r"unknown key data\.train\.splt; did you mean data\.train\.split\?$"),
        (
            "data.train=[{path: a, wieght: 2}]",
            r"unknown key data\.train\.0\.wieght; did you mean data\.train\.weight\?$",
        ),
        ("data.train=[{}]", r"^data\.train\.0\.path is missing$"),
        ("data.train=5", r"^data\.train: input should be a valid string, or a mapping, or a list, got 5$"),
        (
            "optimizer.groups=[{match: a, lrr: 1}]",
            r"unknown key optimizer\.groups\.0\.lrr; did you mean optimizer\.groups",
        ),
        ("optimizer.groups=[{match: a, lr: true}]", r"^optimizer\.groups\.0\.lr: a number is wanted, got True$"),
        ("train.batch_size=true", "^train.batch_size: a number is wanted, got True$"),
        ("optimizer.betas=[true, 0.9]", r"^optimizer\.betas\.0: a number is wanted, got True$"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number, got inf"),
        ("data.train={path: a, weight: .inf}", r"^data\.train\.weight: input should be a finite number, got inf$"),
        ("train.seed=-1", r"train.seed must be in \[0, 2\*\*32\), got -1"),
        ("train.seed=4294967296", r"train.seed must be in \[0, 2\*\*32\)"),
        ("train.seed=4294967295", None),
        ("train.samples=-1", "train.samples must not be negative, got -1"),
        ("uneven=whole", "uneven=whole is of a mesh, and there is none"),
        ("uneven=pad", "uneven"),
        ("train.sample_tokens=5", "train.sample_tokens is for train.samples, which wants none"),
        ("train.max_skips=5", "train.max_skips is for train.on_nan=skip, got stop"),
        ("data.max_bad_rows=5", "data.max_bad_rows is for data.on_bad_row=skip, got stop"),
        ("data.window=5", "data.window is for data.streaming"),
        ("data.loss_on=[assitant]", "data.loss_on names roles of system, .*, tool; got 'assitant'"),
        ("data.loss_on=last", "data.loss_on is for CAUSAL_LM; SEQ_CLS has no messages"),
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


def test_what_preferences_do_not_read_is_refused():
    of_pairs = ("model.task=CAUSAL_LM", "train.objective=dpo")
    with pytest.raises(config.ConfigError, match=r"data\.loss_on is for train\.objective=likelihood"):
        parse(*of_pairs, "data.loss_on=all")
    streamed = ("data.streaming=true", "train.epochs=null", "train.max_steps=3")
    with pytest.raises(config.ConfigError, match=r"preference\.precompute takes all rows before training"):
        parse(*of_pairs, *streamed, "preference.precompute=true")


def test_roles_are_those_that_messages_have():
    assert {*formats._ROLES.values()} == {*ROLES}


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
