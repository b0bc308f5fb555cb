# SPDX-License-Identifier: Apache-2.0
"""Streams: a window of rows at a time, sources in turn, and a place from which the same batches come again."""

import itertools
import json

import chat_tokenizer as tiny
import pytest

from jpeft.train import config, data, encoding, loop, streaming, tokenizer
from jpeft.train.sections.data import Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def sources(tmp_path):
    for name, count in (("a", 23), ("b", 7)):
        rows = [{"text": f"{name}{i} " * (1 + i % 5)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(tmp_path / "a.jsonl"), weight=2), Source(str(tmp_path / "b.jsonl"))


def open_stream(folder, sources, **options):
    what = config.Data(train=sources, streaming=True, **{"window": 12, "max_length": 32, "num_widths": 2, **options})
    words, parts = tokenizer.load(folder), data.read_rows(what, "CAUSAL_LM", "train")
    encoder = encoding.Encoder(what, words, None)
    return streaming.stream(parts, what, encoder, batch_size=2, accumulation=2, pad_id=words.pad_id)


def taken(mixture, count):
    return [mixture.next()[1].values["text"].split()[0] for _ in range(count)]


def test_sources_take_turns_by_weight_and_begin_again(folder, sources):
    mixture = streaming.Mixture(open_stream(folder, sources).parts)
    got = taken(mixture, 60)
    assert [text for text in got if text[0] == "a"] == [f"a{i % 23}" for i in range(40)]
    assert [text for text in got if text[0] == "b"] == [f"b{i % 7}" for i in range(20)]
    for at in range(3, 60, 3):
        assert sum(text[0] == "a" for text in got[:at]) == 2 * at // 3
    again = streaming.Mixture(mixture.parts, mixture.taken, mixture.rows)
    assert taken(again, 20) == taken(mixture, 20)


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_stream_goes_on_from_any_position(folder, sources, packing):
    stream = open_stream(folder, sources, packing=packing)
    walk = stream.walk(3)
    fed = [next(walk) for _ in range(14)]
    assert fed[-1].start["window"] >= 3
    for one, following in itertools.pairwise(fed):
        assert one.after == following.start
        assert json.loads(json.dumps(one.after)) == one.after
    for at in range(len(fed)):
        again = next(open_stream(folder, sources, packing=packing).walk(3, json.loads(json.dumps(fed[at].start))))
        assert again.start == fed[at].start
        assert all((again.arrays[name] == x).all() for name, x in fed[at].arrays.items())
    shapes = {one.arrays["input_ids"].shape for one in fed}
    assert {shape[:2] for shape in shapes} == {(2, 2)}
    assert {shape[2] for shape in shapes} <= {*stream.first.buckets.widths}


def test_every_row_of_a_window_is_trained_once(folder, sources):
    stream = open_stream(folder, sources)
    words, seen = tokenizer.load(folder), []
    for fed in stream.walk(0):
        if fed.start["window"] == 1:
            break
        ids, mask = fed.arrays["input_ids"], fed.arrays["attention_mask"]
        rows = [row[m == 1].tolist() for row, m in zip(ids.reshape(4, -1), mask.reshape(4, -1), strict=True)]
        seen += [words.backend.decode(row).split()[0] for row in rows if len(row) > 1]
    assert sorted(seen) == sorted(taken(streaming.Mixture(stream.parts), 12))


def test_bad_rows_of_a_stream_are_counted_over_windows(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbroken\n' * 10)
    walk = open_stream(folder, str(tmp_path / "a.jsonl"), window=8, on_bad_row="skip", max_bad_rows=10).walk(0)
    counts = [next(walk).start["skipped"] for _ in range(2)]
    assert counts == [0, 4]
    with pytest.raises(data.DataError, match=r"more than data\.max_bad_rows=10 rows are bad"):
        next(walk)


def test_a_position_of_another_stream_is_refused(folder, sources):
    stream = open_stream(folder, sources)
    position = stream.position(0, 0)
    for wrong in ({**position, "seed": 1}, {**position, "taken": [0]}, {"seed": 0, "epoch": 0, "index": 0}):
        with pytest.raises(data.DataError, match="is no position in this stream of 2 sources, whose seed is 0"):
            next(stream.walk(0, wrong))
    with pytest.raises(data.DataError, match="after 3 updates is not known without its position"):
        stream.position(0, 3)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train": {"epochs": 1}}, "data.streaming has no end; give train.max_steps"),
        ({"model": {"path": "x", "task": "SEQ_CLS"}}, "data.streaming is for CAUSAL_LM"),
        (
            {"data": {"train": "a.jsonl", "streaming": True, "cache": "kept"}},
            "data.cache keeps what is tokenised",
        ),
        ({"data": {"train": "a.jsonl", "streaming": True, "eval": "b.jsonl"}}, "give train.eval_every"),
    ],
)
def test_what_a_stream_needs_is_said_before_it_is_read(changes, said):
    tree = {
        "model": {"path": "x", "task": "CAUSAL_LM"},
        "data": {"train": "a.jsonl", "streaming": True},
        "train": {"max_steps": 5},
        "out": "run",
    }
    with pytest.raises(config.ConfigError, match=said):
        config.parse({**tree, **changes})


def test_a_percentage_of_a_stream_is_not_known(folder, sources):
    with pytest.raises(data.DataError, match="does not know how many rows"):
        open_stream(folder, Source(sources[0].path, split="train[:50%]"))
    assert taken(streaming.Mixture(open_stream(folder, Source(sources[0].path, split="train[3:5]")).parts), 3) == [
        "a3", "a4", "a3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"packing": "best_fit"}, {"streaming": True, "window": 24}], ids=["packed", "streamed"]
)
def test_the_program_trains_on_it(generate, options):
    tree = {**generate, "data": {**generate["data"], "max_length": 32, **options}}
    tree["train"] = {"max_steps": 8, "eval_every": 8, "batch_size": 8, "log_every": 4}
    result = loop.train(config.parse(tree))
    assert len(result.losses) == 8
    assert result.losses[-1] < result.losses[0]
    assert result.evaluation is not None
    assert result.evaluation.metrics["loss"] < result.losses[0]
    lines = [json.loads(line) for line in (result.adapter.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] is None for line in lines] == ["streaming" in options] * len(lines)
