# SPDX-License-Identifier: Apache-2.0
"""Every recipe trains, as it stands but for its size: tiny models, a few rows in the form of its data, two updates."""

import json
import math

import pytest
import yaml

from jpeft.train import config, loop, recipes

#: What makes a recipe small, by the model that it names.
SMALL = {
    "MINILM": ["data.max_length=16", "train.batch_size=4"],
    "LLAMA": ["data.max_length=48", "train.batch_size=2", "data.template=plain", "model.remat=none", "method.rank=2"],
    "VIT": ["train.batch_size=4"],
    "JPEFT_DATA": ["data.max_length=8", "train.batch_size=2", "method.rank=2"],
}
#: Rows of the data sets, in their own forms.
ROWS = {
    "sst2": {"sentence": "the film was good", "label": 1},
    "gsm8k": {"question": "a film is good and a scene is bad", "answer": "the plot was poor and dull"},
    "instruct": {"instruction": "a good film", "input": "", "output": "the scene is bad"},
    "pubmedqa": {"question": "is the film good", "contexts": ["the plot was fine"], "final_decision": "yes"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, llama):
    """A folder as the recipes' $JPEFT_DATA, and $PAIRS."""
    folder = tmp_path_factory.mktemp("data")
    names = {"sst2": ("train_sentences", "validation"), "gsm8k": ("train",), "pubmedqa": ("train_cv",)}
    for name, row in ROWS.items():
        (folder / name).mkdir()
        others = {"label": 0} if "label" in row else {"final_decision": "no"} if "final_decision" in row else {}
        lines = [json.dumps(row | (others if i % 2 else {})) + "\n" for i in range(12)]
        for file in names.get(name, ("rasbt_instruction_1100",)):
            (folder / name / f"{file}.jsonl").write_text("".join(lines))
    pair = {"prompt": "the film", "chosen": " was good", "rejected": " is poor"}
    for file in ("train", "eval"):
        (folder / f"{file}.jsonl").write_text((json.dumps(pair) + "\n") * 12)
    (folder / "text").mkdir()
    (folder / "text" / "tinyshakespeare.txt").write_text("the film was good and the plot is poor\n\n" * 20)
    (folder / "models").mkdir()
    (folder / "models" / "stories260K").symlink_to(llama)
    return folder


@pytest.mark.parametrize("name", recipes.listed())
def test_a_recipe_trains(name, data, bert, llama, vit, pets, tmp_path, monkeypatch):
    places = {"JPEFT_DATA": data, "PAIRS": data, "MINILM": bert, "LLAMA": llama, "VIT": vit, "PETS": pets}
    for variable, value in places.items():
        monkeypatch.setenv(variable, str(value))
    file = tmp_path / f"{name}.yaml"
    file.write_text(recipes.text(name))
    small = SMALL[yaml.safe_load(recipes.text(name))["model"]["path"].partition("/")[0].removeprefix("$")]
    limits = ["train.epochs=null", "train.max_steps=2", f"out={tmp_path / 'run'}"]
    result = loop.train(config.load(file, [*small, *limits]))
    assert all(map(math.isfinite, result.losses))
    assert len(result.losses) == 2


@pytest.mark.parametrize("name", recipes.listed())
def test_a_recipe_says_its_command_and_what_was_measured(name):
    text = recipes.text(name)
    assert f"jpeft train jpeft/train/recipes/{name}.yaml" in text
    said = ("Measured 20", "docs/results/", "not measured, for want of")
    assert "# Device" in text
    assert sum(each in text for each in said) == 1
    assert yaml.safe_load(text)["out"] == f"runs/{name}"


@pytest.mark.parametrize("name", recipes.listed())
def test_a_recipe_looks_at_no_test_split(name):
    """What is looked at while training is a part of its own of the training rows, or a split made for that."""
    rows = yaml.safe_load(recipes.text(name))["data"]
    files = [
        source if isinstance(source, dict) else {"path": source}
        for key in ("train", "eval")
        if (source := rows.get(key))
    ]
    assert not [source for source in files if "test" in source["path"].rpartition("/")[2]]
    assert len({json.dumps(source) for source in files}) == len(files)
