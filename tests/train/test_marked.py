# SPDX-License-Identifier: Apache-2.0
"""Words with tags, answers inside texts, and texts to be written: their labels, and the program trained on them."""

import io
import json
import re
import sys

import jax
import numpy as np
import pytest
import transformers
import yaml
from safetensors.numpy import load_file

import jpeft
from jpeft.train import cli, config, data, placing
from jpeft.train.examples import IGNORED, Examples
from jpeft.train.items import Asked, Tagged
from jpeft.train.marked import asked, tagged
from jpeft.train.tokenizer import load

WORDS = ["Don't", "re-read", "U.S.", "naïve", "2,000", "unbelievably", "漢字", "ok"]
CONTEXT = (
    "The kestrel hovers over verges. Unlike falcons, it can hang still in wind of 27.5 km/h; naïve watchers take it "
    "for a kite. It nests in barns, and its young leave after thirty-two days, when the mice are many."
)


@pytest.fixture(scope="module")
def wordpieces(minilm):
    """jpeft's tokenizer and transformers' of the same real encoder."""
    return load(minilm), transformers.AutoTokenizer.from_pretrained(minilm)


@pytest.mark.parametrize("size", [64, 12])
def test_the_first_token_of_a_word_has_its_tag(wordpieces, size):
    ours, theirs = wordpieces
    row = placing.by_word(Tagged(tuple(WORDS), ()), range(100, 108), ours, size)
    expected = theirs(WORDS, is_split_into_words=True, truncation=True, max_length=size)
    assert row.tokens == expected["input_ids"]
    ids = expected.word_ids()
    firsts = [IGNORED if w is None or w == before else 100 + w for before, w in zip([None, *ids], ids, strict=False)]
    assert row.labels == firsts
    assert (row.lost > 0) == (size == 12)


def test_a_space_that_is_a_token_is_of_no_word(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "Ġb": 3}, [("Ġ", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    row = placing.by_word(Tagged(("a", "b", "ab"), ()), [7, 8, 9], load(tmp_path), 16)
    assert row.tokens == [2, 0, 3, 2, 0, 1]
    assert row.labels == [7, IGNORED, 8, IGNORED, 9, IGNORED] or row.labels[1:] == [7, 8, IGNORED, 9, IGNORED]


@pytest.mark.parametrize(("size", "stride"), [(128, 0), (32, 8), (24, 0)])
@pytest.mark.parametrize("text", ["kestrel", "27.5 km/h", "thirty-two days", "many."])
def test_an_answer_is_found_in_every_window_that_holds_it(wordpieces, size, stride, text):
    ours, theirs = wordpieces
    question, start = "What is it about, exactly?", CONTEXT.index(text)
    rows = [*placing.answers(Asked(question, CONTEXT, (start, start + len(text))), ours, size, stride)]
    expected = theirs(
        question, CONTEXT, truncation="only_second", max_length=size, stride=stride, return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    assert [row.tokens for row in rows] == expected["input_ids"]
    assert [row.types for row in rows] == expected["token_type_ids"]
    held = 0
    for number, row in enumerate(rows):
        spans = [
            span if part == 1 else None
            for span, part in zip(expected["offset_mapping"][number], expected.sequence_ids(number), strict=True)
        ]
        inside = [span for span in spans if span is not None]
        if inside[0][0] <= start and start + len(text) <= inside[-1][1]:
            held += 1
            first, last = (spans[place] for place in row.labels)
            assert first is not None
            assert last is not None
            assert (first[0], last[1]) == (start, start + len(text))
        else:
            assert row.labels == [0, 0]
    assert held >= 1 or stride == 0


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda: tagged(["a", "b"], ["O"]), r"it has 2 words, and needs a list of as many tags, got 1"),
        (lambda: tagged("a b", ["O"]), r"its words must be a list of texts, got 'a b'"),
        (lambda: tagged(["a", " "], ["O", "O"]), r"every word must be text that is not empty, got ' '"),
        (lambda: asked("q", "abc", {"text": ["b"], "answer_start": [2]}), r"'b' is not at character 2 .*'c' is"),
        (lambda: asked("q", "abc", {"text": ["c"], "answer_start": [-1]}), r"'c' is not at character -1"),
        (lambda: asked("q", "abc", "b"), r"its answers must be .*, got 'b'"),
        (lambda: asked("q", "abc", {"text": [""], "answer_start": [1]}), r"its answer is empty"),
    ],
)
def test_a_wrong_row_is_named(item, message):
    with pytest.raises(ValueError, match=message):
        item()


def test_no_answer_is_an_item_too():
    assert asked("q", "abc", {"text": [], "answer_start": []}) == Asked("q", "abc", None)
    assert asked("q", "abc", [{"text": "b", "answer_start": 1}]).answer == (1, 2)


def test_targets_are_padded_to_one_length_for_each_width_of_inputs():
    lengths, targets = [5, 8, 9, 16], [3, 12, 2, 1]
    rows = [[np.full(n, 7, np.int32) for n in sizes] for sizes in (lengths, targets)]
    examples = Examples(*rows, rows=4, truncated=0, lost=0, dropped=0, digests={}, labels_of="target")
    batches = data.make_batches(examples, batch_size=2, accumulation=1, max_length=16, num_widths=2, pad_id=0)
    shapes = set()
    for batch in batches.buckets.in_order():
        arrays = batches.collate(batch)
        shapes.add((arrays["input_ids"].shape[-1], arrays["labels"].shape[-1]))
        for at, row in enumerate(batch.rows):
            assert (arrays["labels"][0, at] != IGNORED).sum() == targets[row]
    assert shapes == {(8, 16), (16, 16)}
    assert batches.examples.sizes.tolist() == [8, 20, 11, 17]


T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 19, "d_model": 32, "d_kv": 8,
    "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3,
    "dropout_rate": 0.1, "initializer_factor": 1.0,
}  # fmt: skip


@pytest.fixture
def trained(bert, reviews, tmp_path):
    """(task) -> configuration, and its rows made of the reviews: what is good is tagged, asked for, and repeated."""

    def make(task):
        folder = bert
        if task == "SEQ_2_SEQ_LM":
            folder = tmp_path / "t5"
            jpeft.models.save(jpeft.models.build(T5, key=jax.random.key(3)), folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                text = (bert / name).read_text()
                (folder / name).write_text(text.replace('"pad_token"', '"eos_token": "[SEP]", "pad_token"'))
        for name in ("train", "eval"):
            rows = [json.loads(line) for line in (reviews / f"{name}.jsonl").read_text().splitlines()]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row(task, r["text"])) + "\n" for r in rows))
        targets = ["query", "value", "word_embeddings"] if task != "SEQ_2_SEQ_LM" else ["q", "v"]
        files = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
        return {
            "model": {"path": str(folder), "task": task},
            "data": files | {"num_widths": 1, "max_length": 32, "cache": str(tmp_path / "kept")},
            "method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": targets},
            "optimizer": {"lr": 3e-2},
            "train": {"max_steps": 40, "epochs": None, "batch_size": 16, "log_every": 10},
            "out": str(tmp_path / "run"),
        }

    return make


def row(task, text):
    opinion = next(word for word in text.split() if word in "good great fine bad poor dull".split())
    if task == "TOKEN_CLS":
        return {"tokens": text.split(), "ner_tags": ["B-SAID" if word == opinion else "O" for word in text.split()]}
    if task == "QUESTION_ANS":
        return {
            "question": "was the film", "context": text,
            "answers": {"text": [opinion], "answer_start": [f" {text} ".index(f" {opinion} ")]},
        }  # fmt: skip
    return {"source": text, "target": f"the film was {opinion}"}


def last_evaluation(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "eval_loss" in entry][-1]


@pytest.mark.parametrize(
    ("task", "figure", "least"),
    [("TOKEN_CLS", "eval_macro_f1", 0.9), ("QUESTION_ANS", "eval_exact_match", 0.6), ("SEQ_2_SEQ_LM", "perplexity", 0)],
)
def test_the_program_trains_it(task, figure, least, trained, tmp_path, capsys):
    written = trained(task)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
    cli.main(["train", str(tmp_path / "run.yaml")])
    found = last_evaluation(tmp_path / "run")
    if task == "SEQ_2_SEQ_LM":
        assert found["eval_perplexity"] < 3  # three fixed words, one of six, and the end; 19 at random
    else:
        assert found[figure] > least
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == task
    assert all(np.abs(tensor).max() > 0 for tensor in load_file(adapter / "adapter_model.safetensors").values())

    capsys.readouterr()
    cli.main(["eval", "--adapter", str(adapter), "--data", str(tmp_path / "eval.jsonl"), "--max-length", "32"])
    loss = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("loss "))["loss"]
    np.testing.assert_allclose(float(loss), found["eval_loss"], rtol=1e-4, atol=1e-5)  # one near 0 is of few digits

    cli.main(["data", "inspect", str(tmp_path / "run.yaml"), "--rows", "1"])
    shown = capsys.readouterr().out
    assert {"TOKEN_CLS": "B-SAID", "QUESTION_ANS": "row 1", "SEQ_2_SEQ_LM": "the film was"}[task] in shown


def test_words_are_tagged_by_the_saved_adapter(trained, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(trained("TOKEN_CLS")))
    cli.main(["train", str(tmp_path / "run.yaml")])
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    cli.main(["predict", "--adapter", str(tmp_path / "run" / "adapter"), "the plot was poor", "a great cast"])
    lines = [line for line in out.getvalue().splitlines() if "/" in line]
    assert lines == ["the/O plot/O was/O poor/B-SAID", "a/O great/B-SAID cast/O"]


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("TOKEN_CLS", "data.stride=4", r"data.stride is for QUESTION_ANS, got TOKEN_CLS"),
        ("TOKEN_CLS", "data.max_target=4", r"data.max_target is for SEQ_2_SEQ_LM, got TOKEN_CLS"),
        ("TOKEN_CLS", "data.packing=best_fit", r"data.packing is for CAUSAL_LM"),
        ("QUESTION_ANS", "data.stride=32", r"data.stride must lie in \[0, data.max_length\), got 32 of 32"),
        (
            "QUESTION_ANS",
            "data.label_names=[a, b]",
            r"is for SEQ_CLS, TOKEN_CLS, IMAGE_CLS; QUESTION_ANS has",
        ),
        ("SEQ_2_SEQ_LM", "data.max_target=0", r"data.max_target"),
        ("SEQ_2_SEQ_LM", "train.samples=2", r"train.samples is for a model that writes \(CAUSAL_LM\)"),
    ],
)
def test_an_option_of_another_task_is_refused(task, override, message, trained, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(trained(task)))
    with pytest.raises(config.ConfigError, match=message):
        config.load(tmp_path / "run.yaml", [override])


def test_a_question_that_fills_the_row_is_named_by_its_line(trained, tmp_path, capsys):
    written = trained("QUESTION_ANS")
    written["data"] |= {"max_length": 8, "stride": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "run.yaml")])
    said = capsys.readouterr().err
    assert re.search(r"train.jsonl:1: its question takes 6 of data.max_length=8 tokens", said), said


def test_labels_of_tags_are_those_of_all_words(trained, tmp_path):
    what = config.Data(**{k: v for k, v in trained("TOKEN_CLS")["data"].items() if k in ("train", "max_length")})
    assert data.label_names(data.read_rows(what, "TOKEN_CLS", "train")) == ("B-SAID", "O")
