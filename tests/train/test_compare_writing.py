# SPDX-License-Identifier: Apache-2.0
"""`jpeft compare` of tasks for which a model writes: what is asked for, what is scored, and what is made of it."""

import copy
import itertools
import json
import sys

import numpy as np
import pytest

from jpeft.train import cli, config, saved
from jpeft.train.compare import measure, outcomes, report, runner, statistics, study
from jpeft.train.tasks import gsm8k, overlap

LORA = {"method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "embed_tokens"]}}
#: Of a share found by 2,000 draws, four standard deviations where they are largest, at one half.
DRAWN = 4 * 0.5 / np.sqrt(statistics.DRAWS)


@pytest.fixture(name="replies", scope="module")
def _replies(tmp_path_factory):
    """A file of inputs and outputs in the words that the tiny models know."""
    rng = np.random.default_rng(0)
    words = "good great fine bad poor dull film plot cast scene the a is was and".split()
    rows = [
        {"input": " ".join(rng.choice(words, 3)), "output": " ".join(rng.choice(words, rng.integers(2, 6)))}
        for _ in range(9)
    ]
    file = tmp_path_factory.mktemp("replies") / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(name="tree")
def _tree(generate, replies, tmp_path):
    """A study of one method whose texts are drawn."""
    return {
        "out": str(tmp_path / "study"),
        "models": {"tiny": {"path": generate["model"]["path"]}},
        "tasks": {
            "replies": {
                "task": "CAUSAL_LM",
                "data": generate["data"],
                "test": str(replies),
                "write": "dialogue",
                "writing": {"max_new_tokens": 6, "temperature": 1.0, "batch_size": 4, "limit": 8},
            }
        },
        "methods": {"lora": LORA},
        "run": {"train": generate["train"], "optimizer": {"lr": 1e-1}},
        "seeds": [3],
        "baselines": ["untuned"],
    }


def with_task(tree, **changes):
    tree = copy.deepcopy(tree)
    tree["tasks"]["replies"] |= changes
    return study.parse(tree)


# ------------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"write": "dialog"},
            "write=dialog is no task that methods can be compared by; there are gsm8k, math500, aime24",
        ),
        ({"write": "sst2"}, "write=sst2 is no task that methods can be compared by"),
        ({"write": "translation"}, "write=translation is no task that methods can be compared by"),
        ({"write": None}, r"tasks\.replies\.writing is for tasks that write; name one by tasks\.replies\.write"),
        ({"metric": "bleu"}, r"metric=bleu is none of rouge_l, which dialogue has with writing\.samples=1"),
        ({"write": "humaneval", "metric": "pass@5"}, r"metric=pass@5 is none of pass@1, token_jaccard"),
        ({"writing": {"seed": 4}}, "writing has seed; rows are those of .*test, seeds are the study's"),
        ({"writing": {"data": "a", "max_length": 7}}, "writing has data, max_length;"),
        ({"writing": {"sampels": 4}}, r"unknown key tasks\.replies\.writing\.sampels"),
        ({"writing": {"samples": 4}}, "several samples of temperature 0 are all the same"),
        ({"write": "aime24", "writing": {"shots": 1}}, "the rows of aime24 have no answer to show"),
        ({"test": ["a.jsonl", "b.jsonl"]}, "is one file where texts are written, got 2"),
        ({"group": "level"}, "group is not for a task that writes"),
        ({"task": "SEQ_CLS"}, r"tasks\.\*\.write is for CAUSAL_LM"),
    ],
)
def test_a_wrong_study(tree, change, said):
    with pytest.raises(config.ConfigError, match=said):
        with_task(tree, **change)


def test_pass_at_k_may_be_asked_for_where_k_are_drawn(tree):
    drawn = {"samples": 5, "temperature": 0.8}
    s = with_task(tree, write="humaneval", writing=drawn, metric="pass@5")
    (plan,) = [runner._plan(s, run)["write"] for run in study.finals(s, {}) if run.method == "lora"]
    assert plan["main"] == "pass@5"
    assert plan["settings"]["seed"] == 3
    assert plan["settings"]["samples"] == 5
    first = with_task(tree, write="humaneval", writing=drawn)
    assert runner._plan(first, study.finals(first, {})[0])["write"]["main"] == "pass@1"


def test_the_base_draws_with_every_seed_where_texts_are_drawn(tree):
    def seeds(**writing):
        s = study.parse(
            copy.deepcopy(tree) | {"tasks": {"replies": tree["tasks"]["replies"] | writing}, "seeds": [3, 4]}
        )
        return [run.seed for run in study.finals(s, {}) if run.method == "untuned"]

    assert seeds() == [3, 4]
    assert seeds(writing={"max_new_tokens": 6}) == [0]
    assert seeds(write=None, writing={}) == [0]


def test_examples_that_are_shown_may_lie_where_a_variable_says(tree, monkeypatch):
    monkeypatch.setenv("SHOWN", "/somewhere")
    s = with_task(tree, writing={"shots": 2, "shots_from": "$SHOWN/train.jsonl"})
    assert s.tasks["replies"].writing.shots_from == "/somewhere/train.jsonl"


def test_a_folder_that_was_begun_before_there_were_texts_is_gone_on_with(tree, tmp_path):
    del tree["tasks"]["replies"]["write"], tree["tasks"]["replies"]["writing"]
    s = study.parse(tree)
    log = tmp_path / "log"
    program = (
        "import json, pathlib, sys; folder = pathlib.Path(sys.argv[1]); open({log!r}, 'a').write('.'); "
        "plan = json.loads((folder / 'plan.json').read_text()); "
        "(folder / 'result.json').write_text(json.dumps({{'plan': plan, 'eval': {{'loss': 1.0}}, 'seconds': 1.0}}))"
    )
    command = [sys.executable, "-S", "-c", program.format(log=str(log))]
    runner.conduct(s, lambda _: None, command)
    file = tmp_path / "study" / "study.json"
    before = json.loads(file.read_text())
    for key in ("write", "writing", "metric"):
        del before["tasks"]["replies"][key]
    file.write_text(json.dumps(before))
    runner.conduct(s, lambda _: None, command)
    assert log.read_text() == ".."  # both runs once
    file.write_text(json.dumps(before | {"sedes": [1]}))
    with pytest.raises(config.ConfigError, match="is no study: unknown key sedes"):
        runner.conduct(s, lambda _: None, command)


# -------------------------------------------------------------------------------------------- scores of single examples


def test_the_values_of_rows_are_those_that_figures_are_means_of():
    rows = [{"answer": "so #### 1,200"}, {"answer": "so #### 3"}]
    found = gsm8k.score(rows, [["#### 1200", "it is $1,200.00"], ["3 and then 4", "nothing"]], 0)
    assert found.values["strict_match"] == [0.5, 0.0]
    assert found.values["equal_value"] == [1.0, 0.0]
    assert found.values["flexible_failed"] == [0.0, 0.5]
    texts = overlap.scorer("rouge_l", "bleu")([{"output": "a cat sat"}] * 2, [["a cat sat"], ["a dog sat"]], 0)
    assert texts.values == {"rouge_l": [pytest.approx(100.0), pytest.approx(200 / 3)]}  # 2 of 3 words on either side
    assert list(texts.metrics) == ["rouge_l", "bleu"]


def written(*values):
    array = np.array(values, float)
    return outcomes.Written(("right", "found")[: len(values)], array, "right")


def test_written_outcomes_by_hand():
    one = written([1, 0, 0.5, 1], [1, 1, 1, 0])
    assert len(one) == 4
    assert one.scores() == {"right": 0.625, "found": 0.75}
    assert one.scores(np.array([0, 1, 2, 1.0])) == {"right": 0.5, "found": 0.75}
    assert one.main_score(np.array([3, 1, 0, 0.0])) == 0.75
    again = outcomes.read(json.loads(json.dumps(one.saved())))
    assert again.names == one.names
    assert again.main == "right"
    np.testing.assert_array_equal(again.values, one.values)
    half = outcomes.subset(one, np.array([True, False, True, False]))
    assert half.scores() == {"right": 0.75, "found": 1.0}
    other = written([0, 0, 0, 0], [0, 0, 0, 1])
    a, b = outcomes.swapped(one, other, np.array([True, False, False, True]))
    assert a.values.tolist() == [[0, 0, 0.5, 0], [0, 1, 1, 1]]
    assert b.values.tolist() == [[1, 0, 0, 1], [1, 0, 0, 0]]


def test_a_difference_is_tested_as_all_swaps_say():
    """p against every one of the 2^10 swaps of two methods' answers, and the interval against the normal one."""
    rng = np.random.default_rng(2)
    ours, theirs = (rng.random(10) < 0.8).astype(float), (rng.random(10) < 0.4).astype(float)
    apart = ours - theirs
    all_swaps = [
        abs(np.dot(signs, apart)) >= abs(apart.sum()) - 1e-9 for signs in itertools.product((1, -1), repeat=10)
    ]
    found = statistics.difference([written(ours)], [written(theirs)])
    assert found.interval.mean == pytest.approx(apart.mean())
    assert 0 < np.mean(all_swaps) < 1
    assert found.p == pytest.approx(np.mean(all_swaps), abs=DRAWN)
    many = (rng.random(2000) < 0.3).astype(float)
    low, high = statistics.intervals([written(many)])["right"][1:]
    half = 1.96 * many.std() / np.sqrt(len(many))
    assert (low, high) == (
        pytest.approx(many.mean() - half, abs=half / 8),
        pytest.approx(many.mean() + half, abs=half / 8),
    )


# ------------------------------------------------------------------------------------------------- real models


def test_what_is_compared_is_what_jpeft_eval_says(tree, replies, tmp_path, capsys):
    """A trained run and the base as it is; texts and figures against the command's, on the saved adapter."""
    s = study.parse(tree)
    lora, untuned = study.finals(s, {})
    results, texts = {}, {}
    for run in (lora, untuned):
        folder = tmp_path / run.method
        folder.mkdir()
        results[run.method] = json.loads(json.dumps(measure.measured(runner._plan(s, run), folder)))
    options = ["--max-new-tokens", 6, "--temperature", 1.0, "--batch-size", 3, "--limit", 8, "--data", replies]
    path = tree["models"]["tiny"]["path"]
    for name, model, seed in (
        ("lora", ["--adapter", tmp_path / "lora" / "train" / "adapter"], 3),
        ("untuned", ["--model", path], 3),
    ):
        out = tmp_path / f"{name}.json"
        cli.main([*map(str, ["eval", "--task", "dialogue", *model, *options, "--seed", seed, "--out", out])])
        theirs, ours = json.loads(out.read_text()), json.loads((tmp_path / name / "texts.json").read_text())
        assert ours["examples"] == theirs["examples"]
        texts[name] = [row["texts"] for row in ours["examples"]]
        assert results[name]["test"]["rouge_l"] == pytest.approx(theirs["metrics"]["rouge_l"]["value"])
    capsys.readouterr()
    assert 0 < results["lora"]["test"]["rouge_l"] < 100
    assert texts["lora"] != texts["untuned"]
    assert results["lora"]["collapsed"] is False
    done = [runner.Done(run, results[run.method]) for run in (lora, untuned)]
    page = report.write(s, done).read_text()
    drawn = "1 of each prompt, drawn at temperature 1 by the run&#x27;s seed; the first 8 rows"
    said = f"replies: texts of at most 6 tokens, {drawn}; scored as `jpeft eval --task dialogue` does, compared by"
    assert f"{said} rouge_l." in page
    text = (tmp_path / "study" / "report.md").read_text()
    assert "| method | rouge_l [95 %] | rouge_l - lora's [95 %] | p | seeds |" in text
    assert "compared by rouge_l." in text
    values = results["lora"]["outcome"]["values"]["rouge_l"]
    assert len(values) == 8
    assert f"| lora | {np.mean(values):.4f} [" in text


@pytest.mark.usefixtures("confined")
def test_programs_are_run_in_the_sandbox_for_a_study_too(data, llama, tmp_path):
    file = str(data / "humaneval" / "test.jsonl")
    settings = {"data": file, "limit": 2, "samples": 5, "temperature": 1.0, "max_new_tokens": 2}
    how = {"task": "humaneval", "main": "pass@5", "settings": settings}
    found = measure._written(saved.open_model(llama, None), how, tmp_path)
    assert found.names == ("pass@1", "pass@5", "token_jaccard")
    record = json.loads((tmp_path / "texts.json").read_text())
    assert record["sandbox"]["system calls"] == "active"
    assert [len(row["passed"]) for row in record["examples"]] == [5, 5]
    assert found.main_score() == np.mean([any(row["passed"]) for row in record["examples"]])
    assert found.scores()["token_jaccard"] == pytest.approx(np.mean([row["jaccard"] for row in record["examples"]]))


@pytest.mark.slow
def test_a_real_model_from_end_to_end(data, tmp_path):
    """stories260K learns to go on with stories: real processes, killed after the first, and gone on with."""
    lines = (data / "text" / "tinystories_2mb.jsonl").read_text().split("\n")[:70]
    told = [json.loads(line)["text"] for line in lines]
    rows = [{"text": text[:300]} for text in told[:60]]
    tests = [{"input": text[:80], "output": text[80:160]} for text in told[60:70]]
    for name, some in (("train", rows[:50]), ("dev", rows[50:]), ("test", tests)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    tree = {
        "out": str(tmp_path / "study"),
        "models": {"stories": {"path": str(data / "models" / "stories260K")}},
        "tasks": {
            "going on": {
                "task": "CAUSAL_LM",
                "data": {
                    "train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "dev.jsonl"), "max_length": 128,
                    "num_widths": 1,
                },
                "test": str(tmp_path / "test.jsonl"),
                "write": "dialogue",
                "writing": {"max_new_tokens": 24, "batch_size": 10},
            }
        },
        "methods": {"lora": {"method": {"kind": "lora", "rank": 4}}, "norms": {"method": {"kind": "norm_tuning"}}},
        "run": {"train": {"max_steps": 4, "batch_size": 8, "save_every": None}, "optimizer": {"lr": 1e-3}},
        "seeds": [0],
        "baselines": ["untuned"],
    }  # fmt: skip
    s, said = study.parse(tree), []
    dying = [sys.executable, "-c", "import sys; sys.exit(9)"]
    with pytest.raises(runner.RunFailed, match="exit code 9"):
        runner.conduct(s, said.append, dying)
    runs = runner.conduct(s, said.append)
    assert sum(line.startswith("run:") for line in said) == 1 + 3
    runner.conduct(s, said.append, only_made=True)
    (table,) = report.digests.digested(s, runs).tables
    rows = {row.method: row for row in table.rows}
    assert table.main == "rouge_l"
    assert table.examples == 10
    assert [*rows] == ["untuned", "lora", "norms"]
    for row in rows.values():
        mean, low, high = row.scores["rouge_l"]
        assert 0 <= low < mean < high < 100  # it knows stories: some words are those that follow
    assert rows["norms"].apart is not None
    for method in ("lora", "norms"):
        record = json.loads(
            (tmp_path / "study" / "runs" / "going on" / "stories" / method / "seed 0" / "texts.json").read_text()
        )
        assert len(record["examples"]) == 10
        assert all(len(example["texts"]) == 1 for example in record["examples"])
    assert "rouge_l" in report.write(s, runs).read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("confined")
def test_maths_and_programs_are_tasks_of_one_study(data, tmp_path):
    """Taught on real solutions, asked real questions, by real processes; a model of stories can do neither."""
    sums, programs = (
        [json.loads(line) for line in (data / name / "test.jsonl").read_text().splitlines()]
        for name in ("gsm8k", "humaneval")
    )
    sums.sort(key=lambda row: len(row["question"] + row["answer"]))
    programs.sort(key=lambda row: len(row["prompt"]))
    solved = [{"text": row["prompt"] + row["canonical_solution"]} for row in programs[4:20]]
    files = {
        "sums": sums[4:20], "more sums": sums[20:24], "asked sums": sums[:4],
        "programs": solved[:12], "more programs": solved[12:], "asked programs": programs[:4],
    }  # fmt: skip
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(name, spoken, **asked):
        said = {"train": str(tmp_path / f"{name}.jsonl"), "eval": str(tmp_path / f"more {name}.jsonl")}
        rows = {"data": {**said, **spoken, "max_length": 128, "num_widths": 1}}
        return {"task": "CAUSAL_LM", **rows, "test": str(tmp_path / f"asked {name}.jsonl"), **asked}

    said = {"max_new_tokens": 8, "batch_size": 4}
    drawn = {**said, "samples": 2, "temperature": 0.8}
    tree = {
        "out": str(tmp_path / "study"),
        "models": {"stories": {"path": str(data / "models" / "stories260K")}},
        "tasks": {
            "sums": task("sums", {"template": "plain"}, write="gsm8k", writing=said),
            "programs": task("programs", {}, write="humaneval", writing=drawn),
        },
        "methods": {"lora": {"method": {"kind": "lora", "rank": 4}}},
        "run": {"train": {"max_steps": 2, "batch_size": 4, "save_every": None}, "optimizer": {"lr": 1e-3}},
        "seeds": [0],
        "baselines": ["untuned"],
    }
    s = study.parse(tree)
    runs = runner.conduct(s, lambda _: None)
    found = {table.task: table for table in report.digests.digested(s, runs).tables}
    assert {name: table.main for name, table in found.items()} == {"sums": "strict_match", "programs": "pass@1"}
    for name, table in found.items():
        assert table.examples == 4
        assert [row.method for row in table.rows] == ["untuned", "lora"]
        assert [row.scores[table.main].mean for row in table.rows] == [0, 0]
        file = tmp_path / "study" / "runs" / name / "stories" / "lora" / "seed 0" / "texts.json"
        examples = json.loads(file.read_text())["examples"]
        assert all(len(row["texts"]) == (2 if name == "programs" else 1) for row in examples)
    assert {"strict_match", "flexible_extract", "equal_value"} < {*found["sums"].rows[0].scores}
    assert {"pass@1", "token_jaccard"} <= {*found["programs"].rows[0].scores}
    assert "pass@1" in report.write(s, runs).read_text()
