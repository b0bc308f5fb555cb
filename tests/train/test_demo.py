# SPDX-License-Identifier: Apache-2.0
"""The demo: its parts on a few rows, and the whole of it in the slow lane."""

import importlib.util
import re

import numpy as np
import pytest

from jpeft.train import cli, config, data, demo, plots, stdlib_docs, tokenizer


@pytest.fixture(scope="module")
def few(minilm, tmp_path_factory):
    """Sixty texts of two areas, as batches."""
    folder = tmp_path_factory.mktemp("docs")
    chosen = [row for row in stdlib_docs.build()["train"] if row["label"] in ("internet", "mathematics")][:60]
    import json

    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    what, words = config.Data(train=str(folder / "train.jsonl")), tokenizer.load(minilm)
    examples = data.encode(data.read_rows(what, "SEQ_CLS", "train"), what, words, ("internet", "mathematics"))
    batches = data.make_batches(
        examples, batch_size=8, accumulation=1, max_length=128, num_widths=2, pad_id=words.pad_id
    )
    return batches, [row["text"] for row in chosen]


def test_the_embeddings_are_the_means_that_torch_gives(few, minilm):
    import torch
    from transformers import AutoModel, AutoTokenizer

    from jpeft import models

    batches, texts = few
    got = demo.Embedder(models.load(minilm, "FEATURE_EXTRACTION"))(batches)
    inputs = AutoTokenizer.from_pretrained(minilm)(texts[:5], return_tensors="pt", padding=True)
    with torch.no_grad():
        states = AutoModel.from_pretrained(minilm)(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    np.testing.assert_allclose(got[:5], ((states * mask).sum(1) / mask.sum(1)).numpy(), atol=1e-5)


def test_the_baseline_learns(few, minilm):
    batches, _ = few
    truth = np.array(batches.examples.labels)
    assert np.mean(demo.baseline(minilm, batches, batches, batches) == truth) > 0.9


def test_the_settings_are_a_valid_configuration(tmp_path):
    files = {split: tmp_path / f"{split}.jsonl" for split in stdlib_docs.SPLITS}
    settings = demo.settings(tmp_path, files, tmp_path / "run")
    assert settings.data.label_names == stdlib_docs.AREAS
    assert settings.data.eval == str(files["validation"])  # the test split is not looked at in training
    assert config.method(settings.method).rank == 8


def test_an_encoder_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'jpeft\[demo\]'"):
        demo.find_encoder()


def test_a_confusion_matrix_is_drawn(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    written = []
    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: written.append((y, x, s)) or text(self, x, y, s, **k))
    file = plots.confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), ["a", "b", "c"], tmp_path / "c.png")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert sorted(written) == [(0, 0, "1"), (0, 1, "1"), (1, 1, "1"), (2, 0, "1")]


@pytest.mark.slow
def test_the_demo_beats_its_baseline_and_leaves_what_it_says(tmp_path, capsys):
    cli.main(["demo", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    rows = re.findall(r"^(\S.*?)\s{2,}(0\.\d{4})\s+(0\.\d{4})$", out, re.MULTILINE)
    scores = {name: (float(accuracy), float(f1)) for name, accuracy, f1 in rows}
    base, tuned = scores["frozen encoder + logistic regression"], scores["LoRA"]
    assert tuned[0] > base[0] > scores["largest class"][0]
    assert tuned[1] > base[1]
    for name in ("run/adapter/adapter_model.safetensors", "merged/model.safetensors", "confusion.png"):
        assert (tmp_path / name).is_file()
    cli.main(["predict", "--adapter", str(tmp_path / "run" / "adapter"), demo.SENTENCE])
    label, probability, text = capsys.readouterr().out.rstrip("\n").split("\t")
    assert label in stdlib_docs.AREAS
    assert text == demo.SENTENCE
    assert 0 < float(probability) <= 1
