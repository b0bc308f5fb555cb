# SPDX-License-Identifier: Apache-2.0
"""Rows to batches: the tokens are transformers' own, every loss is counted, every bad row is named."""

import csv
import json

import numpy as np
import pytest

from jpeft.train import config, data, sources, tokenizer
from jpeft.train.losses import IGNORED


def write(file, values):
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(file)


def options(file, **changes):
    return config.Data(train=str(file), **changes)


def encode(file, folder, names=("bad", "good"), **changes):
    what = options(file, **changes)
    task = "CAUSAL_LM" if names is None else "SEQ_CLS"
    return data.encode(data.read_rows(what, task, "train"), what, tokenizer.load(folder), names)


def values(file, **changes):
    """All rows of a file as they are read."""
    opened = sources.open_source(config.Data(train=str(file)).sources("train")[0], **changes)
    return [row.values for row in opened.rows()]


def batches(examples, **changes):
    shape = {"batch_size": 4, "accumulation": 1, "max_length": 64, "num_widths": 2, "pad_id": 0}
    return data.make_batches(examples, **{**shape, **changes})


# ------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("model", ["minilm", "stories260K"])
def test_the_tokens_are_transformers_own(model, request):
    from transformers import AutoTokenizer

    folder = (
        request.getfixturevalue("minilm") if model == "minilm" else request.getfixturevalue("data") / "models" / model
    )
    texts = [
        "Once upon a time, there was a café.",
        "",
        "it 's a charming\tand often affecting journey .\n",
        "漢字 🙂 x" * 50,
    ]
    theirs, ours = AutoTokenizer.from_pretrained(folder), tokenizer.load(folder)
    assert ours.encode(texts) == theirs(texts)["input_ids"]
    cut, lost = ours.cut(texts, 12)
    assert cut == theirs(texts, truncation=True, max_length=12)["input_ids"]
    assert lost == [max(len(ids) - 12, 0) for ids in theirs(texts)["input_ids"]]
    assert ours.eos_id == theirs.eos_token_id
    assert theirs.pad_token_id in (None, ours.pad_id)


def test_older_files_of_a_tokenizer(tmp_path, minilm):
    (tmp_path / "vocab.txt").write_bytes((minilm / "vocab.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    texts = ["a plain old sentence"]
    assert tokenizer.load(tmp_path).encode(texts) == tokenizer.load(minilm).encode(texts)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        tokenizer.load(tmp_path)


# ------------------------------------------------------------------------------------------------------------- files


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    said = [
        {"text": 'a, "quoted" one', "label": 0},
        {"text": "two\nlines", "label": 1},
        {"text": "three", "label": 1},
    ]
    write(tmp_path / "a.jsonl", said)
    (tmp_path / "b.json").write_text(json.dumps(said))
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(said)
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(said)
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    for name, writer in (("e.arrow", pyarrow.ipc.new_file), ("f.arrow", pyarrow.ipc.new_stream)):
        with writer(tmp_path / name, table.schema) as file:
            file.write_table(table)
    for name in ("a.jsonl", "b.json", "d.parquet", "e.arrow", "f.arrow"):
        assert values(tmp_path / name) == said, name
    assert values(tmp_path / "c.csv") == [{**row, "label": str(row["label"])} for row in said]


def test_a_text_file_by_line_paragraph_and_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n\nthree\n")

    def read(txt):
        return [row["text"] for row in values(file, txt=txt)]

    assert read("line") == ["one", "two", "three"]
    assert read("paragraph") == ["one\ntwo", "three"]
    assert read("document") == ["one\ntwo\n\nthree\n"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.json", "[]", "holds no row"),
        ("a.json", "[1", "a.json cannot be read: it is no JSON"),
        ("a.csv", "text,label\n", "holds no row"),
        ("a.csv", "text,text\nx,y\n", "names 'text' twice"),
        ("a.jsonl", "{broken\n", "a.jsonl:1: it is no JSON"),
        ("a.parquet", "PAR1", "a.parquet cannot be read"),
        ("a.docx", "x", r"no data file that is known; they end in .jsonl"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(data.DataError, match=said):
        values(tmp_path / name)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        values(tmp_path / "a.jsonl")


# ---------------------------------------------------------------------------------------------------- classification


def test_labels_by_name_and_by_number(tmp_path, bert):
    values = [{"text": "good film", "label": "good"}, {"text": "bad film", "label": "bad"}]
    by_name = encode(write(tmp_path / "a.jsonl", values), bert)
    by_number = encode(write(tmp_path / "b.jsonl", [{**v, "label": int(v["label"] == "good")} for v in values]), bert)
    assert [int(label) for label in by_name.labels] == [int(label) for label in by_number.labels] == [1, 0]


@pytest.mark.parametrize(
    "labels, names",
    [
        (["b", "a", "b"], ("a", "b")),
        ([1, 0, 2], ("0", "1", "2")),
        ([10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0], tuple(map(str, range(11)))),
    ],
)
def test_label_names_are_found(tmp_path, labels, names):
    file = write(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in labels])
    assert data.label_names(data.read_rows(options(file), "SEQ_CLS", "train")) == names


@pytest.mark.parametrize(
    "labels, said",
    [
        (["a", "a"], "needs two labels or more; column 'label' holds a"),
        ([0, 2], "go up to 2 without 1; give data.label_names"),
        ([None, None], "needs two labels or more; column 'label' holds none"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, said):
    file = write(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in labels])
    with pytest.raises(data.DataError, match=said):
        data.label_names(data.read_rows(options(file), "SEQ_CLS", "train"))


@pytest.mark.parametrize("label", [2, -1, -100, "worst", None, 0.5, True])
def test_a_label_out_of_range_is_named_by_file_and_line(tmp_path, bert, label):
    values = [{"text": "film", "label": label}] * 2
    if isinstance(label, int) and not isinstance(label, bool):
        values = [{"text": "film", "label": 0}, {"text": "film", "label": label}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n" + "\n".join(json.dumps(value) for value in values) + "\n")
    line = 3 if values[0] != values[1] else 2
    with pytest.raises(
        data.DataError, match=rf"a\.jsonl:{line}: label .* is out of range; there are 2 labels, 'bad', 'good'"
    ):
        encode(file, bert)


def test_the_line_in_a_csv_counts_lines_inside_quotes(tmp_path, bert):
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",good\nfilm,ugly\n')
    with pytest.raises(data.DataError, match=r"a\.csv:4: label 'ugly'"):
        encode(tmp_path / "a.csv", bert)


def test_a_row_of_a_json_list_is_named_by_its_number(tmp_path, bert):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x", "label": "good"}, {"text": "x", "label": "ugly"}]))
    with pytest.raises(data.DataError, match=r"a\.json, row 2: label 'ugly'"):
        encode(tmp_path / "a.json", bert)


@pytest.mark.parametrize("text", [None, 3])
def test_a_text_that_is_none_is_named(tmp_path, bert, text):
    file = write(tmp_path / "a.jsonl", [{"text": text, "label": "good"}])
    with pytest.raises(data.DataError, match=r"a\.jsonl:1: column 'text' must be text"):
        encode(file, bert)


def test_truncation_is_counted_and_keeps_the_special_tokens(tmp_path, bert):
    file = write(tmp_path / "a.jsonl", [{"text": "the " * n, "label": "good"} for n in (3, 8, 20)])
    got = encode(file, bert, max_length=8)
    assert (got.truncated, got.lost) == (2, 2 + 14)
    assert [len(tokens) for tokens in got.tokens] == [5, 8, 8]
    assert all(tokens[0] == 2 and tokens[-1] == 3 for tokens in got.tokens)
    assert "truncated 2 rows (16 tokens lost)" in str(got)


# --------------------------------------------------------------------------------------------------- language models


def test_a_language_model_learns_to_stop(tmp_path, llama):
    got = encode(write(tmp_path / "a.jsonl", [{"text": "the film"}]), llama, None)
    assert got.tokens[0].tolist() == [2, 14, 10, 3]
    assert got.labels[0].tolist() == got.tokens[0].tolist()


def test_a_cut_text_does_not_end(tmp_path, llama):
    got = encode(write(tmp_path / "a.jsonl", [{"text": "the film " * 10}]), llama, None, max_length=8)
    assert (got.truncated, got.lost) == (1, 14)
    assert 3 not in got.tokens[0]


def test_long_text_is_split_without_losing_a_token(tmp_path, llama):
    file = write(tmp_path / "a.jsonl", [{"text": "the film " * 10}, {"text": "scene"}])
    whole = encode(file, llama, None)
    got = encode(file, llama, None, max_length=8, longer="split")
    assert (got.truncated, got.lost, got.dropped) == (0, 0, 0)
    assert [len(tokens) for tokens in got.tokens] == [8, 8, 6, 3]
    assert np.concatenate(got.tokens).tolist() == np.concatenate(whole.tokens).tolist()


def test_rows_without_a_trainable_token_are_dropped_and_counted(tmp_path, minilm, llama):
    file = write(tmp_path / "a.jsonl", [{"text": "the " * 8}, {"text": "film"}])
    got = encode(file, llama, None, max_length=9, longer="split")  # the end-of-text token is left alone
    assert (len(got.tokens), got.dropped) == (2, 1)
    assert "dropped 1 without a trainable token" in str(got)


def test_nothing_to_train_on_is_an_error(tmp_path, minilm, monkeypatch):
    words = tokenizer.load(minilm)
    words.backend.post_processor = None
    what = options(write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}]))
    with pytest.raises(data.DataError, match=r"none of the 2 rows of .* has a token that can be trained"):
        data.encode(data.read_rows(what, "CAUSAL_LM", "train"), what, words, None)


# ----------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_batch_holds_its_rows_and_nothing_else(reviews, bert, accumulation):
    examples = encode(reviews / "train.jsonl", bert)
    made = batches(examples, accumulation=accumulation)
    seen = 0
    for batch in made.buckets.epoch(0, 0):
        arrays = made.collate(batch)
        assert {x.shape[:2] for x in arrays.values()} == {(accumulation, 4)}
        assert all(x.dtype == np.int32 for x in arrays.values())
        ids, mask, labels = (arrays[k].reshape(4 * accumulation, -1) for k in ("input_ids", "attention_mask", "labels"))
        for at, row in enumerate(batch.rows):
            assert ids[at][mask[at] == 1].tolist() == examples.tokens[row].tolist()
            assert labels[at].tolist() == [int(examples.labels[row])]
        rest = slice(len(batch.rows), None)
        assert (labels[rest] == IGNORED).all()
        assert (mask[rest].sum(axis=1) == 1).all()  # attention over nothing would be NaN
        real, padded = made.sizes(batch)
        assert real == mask[: len(batch.rows)].sum()
        assert padded == mask.size
        seen += len(batch.rows)
    assert seen == len(examples.tokens)


def test_padding_has_no_label_in_a_language_model(reviews, llama):
    made = batches(encode(reviews / "train.jsonl", llama, None))
    for batch in made.buckets.in_order():
        arrays = made.collate(batch)
        counts = arrays["labels"] != IGNORED
        assert (counts[0, : len(batch.rows)] == (arrays["attention_mask"][0, : len(batch.rows)] == 1)).all()
        assert (arrays["labels"][counts] == arrays["input_ids"][counts]).all()


def test_the_shapes_of_an_epoch_are_bounded(reviews, bert):
    made = batches(encode(reviews / "train.jsonl", bert), num_widths=2)
    shapes = {made.collate(batch)["input_ids"].shape for epoch in range(3) for batch in made.buckets.epoch(0, epoch)}
    assert len(shapes) <= 2


def test_other_examples_come_in_the_training_widths(tmp_path, bert, reviews):
    train = batches(encode(reviews / "train.jsonl", bert), accumulation=2)
    file = write(tmp_path / "a.jsonl", [{"text": "the " * n, "label": "good"} for n in (2, 9, 30)])
    same = train.like(encode(reviews / "eval.jsonl", bert))
    assert same.buckets.widths == train.buckets.widths
    assert (same.buckets.batch_rows, same.accumulation) == (4, 1)
    longer = train.like(encode(file, bert))
    assert longer.buckets.widths == (*train.buckets.widths, 32)
    cut = train.like(encode(file, bert, max_length=30))
    assert cut.buckets.widths == (*train.buckets.widths, 30)
