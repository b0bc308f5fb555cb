# SPDX-License-Identifier: Apache-2.0
"""Sources: files with bad rows, folders, splits, mixtures, forms found by their columns, and rows that are kept."""

import json
import multiprocessing
from pathlib import Path

import chat_tokenizer as tiny
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jpeft.train import config, data, encoding, sources, store, tokenizer
from jpeft.train.records import MOST_BYTES
from jpeft.train.sections.data import Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model"), tiny.CHATML)


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def load(folder, train, task="CAUSAL_LM", names=None, **options):
    what = config.Data(train=train, **options)
    return data.encode(data.read_rows(what, task, "train"), what, tokenizer.load(folder), names)


def texts(folder, examples):
    words = tokenizer.load(folder)
    return [words.backend.decode(ids.tolist()).removesuffix("</s>") for ids in examples.tokens]


# ---------------------------------------------------------------------------------------------------------- bad rows

GOOD = b'{"text": "good"}\n'
BAD = {
    "no JSON": (b'{"text": "half\n', "a.jsonl:2: it is no JSON"),
    "a list": (b"[1, 2]\n", r"a.jsonl:2: a row is an object with columns, got \[1, 2\]"),
    "not UTF-8": (b'{"text": "\xff\xfe"}\n', "a.jsonl:2: it is not UTF-8: invalid start byte at byte 11"),
    "10 MB": (b'{"text": "%s"}\n' % (b"x" * 10_000_000), "a.jsonl:2: the line has 10,000,013 bytes; a row may have"),
    "a number": (b'{"text": 3}\n', "a.jsonl:2: column 'text' must be text, got 3"),
    "nothing": (b'{"text": null}\n', "a.jsonl:2: column 'text' must be text, got None"),
    "empty": (b'{"text": " "}\n', "a.jsonl:2: column 'text' is empty"),
    "no column": (b'{"txt": "x"}\n', "a.jsonl:2: it has no 'text'"),
    "half a character": (
        b'{"text": "a \\ud83d film"}\n',
        r"a.jsonl:2: column 'text' holds half a character, '\\ud83d'",
    ),
    "half a character, deep": (
        b'{"text": "x", "more": [{"said": "\\udc00"}]}\n',
        "a.jsonl:2: column 'more' holds half a character",
    ),
    "deep": (b'{"text": %s1%s}\n' % (b"[" * 3000, b"]" * 3000), "a.jsonl:2: "),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, folder, capsys, kind):
    line, said = BAD[kind]
    (tmp_path / "a.jsonl").write_bytes(GOOD + line + GOOD)
    with pytest.raises(data.DataError, match=said) as error:
        load(folder, str(tmp_path / "a.jsonl"))
    assert "data.on_bad_row=skip" in str(error.value)
    assert len(str(error.value)) < 1000
    got = load(folder, str(tmp_path / "a.jsonl"), on_bad_row="skip")
    assert texts(folder, got) == ["good", "good"]
    assert (got.rows, got.skipped) == (3, 1)
    assert "skipped 1 bad rows" in str(got)
    assert "a.jsonl:2" in capsys.readouterr().out


def test_a_label_out_of_range_is_skipped_too(tmp_path, folder):
    file = jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in ("a", "c", 1, 2, None)])
    got = load(folder, file, "SEQ_CLS", ("a", "b"), on_bad_row="skip")
    assert [int(label) for label in got.labels] == [0, 1]
    assert (got.rows, got.skipped) == (5, 3)


def test_rows_of_a_table_that_is_broken(tmp_path, folder):
    (tmp_path / "a.csv").write_bytes(b'text,label\ngood,a\n"x",a,b\n\xff,a\ngood,a\n"unended\n')
    with pytest.raises(data.DataError, match=r"a\.csv:3: it has 3 fields, and the header 2"):
        load(folder, str(tmp_path / "a.csv"))
    got = load(folder, str(tmp_path / "a.csv"), on_bad_row="skip")
    assert (texts(folder, got), got.skipped) == (["good", "good"], 3)


def test_a_row_of_a_table_that_does_not_end_is_named_by_where_it_begins(tmp_path, folder):
    (tmp_path / "a.csv").write_text('text\ngood\n"begun\nand\nnever ended\n')
    with pytest.raises(data.DataError, match=r"a\.csv:5: it is no CSV: .*; the row begins at line 3"):
        load(folder, str(tmp_path / "a.csv"))


@pytest.mark.parametrize("content", ["text\ngood\n".encode("utf-16"), b"\xff\ngood\n", b'a"b"c",""d\ntext\ngood\n'])
def test_a_row_never_takes_the_headers_place(tmp_path, folder, content):
    (tmp_path / "a.csv").write_bytes(content)
    for policy in ("stop", "skip"):
        with pytest.raises(data.DataError, match=r"a\.csv"):
            load(folder, str(tmp_path / "a.csv"), on_bad_row=policy)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json", "a.csv", "a.txt", "document.txt"])
def test_a_mark_in_front_of_a_file_is_no_part_of_it(tmp_path, folder, name):
    content = {".csv": "text\ngood\n", ".txt": "good\n"}.get(name[-4:], '{"text": "good"}\n')
    content = f"[{content}]" if name == "list.json" else content
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    got = load(folder, str(tmp_path / name), txt="document" if name == "document.txt" else "line")
    assert [text.strip() for text in texts(folder, got)] == ["good"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_bad_row_of_a_columnar_file_is_named(tmp_path, folder, kind):
    """A text that is not UTF-8, as the format lets any bytes stand for one, and one of 10 MB within a list."""
    file, held = tmp_path / f"a.{kind}", pa.array([b"good", b"\xff\xfe", b"good"])
    columnar(file, pa.table({"text": pa.Array.from_buffers(pa.string(), 3, held.buffers())}))
    with pytest.raises(data.DataError, match=rf"a\.{kind}, row 2: it is not UTF-8: invalid start byte at byte 1;"):
        load(folder, str(file))
    got = load(folder, str(file), on_bad_row="skip")
    assert (texts(folder, got), got.skipped) == (["good", "good"], 1)
    said = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * size}] for size in (1, 10**7)]
    columnar(file, pa.table({"messages": said}))
    with pytest.raises(data.DataError, match=rf"a\.{kind}, row 2: column 'messages' has 10,000,000 bytes"):
        load(folder, str(file))


def columnar(file, table):
    if file.suffix == ".parquet":
        pq.write_table(table, file)
        return
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def test_bad_rows_are_bounded(tmp_path, folder):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"broken\n" * 20)
    with pytest.raises(data.DataError, match=r"more than data.max_bad_rows=5 rows are bad, such as:\n.*a\.jsonl:2:"):
        load(folder, str(tmp_path / "a.jsonl"), on_bad_row="skip", max_bad_rows=5)


def test_a_line_is_never_held_whole(tmp_path, folder):
    with (tmp_path / "a.txt").open("wb") as file:
        for _ in range(3):
            file.write(b"x" * MOST_BYTES)
        file.write(b"\ngood\n")
    got = load(folder, str(tmp_path / "a.txt"), on_bad_row="skip")
    assert (texts(folder, got), got.skipped) == (["good"], 1)


# ------------------------------------------------------------------------------------------------- splits and mixtures


@pytest.mark.parametrize(
    "split, rows",
    [
        ("train", [*range(10)]),
        ("train[:3]", [0, 1, 2]),
        ("train[80%:]", [8, 9]),
        ("train[-2:]", [8, 9]),
        ("train[2:4]", [2, 3]),
    ],
)
def test_a_part_of_a_file(tmp_path, folder, split, rows):
    file = jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10)])
    assert texts(folder, load(folder, Source(file, split=split))) == [str(i) for i in rows]


def test_a_split_that_a_file_has_not(tmp_path, folder):
    file = jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(data.DataError, match="a file is one split, 'train'"):
        load(folder, Source(file, split="test"))


def test_every_split_and_part_has_a_hash_of_its_own(tmp_path, folder):
    """Of one folder, the rows that are trained on and those that are evaluated are of two splits."""
    jsonl(tmp_path / "train.jsonl", [{"text": "one"}])
    jsonl(tmp_path / "test.jsonl", [{"text": "two"}])
    trained = load(folder, (str(tmp_path), Source(str(tmp_path), split="test")))
    assert {*trained.digests} == {str(tmp_path), f"{tmp_path}, test"}
    assert len({*trained.digests.values()}) == 2


def test_a_folder_through_datasets(tmp_path, folder):
    jsonl(tmp_path / "train.jsonl", [{"text": str(i)} for i in range(5)])
    jsonl(tmp_path / "test.jsonl", [{"text": "held"}])
    assert texts(folder, load(folder, Source(str(tmp_path), split="train[1:3]"))) == ["1", "2"]
    assert texts(folder, load(folder, Source(str(tmp_path), split="test"))) == ["held"]
    with pytest.raises(data.DataError, match="split 'nothing', cannot be loaded"):
        load(folder, Source(str(tmp_path), split="nothing"))


def test_a_saved_data_set(tmp_path, folder):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert texts(folder, load(folder, str(tmp_path / "saved"))) == ["a", "b"]


def test_an_id_that_cannot_be_reached_is_named(folder):
    with pytest.raises(data.DataError, match="nobody/nothing, split 'train', cannot be loaded"):
        load(folder, "nobody/nothing")


def test_sources_are_mixed_by_weight_and_form(tmp_path, folder):
    one = jsonl(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(4)])
    two = jsonl(tmp_path / "b.jsonl", [{"body": f"b{i}"} for i in range(4)])
    mixed = (Source(one, weight=2.5), Source(two, weight=0.5, columns={"text": "body"}))
    got = texts(folder, load(folder, mixed))
    assert len(got) == 4 * 2 + 2 + 2
    assert {got.count(f"a{i}") for i in range(4)} == {2, 3}
    assert len({text for text in got if text[0] == "b"}) == 2
    assert load(folder, mixed).digests.keys() == {one, two}


# -------------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    "columns, task, form",
    [
        ("text label", "CAUSAL_LM", "text"),
        ("instruction output", "CAUSAL_LM", "alpaca"),
        ("messages id", "CAUSAL_LM", "messages"),
        ("conversations", "CAUSAL_LM", "sharegpt"),
        ("prompt response", "CAUSAL_LM", "prompt_completion"),
        ("question contexts answer", "CAUSAL_LM", "question_answer"),
        ("problem solution", "CAUSAL_LM", "question_answer"),
        ("sentence label idx", "SEQ_CLS", "sentence"),
        ("premise hypothesis label", "SEQ_CLS", "sentence_pair"),
        ("question contexts label", "SEQ_CLS", "sentence_pair"),
        ("prompt chosen rejected", "PREFERENCE", "preference"),
    ],
)
def test_a_form_is_found_by_its_columns(columns, task, form):
    from jpeft.train import formats

    assert formats.find(columns.split(), task, {}, None, "a.jsonl").form.name == form


@pytest.mark.parametrize(
    "columns, options, said",
    [
        (
            "body id",
            {},
            r"(?s)columns body, id, which fit no form .*\n  alpaca: instruction, \[input\], out",
        ),
        ("text prompt completion", {}, "which fit several forms: text, prompt_completion; say which by data.format"),
        ("text", {"text": "body"}, r"has no column 'body'; it has text \(see data.text\)"),
        ("text", {"columns": {"words": "text"}}, "data.columns names 'words', which is no part of"),
        ("text", {"format": "alpaca"}, "which fit no form"),
    ],
)
def test_a_form_that_is_not_clear(tmp_path, folder, columns, options, said):
    file = jsonl(tmp_path / "a.jsonl", [dict.fromkeys(columns.split(), "x")])
    with pytest.raises(data.DataError, match=said):
        load(folder, file, **options)


def test_a_pair_of_texts_is_what_transformers_makes_of_it(tmp_path, minilm):
    from transformers import AutoTokenizer

    rows = [
        {"premise": "a film", "hypothesis": "not a film at all, but a long, long play", "label": 0},
        {"premise": "one " * 30, "hypothesis": "two", "label": 1},
    ]
    got = load(minilm, jsonl(tmp_path / "a.jsonl", rows), "SEQ_CLS", ("no", "yes"), max_length=16)
    theirs = AutoTokenizer.from_pretrained(minilm)(
        [row["premise"] for row in rows], [row["hypothesis"] for row in rows], truncation=True, max_length=16
    )
    assert [ids.tolist() for ids in got.tokens] == theirs["input_ids"]
    assert got.types is not None
    assert [types.tolist() for types in got.types] == theirs["token_type_ids"]
    made = data.make_batches(got, batch_size=2, accumulation=1, max_length=16, num_widths=1, pad_id=0)
    assert made.collate(made.buckets.in_order()[0])["token_type_ids"].sum() == sum(map(sum, theirs["token_type_ids"]))


# --------------------------------------------------------------------------------------------------------------- kept


def same(one, other):
    assert all((a == b).all() for a, b in zip(one.tokens, other.tokens, strict=True))
    assert all((a == b).all() for a, b in zip(one.labels, other.labels, strict=True))
    assert (one.rows, one.truncated, one.lost, one.dropped, one.unended) == (
        other.rows, other.truncated, other.lost, other.dropped, other.unended,
    )  # fmt: skip


def test_kept_rows_are_taken_and_made_anew_when_anything_changed(tmp_path, folder, monkeypatch):
    rows = [{"prompt": "how?" * n, "completion": "so"} for n in (1, 2, 9)]
    file, kept = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "kept"
    first = load(folder, file, cache=str(kept), max_length=60)
    (written,) = kept.iterdir()
    with monkeypatch.context() as context:
        context.setattr(encoding.Encoder, "__call__", lambda *_: pytest.fail("made anew"))
        same(load(folder, file, cache=str(kept), max_length=60), first)
    other = tiny.write(tmp_path / "other", tiny.INSTRUCT, starts=True)
    for number, (model, options) in enumerate(
        [(folder, {"max_length": 61}), (folder, {"template": "chatml"}), (folder, {"loss_on": "all"}), (other, {})], 2
    ):
        load(model, file, cache=str(kept), **{"max_length": 60, **options})
        assert len([*kept.iterdir()]) == number
    monkeypatch.setattr(store, "code_digest", lambda: "newer")
    load(folder, file, cache=str(kept), max_length=60)
    assert len([*kept.iterdir()]) == 6
    monkeypatch.undo()
    jsonl(tmp_path / "a.jsonl", rows[:2])
    load(folder, file, cache=str(kept), max_length=60)
    assert len([*kept.iterdir()]) == 7
    assert written.is_file()


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_kept_rows_that_were_damaged_are_made_anew(tmp_path, folder, capsys, harm):
    file, kept = jsonl(tmp_path / "a.jsonl", [{"text": "some words"}] * 3), tmp_path / "kept"
    first = load(folder, file, cache=str(kept))
    (written,) = kept.iterdir()
    whole = bytearray(written.read_bytes())
    if harm == "flip":
        whole[-5] ^= 1
    written.write_bytes(whole if harm == "flip" else whole[: len(whole) // 2] if harm == "cut" else b"")
    same(load(folder, file, cache=str(kept)), first)
    assert "are damaged; they are made anew" in capsys.readouterr().out
    same(load(folder, file, cache=str(kept)), first)
    assert "damaged" not in capsys.readouterr().out


def _load_at_once(folder, file, kept, gate):
    gate.wait()
    examples = load(Path(folder), file, cache=kept)
    assert int(np.concatenate(examples.tokens).sum()) > 0


def test_two_processes_may_keep_the_same_rows(tmp_path, folder):
    file = jsonl(tmp_path / "a.jsonl", [{"text": "some words " * 9}] * 300)
    spawn = multiprocessing.get_context("spawn")
    gate = spawn.Barrier(2)
    both = [
        spawn.Process(target=_load_at_once, args=(str(folder), file, str(tmp_path / "kept"), gate)) for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert len([*(tmp_path / "kept").iterdir()]) == 1


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    "name, form, count",
    [
        ("instruct/rasbt_instruction_1100.jsonl", "alpaca", 1100),
        ("gsm8k/test.jsonl", "question_answer", 1319),
        ("text/tinystories_2mb.jsonl", "text", 2316),
    ],
)
def test_real_data_in_its_own_form(request, name, form, count):
    folder = request.getfixturevalue("data")
    model = folder / "models/stories260K"
    what = config.Data(train=str(folder / name), template="alpaca" if form != "text" else None, max_length=4096)
    (part,) = parts = data.read_rows(what, "CAUSAL_LM", "train")
    assert part.reader.form.name == form
    part = data.Part(sources.open_source(Source(what.train, split="train[:40]")), part.reader)
    examples = data.encode([part], what, tokenizer.load(model), None)
    assert (len(examples), examples.truncated, examples.dropped, examples.unended) == (40, 0, 0, 0)
    assert sum(1 for _ in parts[0].opened.rows()) == count
