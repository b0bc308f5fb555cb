# SPDX-License-Identifier: Apache-2.0
"""Images in `jpeft eval --task` and `jpeft compare`: figures of the predictions, in every form of the data."""

import json
import shutil
from pathlib import Path

import datasets
import painted
import pytest
import yaml
from sklearn.metrics import accuracy_score, classification_report, f1_score

from jpeft.train import cli, config, saved, seeing
from jpeft.train.compare import measure, runner, study


def run(capsys, *arguments):
    """Standard output of a command that succeeds."""
    cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture(scope="module", name="adapter")
def _adapter(vit, pets, tmp_path_factory):
    """Of a classifier of blue and red that makes mistakes: two updates."""
    folder = tmp_path_factory.mktemp("seen")
    tree = {
        "model": {"path": str(vit), "task": "IMAGE_CLS"},
        "data": {"train": str(pets / "train")},
        "method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
        "optimizer": {"lr": 2e-2},
        "train": {"max_steps": 2, "batch_size": 8},
        "out": str(folder / "run"),
    }
    (folder / "see.yaml").write_text(yaml.safe_dump(tree))
    cli.main(["train", str(folder / "see.yaml")])
    return folder / "run" / "adapter"


@pytest.fixture(scope="module", name="many")
def _many(tmp_path_factory):
    """Folder of 40 images, three of them with the wrong class."""
    folder = painted.paint(tmp_path_factory.mktemp("many") / "test", 20, 5)
    for name in ("3.png", "8.png", "9.png"):
        (folder / "blue" / name).rename(folder / "red" / f"blue {name}")
    return folder


def said_of(adapter, files):
    """What the saved adapter says of each file, by the function behind `jpeft predict`."""
    opened = saved.open_model(None, adapter)
    found = seeing.classify(opened.model, opened.processor, files, saved.label_names(opened))
    return [prediction.label for prediction in found]


def test_a_task_of_images_reports_what_scikit_learn_does(capsys, adapter, many, tmp_path):
    files = sorted(many.glob("*/*.png"))
    truth, said = [file.parent.name for file in files], said_of(adapter, files)
    assert truth != said
    told = run(capsys, "eval", "--task", "images", "--adapter", adapter, "--data", many, "--out", tmp_path / "r.json")
    figures = {line.split()[0]: float(line.split()[1]) for line in told.splitlines() if " [" in line}
    assert figures["accuracy"] == pytest.approx(accuracy_score(truth, said), abs=1e-6)
    assert figures["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"), abs=1e-6)
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["predicted"], record["data"]["rows"]) == (said, 40)
    expected = classification_report(truth, said, output_dict=True, zero_division=0)
    for name in ("blue", "red"):
        for theirs, ours in (("precision",) * 2, ("recall",) * 2, ("f1-score", "f1"), ("support", "examples")):
            assert record["by_class"][name][ours] == pytest.approx(expected[name][theirs])
        assert f"{expected[name]['f1-score']:.6f}" in next(x for x in told.splitlines() if x.startswith(f"{name} "))
    assert "processor_sha256" in record
    assert "max_length" not in record


def test_one_class_for_every_image_is_flagged(capsys, adapter, many, tmp_path):
    files = sorted(many.glob("*/*.png"))
    said = said_of(adapter, files)
    for name in ("blue", "red"):
        (tmp_path / "alike" / name).mkdir(parents=True)
    for number, (file, name) in enumerate(zip(files, said, strict=True)):
        if name == said[0]:
            shutil.copy(file, tmp_path / "alike" / ("blue", "red")[number % 2] / f"{number}.png")
    given = ["--adapter", adapter, "--data", tmp_path / "alike", "--out", tmp_path / "r.json"]
    assert f"collapsed: every row is said to be {said[0]}" in run(capsys, "eval", "--task", "images", *given)


@pytest.mark.parametrize("names", [["blue", "red"], ["red", "blue"], ["red", "green", "blue"]])
def test_class_numbers_are_those_that_the_data_set_names(names, capsys, adapter, many, tmp_path):
    """However a data set numbers its classes, a row is of the class that it names."""
    files = sorted(many.glob("*/*.png"))
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [names.index(file.parent.name) for file in files],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    right = accuracy_score([file.parent.name for file in files], said_of(adapter, files))
    given = ["--adapter", adapter, "--data", tmp_path / "set"]
    told = run(capsys, "eval", *given)
    assert float(told.partition("accuracy ")[2].split()[0]) == pytest.approx(right, abs=1e-6)
    if len(names) == 2:
        told = run(capsys, "eval", "--task", "pets", *given, "--out", tmp_path / "r.json")
        assert float(told.partition("accuracy ")[2].split()[0]) == pytest.approx(right, abs=1e-6)
        return
    with pytest.raises(SystemExit):
        cli.main([str(x) for x in ["eval", "--task", "pets", *given]])
    assert "the task's classes are red, green, blue; the model's are blue, red" in capsys.readouterr().err


def test_a_class_that_the_model_does_not_know_is_named(adapter, tmp_path, capsys):
    painted.paint(tmp_path / "images", 2, 0)
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in sorted((tmp_path / "images").glob("*/*.png"))],
        "label": [0, 1, 2, 2],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue", "x"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(SystemExit):
        cli.main(["eval", "--adapter", str(adapter), "--data", str(tmp_path / "set")])
    assert "row 3: label 'x' is out of range; there are 2 labels, 'blue', 'red'" in capsys.readouterr().err


def test_a_task_of_images_takes_no_length_and_no_model_of_texts(capsys, adapter, many, classify, tmp_path):
    for arguments, message in (
        (["--adapter", adapter, "--max-length", "8"], "max_length=8 is of texts, and this task is of images"),
        (["--model", classify["model"]["path"]], "the task images needs a model for IMAGE_CLS"),
        (["--adapter", adapter, "--limit", "4"], "stand class by class, so these would be of few classes"),
    ):
        with pytest.raises(SystemExit):
            cli.main([str(x) for x in ["eval", "--task", "images", "--data", many, *arguments]])
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- comparing


@pytest.fixture(name="tree")
def _tree(see, pets, tmp_path):
    """A study of a method on images."""
    return {
        "out": str(tmp_path / "study"),
        "models": {"tiny": {"path": see["model"]["path"]}},
        "tasks": {"pets": {"task": "IMAGE_CLS", "data": see["data"], "test": str(pets / "validation")}},
        "methods": {"lora": {"method": see["method"]}},
        "run": {"train": {"max_steps": 6, "batch_size": 8}, "optimizer": {"lr": 2e-2}},
        "seeds": [0],
        "baselines": ["majority", "head"],
        "sizes": [6],
    }


def planned(s, run, folder):
    plan = runner._plan(s, run)
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan, folder


def test_a_study_of_images_tests_what_was_saved(tree, tmp_path, pets):
    s = study.parse(tree)
    assert [run.method for run in study.finals(s, {})] == ["head", "head", "lora", "lora"]
    plan, folder = planned(s, study.finals(s, {})[2], tmp_path / "whole")
    result = measure.measured(plan, folder)
    for score in ("accuracy", "macro_f1"):
        assert result["test"][score] == pytest.approx(result["eval"][score], abs=1e-6)
    said = said_of(folder / "train" / "adapter", sorted((pets / "validation").glob("*/*.png")))
    assert result["outcome"]["predicted"] == [["blue", "red"].index(name) for name in said]
    assert all(result["latency_ms"][name] > 0 for name in ("adapted", "merged"))
    assert result["label_names"] == ["blue", "red"]


@pytest.mark.parametrize("form", ["folder", "bytes"])
def test_few_images_are_drawn_from_all(form, tree, tmp_path, pets):
    if form == "bytes":
        files = sorted((pets / "train").glob("*/*.png"))
        rows = {
            "image": [{"bytes": f.read_bytes(), "path": None} for f in files],
            "label": [f.parts[-2] for f in files],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
        tree["tasks"]["pets"]["data"] = {**tree["tasks"]["pets"]["data"], "train": str(tmp_path / "set")}
    s = study.parse(tree)
    few = next(run for run in study.finals(s, {}) if run.size == 6)
    plan, folder = planned(s, few, tmp_path / "few")
    result = measure.measured(plan, folder)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len({row["image"] for row in rows}) == len(rows) == 6
    originals = {file.read_bytes(): file.parent.name for file in (pets / "train").glob("*/*.png")}
    with_class = [(Path(row["image"]).read_bytes(), row["label"]) for row in rows]
    assert all(originals[content] == label for content, label in with_class)
    assert sum(result["train_labels"]) == 6
    assert result["label_names"] == ["blue", "red"]


def test_what_language_models_alone_have_is_refused_for_images(tree):
    with pytest.raises(config.ConfigError, match="the baseline untuned is for CAUSAL_LM"):
        study.parse({**tree, "baselines": ["untuned"]})
