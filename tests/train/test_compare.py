# SPDX-License-Identifier: Apache-2.0
"""`jpeft compare`: what a study comes to, that it goes on where it was, and what is measured of a run."""

import copy
import csv
import json
import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from jpeft.train import cli, config
from jpeft.train.compare import digest, measure, opening, report, runner, study, table

METHODS = {
    "lora": {"method": {"kind": "lora", "rank": 2}},
    "bitfit": {"method": {"kind": "bitfit"}, "optimizer": {"lr": 3e-3}},
}


@pytest.fixture(name="tree")
def _tree(classify, reviews, tmp_path):
    """A study of two methods."""
    model = {key: value for key, value in classify["model"].items() if key != "task"}
    return {
        "out": str(tmp_path / "study"),
        "models": {"tiny": model},
        "tasks": {"reviews": {"task": "SEQ_CLS", "data": classify["data"], "test": str(reviews / "eval.jsonl")}},
        "methods": METHODS,
        "run": {"train": classify["train"], "optimizer": {"lr": 1e-2}},
        "seeds": [0],
        "baselines": ["majority"],
    }


def with_(tree, **changes):
    return study.parse(copy.deepcopy(tree) | changes)


# ------------------------------------------------------------------------------------------------- what is to be run


def test_the_runs_of_a_study(tree):
    s = with_(
        tree, seeds=[0, 1], sizes=[4], baselines=["majority", "head", "full"], tune={"optimizer.lr": [1e-3, 1e-2]}
    )
    assert [str(r.folder) for r in study.trials(s)][:2] == [
        "reviews/tiny/head/trial lr=0.001", "reviews/tiny/head/trial lr=0.01"
    ]  # fmt: skip
    assert len(study.trials(s)) == 4 * 2
    finals = study.finals(s, {("tiny", "reviews", "lora"): {"optimizer.lr": 0.5}})
    assert len(finals) == 4 * 2 * 2
    rates = {r.method: r.config["optimizer"]["lr"] for r in finals}
    assert rates == {"head": 1e-2, "full": 1e-2, "lora": 0.5, "bitfit": 3e-3}
    assert {r.config["train"]["seed"] for r in finals} == {0, 1}
    assert all(r.trial is None for r in finals)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"methods": {}}, "methods must not be empty"),
        ({"methods": {"full": METHODS["lora"]}}, "methods.full has the name of a baseline"),
        ({"compare_with": "dora"}, "compare_with='dora' is none of the methods lora, bitfit"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"tune": {"optimizer.lr": [1]}, "tune_seed": 0}, "tune_seed=0 is one of the seeds"),
        ({"sizes": [0]}, "sizes must be 1 or more"),
        ({"lanes": 0}, "lanes must be 1 or more, got 0"),
        (
            {"lanes": 2, "run": {"train": {"best": "loss", "max_steps": 2}}},
            r"train\.best='loss' is not for lanes=2: lanes of one step are judged by their evaluation at the end",
        ),
        ({"baselines": ["untuned"]}, "untuned is for CAUSAL_LM"),
        ({"methods": {"a": METHODS["lora"], "A": METHODS["lora"]}}, "differ in more than case"),
        ({"methods": {"lora": {"method": {"kind": "lora", "rnk": 2}}}}, "seed 0: unknown key method.rnk; did you mean"),
        ({"tune": {"optimizer.lrr": [1]}}, "unknown key optimizer.lrr; did you mean optimizer.lr"),
        ({"tune": {"optimizer.lr": []}}, "every key of tune has one or more values, each once"),
        ({"tune": {"optimizer.lr": [0.1, 0.1]}}, "every key of tune has one or more values, each once"),
        ({"sedes": [1]}, r"unknown key sedes; did you mean seeds\?"),
        ({"baselines": ["best"]}, "baselines.*'majority', 'untuned', 'head' or 'full', got 'best'"),
    ],
)
def test_a_wrong_study(change, said, tree):
    with pytest.raises(config.ConfigError, match=said):
        with_(tree, **change)


def test_trials_need_a_validation_split(tree):
    del tree["tasks"]["reviews"]["data"]["eval"]
    with pytest.raises(config.ConfigError, match=r"tune needs data\.eval in every task"):
        with_(tree, tune={"optimizer.lr": [1.0]})


def test_lanes_need_a_validation_split_and_leave_no_times(tree):
    tree["tasks"]["reviews"]["target"] = 0.9
    with pytest.raises(config.ConfigError, match="with lanes=2 no run has a time of its own"):
        with_(tree, lanes=2)
    del tree["tasks"]["reviews"]["data"]["eval"]
    with pytest.raises(config.ConfigError, match=r"lanes=2 needs data\.eval in every task"):
        with_(tree, lanes=2)


def test_a_study_from_yaml(tree, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    assert study.load(file, ["seeds=[3]"]).seeds == (3,)
    file.write_text("[]")
    with pytest.raises(config.ConfigError, match="holds a list; a study is a mapping"):
        study.load(file)
    with pytest.raises(FileNotFoundError, match="no study"):
        study.load(tmp_path / "none.yaml")


# ------------------------------------------------------------------------------------------- runs that are gone on with

#: Stands in for a process: writes what it was called for, and the results.
_FAKE = """
import json, pathlib, sys
folders = [pathlib.Path(folder) for folder in sys.argv[1:]]
with open({log!r}, "a") as log: log.write("\\t".join(map(str, folders)) + "\\n")
for folder in folders:
    plan = json.loads((folder / "plan.json").read_text())
    lr = plan["config"]["optimizer"]["lr"]
    if {die!r} in str(folder): sys.exit(9)
    result = {{"plan": plan, "eval": {{"accuracy": 1 - abs(lr - 0.1), "loss": 1.0}}, "seconds": 1.0}}
    if lr > 1: result = {{"plan": plan, "failed": "loss nan", "seconds": 1.0}}
    (folder / "result.json").write_text(json.dumps(result))
"""


def fake(tmp_path, die="nothing"):
    return [sys.executable, "-S", "-c", _FAKE.format(log=str(tmp_path / "log"), die=die)]


def calls(tmp_path):
    return [line.split("/runs/")[1] for line in (tmp_path / "log").read_text().splitlines()]


def test_a_study_that_was_cut_off_goes_on(tree, tmp_path):
    s = with_(tree, seeds=[0, 1])
    with pytest.raises(runner.RunFailed, match="exit code 9 and no result"):
        runner.conduct(s, lambda _: None, fake(tmp_path, die="bitfit"))
    assert len(calls(tmp_path)) == 3
    done = runner.conduct(s, lambda _: None, fake(tmp_path))
    assert [d.run.method for d in done] == ["lora", "lora", "bitfit", "bitfit"]
    assert len(calls(tmp_path)) == 5  # the one that failed again, and the one that was left
    runner.conduct(with_(tree, seeds=[0, 1, 2]), lambda _: None, fake(tmp_path))
    assert sorted(calls(tmp_path)[5:]) == ["reviews/tiny/bitfit/seed 2", "reviews/tiny/lora/seed 2"]


def test_lanes_share_a_process_and_what_is_made_is_not_made_again(tree, tmp_path):
    """Trials of a method together, its seeds together; of a lot that was cut off, what it left is kept."""
    s = with_(tree, seeds=[0, 1, 2], lanes=2, tune={"optimizer.lr": [0.01, 0.1]})

    def processes():
        return [
            [folder.split("/tiny/")[1] for folder in line.split("\t")]
            for line in (tmp_path / "log").read_text().splitlines()
        ]

    with pytest.raises(runner.RunFailed, match=r"bitfit/seed 1 ended with exit code 9.*bitfit/seed 0/log\.txt ends"):
        runner.conduct(s, lambda _: None, fake(tmp_path, die="bitfit/seed 1"))
    trials = [[f"{name}/trial lr={lr}" for lr in (0.01, 0.1)] for name in ("lora", "bitfit")]
    loras = [["lora/seed 0", "lora/seed 1"], ["lora/seed 2"]]
    assert processes() == [*trials, *loras, ["bitfit/seed 0", "bitfit/seed 1"]]
    done = runner.conduct(s, lambda _: None, fake(tmp_path))
    assert processes()[5:] == [["bitfit/seed 1", "bitfit/seed 2"]]
    assert [(d.run.method, d.run.seed) for d in done] == [(m, n) for m in ("lora", "bitfit") for n in range(3)]
    runner.conduct(with_(tree, seeds=[0, 1, 2], tune=s.tune), lambda _: None, fake(tmp_path))  # lanes=1: the same study
    assert len(processes()) == 6


def test_the_best_trial_is_taken_and_divergence_is_not(tree, tmp_path):
    s = with_(tree, tune={"optimizer.lr": [0.01, 0.2, 3.0]})
    done = runner.conduct(s, lambda _: None, fake(tmp_path))
    assert {d.run.method: d.run.config["optimizer"]["lr"] for d in done} == {"lora": 0.01, "bitfit": 0.01}
    assert json.loads((tmp_path / "study" / "chosen.json").read_text())["tiny / reviews / lora"] == {
        "optimizer.lr": 0.01
    }
    with pytest.raises(runner.RunFailed, match=r"all trials of tiny / reviews / lora, .* diverged"):
        runner.conduct(
            with_(tree, out=str(tmp_path / "other"), tune={"optimizer.lr": [3.0]}), lambda _: None, fake(tmp_path)
        )


def test_trials_are_chosen_by_the_figure_that_is_asked_for():
    def trial(name, **figures):
        return runner.Done(study.Run("m", "t", "lora", 0, None, {"name": name}, {}), {"eval": figures})

    trials = [
        trial("majority", accuracy=0.6, macro_f1=0.2, loss=0.9),
        trial("balanced", accuracy=0.5, macro_f1=0.4, loss=1.2),
        trial("calm", accuracy=0.5, macro_f1=0.3, loss=0.8),
    ]
    found = {by: runner.choose(trials, by)["m", "t", "lora"]["name"] for by in (None, "accuracy", "macro_f1", "loss")}
    assert found == {None: "majority", "accuracy": "majority", "macro_f1": "balanced", "loss": "calm"}
    texts = [trial("a", loss=2.0, perplexity=7.4), trial("b", loss=1.0, perplexity=2.7)]
    assert runner.choose(texts)["m", "t", "lora"]["name"] == "b"


def test_another_study_in_the_folder_is_refused(tree, tmp_path):
    runner.conduct(with_(tree), lambda _: None, fake(tmp_path))
    with pytest.raises(config.ConfigError, match="was begun with another run"):
        runner.conduct(with_(tree, run={"train": {"epochs": 2}}), lambda _: None, fake(tmp_path))
    with pytest.raises(config.ConfigError, match="was made by another plan"):
        runner.conduct(
            with_(tree, methods={**METHODS, "lora": {"method": {"kind": "lora"}}}), lambda _: None, fake(tmp_path)
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").touch()
    with pytest.raises(config.ConfigError, match="holds something that is no study"):
        runner.conduct(with_(tree, out=str(tmp_path / "full")), lambda _: None, fake(tmp_path))


def test_the_command(tree, tmp_path, capsys):
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(tree))
    cli.main(["compare", str(file), "--dry-run", "seeds=[0, 1]"])
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "reviews/tiny/bitfit/seed 0",
        "reviews/tiny/bitfit/seed 1",
        "4 runs",
    ]
    with pytest.raises(SystemExit):
        cli.main(["compare", str(file), "--report"])
    assert "seed 0 is not made yet; without --report the study makes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, said",
    [
        ({"test": "nowhere.jsonl"}, "tasks.reviews.test: .*nowhere.jsonl"),
        ({"data": {"train": "lost.jsonl"}}, "tasks.reviews.data.train: .*lost.jsonl"),
        ({"test": "EMPTY"}, "tasks.reviews.test: .*empty.jsonl"),
        ({"group": "sourc"}, "tasks.reviews.group='sourc' is no column of the test rows; there are .*label"),
        ({"task": "CAUSAL_LM", "general": "none.txt"}, "tasks.reviews.general: .*none.txt"),
        ({"task": "CAUSAL_LM", "write": "gsm8k", "test": "gone.jsonl"}, "tasks.reviews.test: .*gone.jsonl"),
    ],
)
def test_data_that_is_not_there_is_said_before_the_first_run(change, said, tree, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    change = {key: str(tmp_path / "empty.jsonl") if value == "EMPTY" else value for key, value in change.items()}
    task = tree["tasks"]["reviews"] | change
    opening.check(with_(tree))
    with pytest.raises(config.ConfigError, match=said):
        opening.check(with_(tree, tasks={"reviews": task}, baselines=[]))


def test_the_command_opens_the_data_first(tree, tmp_path, capsys):
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(tree))
    with pytest.raises(SystemExit):
        cli.main(["compare", str(file), "tasks.reviews.test=nowhere.jsonl"])
    assert "tasks.reviews.test: " in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


# ------------------------------------------------------------------------------------------------- what is measured


def planned(s, run, folder):
    folder.mkdir(parents=True)
    return runner._plan(s, run), folder


def test_two_methods_from_end_to_end(tree, tmp_path):
    """Real processes, a real report."""
    s = with_(tree)
    runs = runner.conduct(s, lambda _: None)
    page = report.write(s, runs).read_text()
    assert all(name in page for name in ("lora", "bitfit", "majority", "<svg", "adapter KB"))
    rows = list(csv.DictReader((tmp_path / "study" / "report.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["majority", "lora", "bitfit"]
    for row, done in zip(rows[1:], runs, strict=True):
        assert float(row["accuracy"]) == pytest.approx(done.result["test"]["accuracy"])
        assert all(float(row[cost]) > 0 for cost in ("trained", "step ms", "GFLOP/step", "peak MB", "forward ms"))
    assert (tmp_path / "study" / "plots" / "reviews_on_tiny" / "scores.png").stat().st_size > 5000
    made = digest.digested(s, runs)
    (whole,) = made.tables
    assert sum(whole.truth.values()) == pytest.approx(1)
    for row in whole.rows:
        found = {name: recall for name, (_, recall) in row.classes.items()}
        assert np.mean([*found.values()]) == pytest.approx(row.scores["recall"].mean)
    assert [row.classes.keys() for row in whole.rows] == [whole.truth.keys()] * 3
    back = digest.read((tmp_path / "study" / "report.json").read_text())
    assert digest.dumped(back) == digest.dumped(made)
    for one, other in zip(back.tables[0].rows, whole.rows, strict=True):
        assert one.scores["accuracy"] == pytest.approx(other.scores["accuracy"], rel=1e-5)
    assert [row.costs["trained"] for row in back.tables[0].rows] == [row.costs["trained"] for row in whole.rows]
    assert report.markdown(back, {0: {}}, tmp_path) == report.markdown(made, {0: {}}, tmp_path)


def test_what_is_tested_is_what_was_saved(tree, tmp_path):
    """On the validation split the test gives the run's own last figures; groups and fewer rows are told apart."""
    s = with_(tree, sizes=[5], methods={"lora": METHODS["lora"]})
    run = study.finals(s, {})[1]
    assert run.size == 5
    plan, folder = planned(s, run, tmp_path / "run")
    result = measure.measured(plan, folder)
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 5
    for score in ("accuracy", "macro_f1"):
        assert result["test"][score] == pytest.approx(result["eval"][score], abs=1e-6)
    assert sum(result["train_labels"]) == 5
    assert json.loads(json.dumps(result)) == result


#: Relative error of the losses of two trainings of some updates in float32, whose sums are added in another order.
TOGETHER = 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHODS["lora"], {"method": {"kind": "pfeiffer", "reduction_factor": 4}}])
def test_runs_that_are_trained_together_are_what_each_is_alone(method, tree, tmp_path):
    """Two seeds, one with another rate and one that diverges, in one process: every figure of the run itself."""
    task = tree["tasks"]["reviews"]
    tree["tasks"]["reviews"] = {**task, "data": {**task["data"], "num_widths": 1}}
    s = with_(tree, methods={"lora": method}, seeds=[0, 1])
    plans = [runner._plan(s, run) for run in study.finals(s, {})]
    folders = [tmp_path / name for name in ("a", "b", "lost", "alone")]
    plans[1]["config"]["optimizer"] = {"lr": 2e-3}
    plans.append(copy.deepcopy(plans[1]))
    plans[2]["config"]["optimizer"] = {"lr": 1e30}
    for folder, plan in zip(folders, [*plans, plans[1]], strict=True):
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps(plan))
    measure.main(*folders[:3])
    measure.main(folders[3])
    first, lane, lost, alone = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert (lane["lanes"], first["lanes"], "lanes" in alone) == (3, 3, False)
    assert re.match(r"update \d+: loss nan\. The update was not made|a gradient in 10 updates", lost["failed"])
    assert lane["eval"]["loss"] == pytest.approx(alone["eval"]["loss"], rel=TOGETHER)
    assert lane["eval"]["loss"] != first["eval"]["loss"]
    assert [at["update"] for at in lane["curve"]] == [at["update"] for at in alone["curve"]]
    assert lane["test"] == pytest.approx(alone["test"], rel=TOGETHER)
    for same in ("parameters", "adapter_kb", "collapsed", "train_labels", "label_names"):
        assert lane[same] == alone[same]
    for kept in ("gflop_step", "updates"):
        assert lane["training"][kept] == alone["training"][kept]
    assert lane["memory"] == {key: alone["memory"][key] for key in ("program_mb", "parts_mb")}
    assert ("latency_ms" in first, "latency_ms" in lane) == (True, False)
    weights = [
        {key: x for file in (folder / "train" / "adapter").glob("*.safetensors") for key, x in load_file(file).items()}
        for folder in (folders[1], folders[3])
    ]
    assert weights[0].keys() == weights[1].keys()
    for key, x in weights[0].items():
        np.testing.assert_allclose(x, weights[1][key], rtol=1e-4, atol=1e-6)
    s = with_(tree, methods={"lora": method}, seeds=[0, 1], lanes=3)
    made = digest.digested(s, [runner.Done(run, r) for run, r in zip(study.finals(s, {}), (first, lane), strict=True)])
    assert "2 of them trained with others of their method in one compiled step" in made.protocol[0]


@pytest.mark.slow
def test_a_language_model_and_what_it_forgets(generate, reviews, tmp_path):
    text = tmp_path / "general.txt"
    text.write_text("the film was good\nthe plot and the cast\n" * 5)
    tree = {
        "out": str(tmp_path / "study"), "models": {"tiny": {"path": generate["model"]["path"]}},
        "tasks": {"reviews": {
            "task": "CAUSAL_LM", "data": generate["data"], "test": str(reviews / "eval.jsonl"), "general": str(text),
        }},
        "methods": {"lora": METHODS["lora"]}, "run": {"train": generate["train"], "optimizer": {"lr": 1e-2}},
        "seeds": [0], "baselines": ["untuned"],
    }  # fmt: skip
    s = study.parse(tree)
    lora, untuned = study.finals(s, {})
    results = {run.method: measure.measured(*planned(s, run, tmp_path / run.method)) for run in (lora, untuned)}
    assert results["lora"]["test"]["loss"] == pytest.approx(results["lora"]["eval"]["loss"], rel=1e-5)
    assert results["lora"]["test"]["loss"] < results["untuned"]["test"]["loss"]
    assert results["untuned"]["forgetting"]["before"] == results["untuned"]["forgetting"]["after"]
    assert results["lora"]["forgetting"]["before"] == results["untuned"]["forgetting"]["before"]
    assert results["lora"]["forgetting"]["after"] != results["lora"]["forgetting"]["before"]
    assert results["lora"]["latency_ms"].keys() == {"adapted", "merged", "decode", "merged_decode"}
    found = table.tables(s, [runner.Done(run, results[run.method]) for run in (lora, untuned)])
    assert [row.method for row in found[0].rows] == ["untuned", "lora"]
    assert np.isfinite(found[0].rows[1].apart.p if found[0].rows[1].apart else 0)
