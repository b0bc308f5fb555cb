# SPDX-License-Identifier: Apache-2.0
"""`jpeft sweep`: trials that are trained together are what `jpeft train` makes of each, halving, and going on."""

import copy
import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import subjects

from jpeft.io.checkpoint import Checkpoints
from jpeft.train import cli, config, devices, interruption, loop
from jpeft.train.sweep import bayes, digest, halving, lanes, report, runner, space
from jpeft.train.sweep.groups import chunks
from jpeft.train.sweep.material import Material

#: Relative error of the losses of eight updates in float32 (1.2e-7 is one rounding): a lane's sums are of the same
#: numbers, added in another order, and its rate is a float32 and not a Python number.
TOGETHER = 2e-6


@pytest.fixture(scope="module", name="base")
def _base(bert, reviews):
    """A classifier with dropout, two widths of rows, a warm-up and eight updates."""
    return {
        "model": {"path": str(bert), "task": "SEQ_CLS"},
        "data": {"train": str(reviews / "train.jsonl"), "eval": str(reviews / "eval.jsonl"), "num_widths": 2},
        "method": {"kind": "lora", "targets": ["query", "value", "word_embeddings"], "dropout": 0.1},
        "optimizer": {"lr": 1e-2, "warmup": 2, "weight_decay": 0.1},
        "train": {"max_steps": 8, "batch_size": 16, "eval_every": 4, "save_every": 2},
    }


@pytest.fixture(name="tree")
def _tree(base, tmp_path):
    return grid(base, tmp_path / "sweep")


def grid(base, out):
    """Four points: ranks with alphas, and rates."""
    return {
        "out": str(out),
        "base": copy.deepcopy(base),
        "space": {"method.rank, method.alpha": [[2, 4], [4, 6]], "optimizer.lr": [3e-3, 2e-2]},
        "seeds": [0],
    }


@pytest.fixture(scope="module", name="whole")
def _whole(base, tmp_path_factory):
    """The four points with two seeds, each trained to its end: (trials, what conducted them, the sweep)."""
    sweep = with_(grid(base, tmp_path_factory.mktemp("whole") / "sweep"), seeds=[0, 1])
    return *conducted(sweep), sweep


def with_(tree, **changes):
    return space.parse({**tree, **changes})


def conducted(sweep):
    conduct = runner.Conduct(sweep, lambda _: None)
    return conduct.run(), conduct


def check_alone(made, out):
    """What `jpeft train` makes of a trial: losses of all updates, and the evaluations on the way."""
    own = made.trial.config
    result = loop.train(dataclasses.replace(own, out=str(out), train=dataclasses.replace(own.train, log_every=1)))
    assert len(result.losses) == len(made.losses) == own.train.max_steps
    assert subjects.error(made.losses, result.losses) < TOGETHER
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [line for line in lines if "eval_loss" in line]
    assert [line["update"] for line in curve] == [found["update"] for found in made.evaluations]
    for line, found in zip(curve, made.evaluations, strict=True):
        assert found["loss"] == pytest.approx(line["eval_loss"], rel=TOGETHER)
        assert found["accuracy"] == pytest.approx(line["eval_accuracy"])


# ------------------------------------------------------------------------------------- trained together, as alone


def test_every_trial_is_what_it_would_be_alone(whole, tmp_path):
    """Ranks, alphas, rates and seeds together; dropout on, rows of two widths."""
    made, conduct, _ = whole
    assert conduct.cost.lanes == (4, 4)  # by seed: the order of widths is the seed's
    assert conduct.cost.compiled == 2  # one for each width
    assert len({one.losses[-1] for one in made}) == len(made) == 8
    for at in (0, 7):
        check_alone(made[at], tmp_path / str(at))


def test_seeds_are_lanes_of_one_step_where_rows_have_one_width(tree, tmp_path):
    """Each with its own order, head, start and dropout; lanes that diverge leave the others alone, and are no best."""
    tree["base"]["data"]["num_widths"] = 1
    sweep = with_(tree, seeds=[3, 5], space={"optimizer.lr": [1e-2, 1e30]})
    made, conduct = conducted(sweep)
    assert (conduct.cost.lanes, conduct.cost.compiled) == ((4,), 1)
    check_alone(made[1], tmp_path / "alone")
    assert [one.status for one in made] == ["finished", "finished", "diverged", "diverged"]
    assert "| 1e+30 | - | 8 of 8 | diverged |" in report.write(sweep, made, conduct.cost).read_text()
    assert "lr: 0.01" in (Path(sweep.out) / "best.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, key, values, dropout",
    [
        ({"kind": "prefix_tuning"}, "method.num_tokens", [2, 5], False),
        ({"kind": "pfeiffer"}, "method.reduction_factor", [4, 8], True),
        ({"kind": "dora", "alpha": 3}, "method.rank", [2, 5], True),
        ({"kind": "ia3"}, "optimizer.lr", [1e-3, 1e-2], True),
        ({"kind": "adalora", "total_steps": 8, "tinit": 1, "tfinal": 2}, "optimizer.lr", [1e-3, 1e-2], True),
        ([{"kind": "lora", "rank": 2}, {"kind": "bitfit"}], "method.0.rank", [2, 4], True),
    ],
)
def test_other_methods_are_what_they_would_be_alone(method, key, values, dropout, tree, tmp_path):
    tree["base"]["method"] = method
    tree["base"]["train"]["dropout"] = dropout
    made, conduct = conducted(with_(tree, space={key: values}))
    assert conduct.cost.lanes == (2,)
    for one in made:
        check_alone(one, tmp_path / one.trial.name)


# ---------------------------------------------------------------------------------------------- who trains together


@pytest.mark.parametrize(
    "changes, key, values, sizes",
    [
        ({}, "method.rank", [2, 4, 8], [3]),
        ({}, "method.dropout", [0.0, 0.1], [1, 1]),
        ({}, "method.targets", [["query"], ["value"]], [1, 1]),
        ({}, "train.batch_size", [8, 16], [1, 1]),
        ({"optimizer": {"name": "adafactor"}}, "method.rank", [2, 4], [1, 1]),
        ({"optimizer": {"name": "adafactor"}}, "optimizer.lr", [1e-3, 1e-2], [2]),
        ({"method": {"kind": "prompt_tuning"}}, "method.num_tokens", [2, 4], [1, 1]),
        ({"method": {"kind": "prompt_tuning"}, "dropout": False}, "method.num_tokens", [2, 4], [2]),
        ({"method": {"kind": "prefix_tuning"}, "dropout": False}, "method.num_tokens", [2, 4], [2]),
        ({"method": {"kind": "prompt_tuning"}}, "optimizer.lr, optimizer.clip", [[1e-3, 0.1], [1e-2, 1.0]], [2]),
        ({"lanes": 2}, "optimizer.lr", [1e-4, 1e-3, 1e-2], [2, 1]),
    ],
)
def test_who_trains_together(changes, key, values, sizes, tree):
    tree["base"] |= {part: changes[part] for part in ("method", "optimizer") if part in changes}
    tree["base"]["train"]["dropout"] = changes.get("dropout", True)
    sweep, material = with_(tree, space={key: values}, lanes=changes.get("lanes", 16)), Material()
    trials = [trial for at, point in enumerate(space.points(sweep)) for trial in space.trials(sweep, at, point)]
    assert [len(chunk) for chunk in chunks(trials, sweep.lanes, material.dataset)] == sizes


# ---------------------------------------------------------------------------------------------------------- halving


def test_the_losers_are_dropped_and_the_others_go_on_as_if_nothing_was(whole, tree, monkeypatch):
    """Cut off in the first leg by a signal, and after it: nothing is trained twice, and all losses are those."""
    theirs = {one.trial.name: one for one in whole[0]}
    sweep = with_(tree, halving={"eta": 2, "rungs": 1}, metric="loss")
    after, train, spans = interruption.Interruption.after, lanes.train, []
    monkeypatch.setattr(interruption.Interruption, "after", lambda self, number: number == 3)
    with pytest.raises(interruption.Interrupted, match="after update 3 of 4 trials"):
        conducted(sweep)
    monkeypatch.setattr(interruption.Interruption, "after", after)

    def once(trials, material, programs, states, span, folder, *, last):
        if spans:
            raise KeyboardInterrupt
        spans.append((len(trials), span, Checkpoints(folder / "checkpoints").newest()[0]))
        return train(trials, material, programs, states, span, folder, last=last)

    monkeypatch.setattr(lanes, "train", once)
    with pytest.raises(KeyboardInterrupt):
        conducted(sweep)
    spans, first = [], spans
    made, conduct = conducted(sweep)
    assert [first, spans] == [[(4, (0, 4), 3)], [(2, (4, 8), None)]]
    ranked = sorted(made, key=lambda one: theirs[one.trial.name].evaluations[0]["loss"])
    assert {one.trial.name for one in made if one.status == "finished"} == {one.trial.name for one in ranked[:2]}
    for one in made:
        assert len(one.losses) == (8 if one.status == "finished" else 4)
        assert subjects.error(one.losses, theirs[one.trial.name].losses[: len(one.losses)]) < TOGETHER
    assert conduct.cost.lanes == (4, 2)
    assert not list((Path(sweep.out) / "legs").glob("*/checkpoints"))


def test_which_points_go_on():
    rules = space.Halving(eta=3, rungs=2, brackets=2)
    dealt = halving.brackets(rules, range(8))
    assert dealt == [[0, 2, 4, 6], [1, 3, 5, 7]]
    scores = {0: 0.1, 1: 0.2, 2: None, 3: 0.9, 4: 0.8, 5: None, 6: 0.8, 7: 0.3}
    assert halving.survivors(rules, 0, dealt, scores) == [
        1,
        3,
        4,
        6,
        7,
    ]  # the second bracket waits, but for what diverged
    assert halving.survivors(rules, 1, dealt, {1: 0.2, 3: 0.9, 4: 0.5, 6: 0.6, 7: 0.3}) == [3, 6]
    assert halving.stops(rules, 90) == [10, 30, 90]
    assert halving.stops(None, 90) == [90]


def test_a_budget_that_is_too_small():
    with pytest.raises(config.ConfigError, match=r"budget is too small: a training of 4 updates .* after \[0, 1\]"):
        halving.stops(space.Halving(), 4)
    with pytest.raises(config.ConfigError, match="bracket 0 has 2 of 2; try more points"):
        halving.brackets(space.Halving(), [0, 1])


def test_points_that_are_proposed_as_scores_come_in(tree, monkeypatch):
    """Two at a time, by the programs of the first two; told are the means of what is known."""
    told = []

    def propose(sweep, known, count):
        told.append([*known])
        return [{"optimizer.lr": 1e-3 * (1 + len(known) + at)} for at in range(count)]

    monkeypatch.setattr(bayes, "check", lambda: None)
    monkeypatch.setattr(bayes, "propose", propose)
    tree["base"]["data"]["num_widths"] = 1
    tree["base"]["train"] |= {"max_steps": 2, "eval_every": None}
    ranges = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    made, conduct = conducted(with_(tree, search="bayes", trials=4, batch=2, space=ranges))
    assert (conduct.cost.lanes, conduct.cost.compiled) == ((2, 2), 1)
    assert [one.trial.config.optimizer.lr for one in made] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    assert [len(known) for known in told] == [0, 2]
    assert told[1][1] == bayes.Known({"optimizer.lr": 2e-3}, [(2, made[1].evaluations[0]["accuracy"])], True)


# ------------------------------------------------------------------------------------------- what is written, going on


def test_what_a_sweep_writes(whole, capsys):
    made, conduct, sweep = whole
    folder = report.write(sweep, made, conduct.cost).parent
    means = {}
    for one in made:
        means.setdefault(one.trial.point, []).append(one.evaluations[-1]["accuracy"])
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [float(row["accuracy"]) for row in rows] == sorted((np.mean(m) for m in means.values()), reverse=True)
    best = config.load(folder / "best.yaml")
    assert isinstance(best.method, dict)
    assert f"[{best.method['rank']}, {best.method['alpha']}]" == rows[0]["method.rank, method.alpha"]
    assert (best.optimizer.lr, best.out) == (float(rows[0]["optimizer.lr"]), f"{sweep.out}/best")
    trial = json.loads((folder / "trials" / "0003-seed1.json").read_text())
    assert (trial["values"]["optimizer.lr"], trial["status"], len(trial["losses"])) == (2e-2, "finished", 8)
    assert config.parse(trial["config"]).train.seed == 1
    assert (folder / "plots" / "method_rank_method_alpha_x_optimizer_lr.png").stat().st_size > 5000
    said = (folder / "report.md").read_text()
    assert "8 trials in 2 legs of 4 lanes; 2 steps compiled" in said
    assert f"Device: {devices.described()}." in said
    back = digest.read((folder / "report.json").read_text())
    assert digest.dumped(back) == (folder / "report.json").read_text()
    assert report.table(back) == [line for line in said.splitlines() if line.startswith("|")]
    assert [point.mean for point in back.points] == pytest.approx([float(row["accuracy"]) for row in rows])
    drawn = report.heat_map(back, folder / "again.svg")
    assert drawn.read_text() == (folder / "plots" / "method_rank_method_alpha_x_optimizer_lr.svg").read_text()
    with pytest.raises(ValueError, match=r"a heat map is of a grid of two keys; method\.rank, .* were varied"):
        report.heat_map(dataclasses.replace(back, grid={}), folder / "none.svg")


def test_a_sweep_that_is_made_is_not_made_again(whole, monkeypatch, tmp_path, capsys):
    """By the command; another sweep in its folder is refused."""
    _, _, sweep = whole
    monkeypatch.setattr(lanes, "train", None)
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(dataclasses.asdict(sweep)))
    cli.main(["sweep", str(file)])
    assert "best.yaml" in capsys.readouterr().out
    cli.main(["sweep", str(file), "space.optimizer.lr=[1e-3]", "--dry-run"])
    assert capsys.readouterr().out.splitlines()[-1] == "2 points x 2 seeds = 4 trials"
    with pytest.raises(SystemExit):
        cli.main(["sweep", str(file), "base.train.max_steps=9"])
    assert "was begun with another base" in capsys.readouterr().err


def test_an_interrupted_sweep_ends_with_a_code_of_its_own(tree, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(interruption.Interruption, "after", lambda self, number: number == 1)
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(dataclasses.asdict(with_(tree, metric="loss"))))
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", str(file)])
    assert ended.value.code == 75
    assert "interrupted after update 1 of 4 trials" in capsys.readouterr().err
