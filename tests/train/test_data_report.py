# SPDX-License-Identifier: Apache-2.0
"""`jpeft data inspect`: every token stands where it belongs, and what is learnt can be told from what is not."""

import json
import re

import chat_tokenizer as tiny
import numpy as np
import pytest

from jpeft.train import cli, config, data_report, job, tokenizer

ROWS = [
    {"instruction": "Say <b>.", "output": "Wörter 🙂\nund mehr"},
    {"instruction": "Count.", "input": "to three", "output": "one two three"},
] * 3


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Arguments of `jpeft data inspect` for a few instructions."""
    folder = tiny.write(tmp_path_factory.mktemp("model"), tiny.INSTRUCT)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tree = {
        "model": {"path": str(folder), "task": "CAUSAL_LM"},
        "data": {"train": str(folder / "rows.jsonl"), "packing": "best_fit"},
        "train": {"epochs": 1, "batch_size": 2},
        "out": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(json.dumps(tree))
    return folder / "run.yaml"


def test_what_is_learnt_stands_in_brackets(chat, capsys):
    cli.main(["data", "inspect", str(chat), "--rows", "2"])
    said = capsys.readouterr().out
    assert "<s>[INST] Say <b>. [/INST]⟦ Wörter 🙂\nund mehr</s>⟧\n" in said
    assert "--- row 2, 47 tokens, 15 learnt\n<s>[INST] Count.\n\nto three [/INST]⟦ one two three</s>⟧\n" in said
    assert "row 3" not in said
    for told in ("6 rows -> 6 examples", "packed: 3 rows of 128 tokens", "1 compilation", "median", "truncated 0 rows"):
        assert told in said


def test_colours_and_a_page_say_the_same(chat, tmp_path, capsys):
    dataset = job.read_data(config.load(chat))
    (row,) = data_report.rows(dataset, 1)
    coloured = data_report.as_ansi(row)
    green = "".join(re.findall(r"\033\[1;32(?:;4)?m(.*?)\033\[0m", coloured))
    assert green == " Wörter 🙂und mehr</s>"
    assert re.sub(r"\033\[[\d;]*m|↵", "", coloured) == "".join(piece.text for piece in row.pieces)
    cli.main(["data", "inspect", str(chat), "--rows", "1", "--html", str(tmp_path / "page.html")])
    assert "page.html" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    learnt = "".join(re.findall(r"<span class=learnt>(.*?)</span>", page))
    assert learnt == " Wörter 🙂<i>↵</i><br>und mehr&lt;/s&gt;"
    assert "Say &lt;b&gt;." in re.sub(r"</?span[^>]*>", "", page)


def test_a_character_of_several_tokens_is_whole(tmp_path):
    words = tokenizer.load(tiny.write(tmp_path))
    ids = words.encode(["a🙂b"])[0]
    got = data_report.pieces(words, ids, np.zeros(len(ids), bool))
    assert [piece.text for piece in got] == ["a", "", "", "", "🙂", "b"]


def test_rows_with_a_label_show_it(bert, reviews, tmp_path, capsys):
    tree = {
        "model": {"path": str(bert), "task": "SEQ_CLS"},
        "data": {"train": str(reviews / "train.jsonl"), "num_widths": 2},
        "train": {"epochs": 1},
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    cli.main(["data", "inspect", str(tmp_path / "run.yaml"), "--rows", "1"])
    said = capsys.readouterr().out
    assert re.search(r"--- row 1, \d+ tokens\n\[CLS\] .*\[SEP\]\nlabel: (good|bad)\n", said)
    assert "padded to one of 2 widths" in said


def test_a_histogram_counts_every_row_once():
    lengths = np.random.default_rng(0).integers(3, 90, 500)
    found = data_report.histogram(lengths)
    assert sum(count for *_, count in found) == 500
    assert len({high - low for low, high, _ in found}) == 1
    assert len(data_report.histogram(np.array([7]))) == 1


def test_fewer_than_no_rows(chat, capsys):
    with pytest.raises(SystemExit):
        cli.main(["data", "inspect", str(chat), "--rows", "-1"])
    assert "--rows is 0 or more, got -1" in capsys.readouterr().err
