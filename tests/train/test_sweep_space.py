# SPDX-License-Identifier: Apache-2.0
"""The space of a sweep: what it comes to, and what cannot be."""

import importlib.util

import pytest

from jpeft.train import config
from jpeft.train.sweep import bayes, opening, space


@pytest.fixture(name="tree")
def _tree(classify, tmp_path):
    base = {key: value for key, value in classify.items() if key != "out"}
    return {"out": str(tmp_path / "sweep"), "base": base, "space": {"optimizer.lr": [1e-3, 1e-2]}}


RANGE = {"low": 1e-4, "high": 1e-1, "log": True}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"optimizer.lr": []}}, "space.optimizer.lr has no value"),
        ({"space": {"optimizer.lrr": [1]}}, r"unknown key optimizer.lrr; did you mean optimizer.lr\?"),
        ({"space": {"method.rnk": [1]}}, r"method.rnk=1: unknown key method.rnk; did you mean method.rank\?"),
        ({"space": {"method.rank.a": [1]}}, "unknown key method.rank.a: a is looked for in 4, which has no keys"),
        ({"space": {"train.seed": [1]}}, "space.train.seed cannot vary: give the seeds of every point as `seeds`"),
        ({"space": {"logging.tensorboard": [True]}}, "space.logging.tensorboard cannot vary: it changes nothing"),
        ({"space": {"data.eval": ["a"]}}, "space.data.eval cannot vary: all trials are judged on the same rows"),
        ({"space": {"optimizer.lr": [1, 1]}}, "space.optimizer.lr has a value twice"),
        ({"space": {"method.rank, method.alpha": [[1, 2], 3]}}, "each of its values is a list of 2"),
        ({"space": {"method.rank, optimizer.lr": [[1, 2]], "optimizer.lr": [1]}}, "space.optimizer.lr is there twice"),
        ({"space": {"optimizer.lr": RANGE}}, "space.optimizer.lr is a range; search=grid takes values"),
        ({"space": {"optimizer.lr": RANGE | {"low": 1}}, "search": "random", "trials": 2}, "low=1 is not below"),
        ({"space": {"optimizer.lr": RANGE | {"low": 0}}, "search": "random", "trials": 2}, "begins above 0"),
        ({"space": {"optimizer.lr": RANGE | {"low": True}}, "search": "random", "trials": 2}, "lr.low: a number is wa"),
        ({"search": "random"}, "search=random needs trials"),
        ({"search": "random", "trials": 3}, "trials=3, and the space has about 2 points"),
        ({"trials": 2}, "trials is for search=random and bayes"),
        ({"seeds": []}, "seeds must be different from each other, and at least one"),
        ({"metric": "perplexity"}, "metric is one of loss, accuracy, macro_f1, got 'perplexity'"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"batch": 3}, "batch=3 is for search=bayes, which proposes so many points at a time"),
        ({"lanes": 0}, "lanes must be 1 or more"),
        ({"halving": {"eta": 1}}, "halving.eta is 2 or more"),
        ({"halving": {"brackets": 4}}, r"halving.brackets is at most rungs \+ 1 = 3"),
        ({"halvng": {}}, r"unknown key halvng; did you mean halving\?"),
    ],
)
def test_a_wrong_sweep(changes, said, tree):
    with pytest.raises(config.ConfigError, match=said):
        space.parse(tree | changes)


@pytest.mark.parametrize(
    "section, values, said",
    [
        (None, {"mesh": "data=1"}, "base.mesh='data=1' is not for a sweep: lanes of one step lie on one device"),
        ("train", {"best": "loss"}, "base.train.best='loss' is not for a sweep"),
        ("data", {"eval": []}, "base.data.eval names no file"),
    ],
)
def test_a_base_that_is_not_for_a_sweep(section, values, said, tree):
    (tree["base"] if section is None else tree["base"][section]).update(values)
    with pytest.raises(config.ConfigError, match=said):
        space.parse(tree)


def test_points_and_trials(tree):
    sweep = space.parse(tree | {"space": {"method": {"rank": [2, 4]}, "method.alpha, optimizer.lr": [[1, 0.1]]}})
    assert space.points(sweep)[1] == {"method.rank": 4, "method.alpha, optimizer.lr": [1, 0.1]}
    trial = space.trials(sweep, 1, space.points(sweep)[1])[0]
    assert isinstance(trial.config.method, dict)
    assert (trial.config.method["rank"], trial.config.method["alpha"], trial.config.optimizer.lr) == (4, 1, 0.1)
    assert trial.config.method["targets"] == ["query", "value", "word_embeddings"]


def test_drawn_points_lie_in_their_ranges_and_are_drawn_again(tree):
    ranges = {"optimizer.lr": RANGE, "method.rank": {"low": 2, "high": 64, "log": True}}
    sweep = space.parse(tree | {"space": ranges, "search": "random", "trials": 200})
    found = space.points(sweep)
    assert found == space.points(sweep)
    ranks, rates = ([point[key] for point in found] for key in ("method.rank", "optimizer.lr"))
    assert all(isinstance(rank, int) and 2 <= rank <= 64 for rank in ranks)
    assert min(ranks) == 2
    assert max(ranks) > 55
    assert 60 < sum(rate < 10**-2.5 for rate in rates) < 140  # half, by logarithms
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)


def test_a_base_in_a_file(tree, tmp_path):
    import json

    (tmp_path / "base.yaml").write_text(json.dumps(tree["base"]))
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(tree | {"base": str(tmp_path / "base.yaml")}))
    sweep = space.load(file, ["base.train.batch_size=4", "seeds=[5]"])
    assert (sweep.base["train"]["batch_size"], sweep.seeds, sweep.figure) == (4, (5,), "accuracy")


def test_what_tpe_proposes_lies_in_the_space_and_follows_the_scores(tree):
    if importlib.util.find_spec("optuna") is None:
        with pytest.raises(ImportError, match=r"search=bayes needs optuna.*pip install 'jpeft\[sweep\]'"):
            bayes.check()
        pytest.skip("optuna is absent")
    ranges = {"optimizer.lr": RANGE, "method.rank": [2, 4, 8]}
    sweep = space.parse(tree | {"space": ranges, "search": "bayes", "trials": 60, "batch": 10})
    known: list[bayes.Known] = []
    for _ in range(6):
        proposed = bayes.propose(sweep, known, 10)
        assert proposed == bayes.propose(sweep, known, 10)  # as a sweep that was cut off does
        for at, point in enumerate(proposed):
            assert 1e-4 <= point["optimizer.lr"] <= 1e-1
            assert point["method.rank"] in (2, 4, 8)
            score = 1 - abs(point["optimizer.lr"] - 1e-3) * 100 + 0.01 * point["method.rank"]
            known.append(bayes.Known(point, [(5, score - 0.1), (10, score)], (True, False, None)[at % 3]))
    last = sorted(point.values["optimizer.lr"] for point in known[-10:])
    assert 3e-4 < last[5] < 5e-3


@pytest.mark.parametrize(
    "changes, base, said",
    [
        ({}, {"data": {"eval": "nowhere.csv"}}, r"base.data.eval: .*nowhere.csv"),
        (
            {"halving": {"rungs": 60}},
            {"train": {"max_steps": 20, "epochs": None}},
            "the budget is too small: a training of 20 updates",
        ),
        ({"halving": {"eta": 3, "rungs": 1}}, {}, "the budget is too small: halving keeps 1 of 3 points"),
    ],
)
def test_what_a_sweep_lacks_is_said_before_its_first_trial(changes, base, said, tree):
    space_of_four = {"space": {"optimizer.lr": [1e-3, 2e-3] if changes.get("halving", {}).get("eta") else [1, 2, 3, 4]}}
    own = {key: {**tree["base"].get(key, {}), **values} for key, values in base.items()}
    sweep = space.parse(tree | space_of_four | changes | {"base": {**tree["base"], **own}})
    with pytest.raises(config.ConfigError, match=said):
        opening.check(sweep)


def test_a_sweep_that_lacks_nothing_is_let_through(tree):
    opening.check(space.parse(tree | {"halving": {"eta": 2, "rungs": 1}}))
