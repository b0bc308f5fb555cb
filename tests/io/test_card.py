# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported adapter says what it is, and its front matter is YAML that the Hub reads."""

import re

import jax
import peft_oracle as oracle
import pytest
import transformers
import yaml

import jpeft
from jpeft.io.card import Card


def card(tmp_path, **options):
    model = jpeft.adapt(oracle.jax_model("bert cls"), jpeft.LoRA(rank=3, targets=["query"]), key=jax.random.key(0))
    return (jpeft.export_peft(model, tmp_path, **options) / "README.md").read_text()


def test_it_says_what_it_was_told(tmp_path):
    text = card(
        tmp_path,
        base="sentence-transformers/all-MiniLM-L6-v2",
        card=Card("SST-2, 3,000 sentences", {"validation accuracy": 0.84722}, {"jpeft": "0.1.0", "jax": "0.10.2"}),
    )
    assert text.startswith("---\n")
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["jpeft", "lora"],
    }
    assert "# LORA adapter for sentence-transformers/all-MiniLM-L6-v2\n" in text
    assert "Trained with jpeft: 339 parameters" in text  # 3 layers of 3 * (16 + 16), and a head of 3 * 16 + 3
    assert "\n    LoRA(rank=3, targets=('query',))\n" in text
    assert "## Data\n\nSST-2, 3,000 sentences\n" in text
    assert "| validation accuracy | 0.8472 |" in text
    assert "| jax | 0.10.2 |" in text
    assert "AutoModelForSequenceClassification.from_pretrained('sentence-transformers/all-MiniLM-L6-v2')" in text


@pytest.mark.parametrize("base", [None, "/data/models/bert", "./bert"])
def test_a_folder_is_no_id_on_the_hub(tmp_path, base):
    text = card(tmp_path, base=base)
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    assert "| jpeft | 0.1.0 |" in text
    assert "## Data" not in text
    assert "## Results" not in text


@pytest.mark.parametrize("family", ["bert answers", "llama", "llama states", "t5", "vit", "whisper"])
def test_the_class_that_is_named_has_the_models_of_this_type(family, tmp_path):
    kind, task, _ = oracle.FAMILIES[family]
    model = jpeft.adapt(oracle.jax_model(family), jpeft.LoRA(targets="all-linear"), key=jax.random.key(0))
    text = (jpeft.export_peft(model, tmp_path) / "README.md").read_text()
    (auto,) = re.findall(r"transformers\.(\w+)\.from_pretrained", text)
    of_this_type = getattr(transformers, auto)._model_mapping[type(transformers.AutoConfig.for_model(kind))]
    assert of_this_type is type(oracle.torch_model(family)), (auto, task)
