# SPDX-License-Identifier: Apache-2.0
"""Inputs and their targets packed at once: placed where both have room, and each pair learnt as if it were alone."""

import json
import os
import signal

import jax
import numpy as np
import optax
import pytest
import yaml
from contracts.models import T5

import jpeft
from jpeft.train import batches as made
from jpeft.train import cli, config, interruption, job, loop, packing, watch
from jpeft.train.examples import IGNORED, Examples
from jpeft.train.losses import seq2seq_sums
from jpeft.train.step import begin, make_step

#: Sums over other shapes in float32; the rule of the house for packed and unpacked losses.
TOLERANCE = 1e-5
CONFIG = T5 | {"vocab_size": 53, "pad_token_id": 0, "eos_token_id": 1, "initializer_factor": 0.7}
METHODS = {
    "all seams": (
        jpeft.PromptTuning(num_tokens=3, blocks=("encoder", "decoder"))
        | jpeft.PrefixTuning(num_tokens=2)
        | jpeft.LoRA(rank=3, alpha=5, targets="all-linear")
        | jpeft.LoReFT(rank=2, first=2, last=1)
    ),
    "lora": jpeft.LoRA(rank=3, alpha=5, targets="all-linear"),
    "prompt": jpeft.PromptTuning(num_tokens=3),
    "prefix": jpeft.PrefixTuning(num_tokens=3),
    "loreft": jpeft.LoReFT(rank=2, first=2, last=1),
}
LENGTHS, TARGETS = [7, 30, 9, 3, 22, 18, 40, 5], [4, 6, 12, 16, 2, 5, 1, 9]


def examples(lengths=LENGTHS, targets=TARGETS, seed=0):
    """Random pairs; of the first target the first token is not learnt."""
    rng = np.random.default_rng(seed)
    tokens, labels = ([rng.integers(3, 53, n).astype(np.int32) for n in sizes] for sizes in (lengths, targets))
    labels[0][0] = IGNORED
    return Examples(tokens, labels, len(tokens), 0, 0, 0, {}, labels_of="target")


def walk(rows, kind, **changes):
    shape = {"batch_size": 2, "accumulation": 1, "max_length": 40, "max_target": 20, "num_widths": 1, "pad_id": 0}
    return made.make_batches(rows, packing=kind, **{**shape, **changes})


# ------------------------------------------------------------------------------------------------------------- rules


def naive(sizes, room, kind):
    """The rule by its words: which rows have room on both sides, and of them the first, or the fullest."""
    rows: list[list[int]] = []
    order = sorted(range(len(sizes)), key=lambda i: -max(sizes[i] / room)) if kind == "best_fit" else range(len(sizes))
    for example in order:
        rooms = [(room - sizes[row].sum(0), at) for at, row in enumerate(rows)]
        fits = [(sum(left / room), at) for left, at in rooms if (left >= sizes[example]).all()]
        if not fits:
            rows.append([example])
        else:
            rows[min(fits)[1] if kind == "best_fit" else fits[0][1]].append(example)
    return rows


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["first_fit", "best_fit"])
def test_pairs_lie_where_the_rule_puts_them(kind, seed):
    rng = np.random.default_rng(seed)
    lengths, targets = rng.integers(1, 33, 200), rng.integers(1, 17, 200)
    packs = packing.pack(lengths, 32, 4, kind, targets, 16)
    expected = naive(np.stack([lengths, targets], 1), np.array([32, 16]), kind)
    assert [row.tolist() for row in packs.members] == [sorted(row) for row in expected]
    assert packs.fill == lengths.sum() / (32 * len(packs.members))
    assert packs.target_width == 16
    assert packs.target_fill == targets.sum() / (16 * len(packs.members))
    assert all(lengths[row].sum() <= 32 for row in packs.members)
    assert all(targets[row].sum() <= 16 for row in packs.members)


def test_targets_are_as_wide_as_the_fullest_row_of_them():
    packs = packing.pack(np.array([10, 10, 10, 10]), 20, 4, "first_fit", np.array([3, 6, 2, 1]), 100)
    assert [row.tolist() for row in packs.members] == [[0, 1], [2, 3]]
    assert packs.target_width == 16
    assert packs.target_fill == 12 / 32
    assert packs.fill == 1


def test_of_many_rows_with_room_the_fullest_are_done_with(monkeypatch):
    """Every pair lies in one row all the same, within its room."""
    rng = np.random.default_rng(0)
    lengths, targets = rng.integers(1, 33, 2000), rng.integers(1, 17, 2000)
    for kind in ("first_fit", "best_fit"):
        monkeypatch.setattr(packing, "OPEN_ROWS", 2000)
        every = packing.pack(lengths, 32, 4, kind, targets, 16)
        monkeypatch.setattr(packing, "OPEN_ROWS", 64)
        some = packing.pack(lengths, 32, 4, kind, targets, 16)
        assert sorted(np.concatenate(some.members)) == [*range(2000)]
        assert all(lengths[row].sum() <= 32 and targets[row].sum() <= 16 for row in some.members)
        assert len(every.members) < len(some.members) < 1.3 * len(every.members)


def test_a_target_that_is_too_long():
    with pytest.raises(ValueError, match="a target of 21 tokens is longer than a row of 20; cut it first"):
        packing.pack(np.array([3, 4]), 40, 2, "best_fit", np.array([21, 2]), 20)


def test_a_packed_batch_holds_its_pairs_and_tells_them_apart():
    rows = examples([7, 0, 9, 3, 22, 18, 40, 5])  # one has no input
    walked, seen = walk(rows, "best_fit", accumulation=2), []
    for batch in walked.buckets.epoch(0, 0):
        arrays = {name: x.reshape(4, -1) for name, x in walked.collate(batch).items()}
        assert {*arrays} == {
            "input_ids", "attention_mask", "segment_ids", "labels", "decoder_segment_ids", "row_segments",
        }  # fmt: skip
        assert arrays["labels"].shape == arrays["decoder_segment_ids"].shape == (4, walked.buckets.target_width)
        assert arrays["row_segments"].shape == (4, walked.buckets.most)
        for at, members in enumerate(batch.rows):
            text = arrays["attention_mask"][at] == 1
            assert [i for i in arrays["row_segments"][at] if i] == [*range(1, len(members) + 1)]
            end = 0
            for segment, member in enumerate(members, 1):
                mine = (arrays["segment_ids"][at] == segment) & text
                assert arrays["input_ids"][at][mine].tolist() == (rows.tokens[member].tolist() or [0])
                label = rows.labels[member]
                assert arrays["labels"][at][end : end + len(label)].tolist() == label.tolist()
                assert (arrays["decoder_segment_ids"][at][end : end + len(label)] == segment).all()
                end += len(label)
                seen.append(member)
            assert (arrays["labels"][at][end:] == IGNORED).all()
            assert (arrays["decoder_segment_ids"][at][end:] == len(members)).all()
        assert (arrays["attention_mask"][len(batch.rows) :].sum(axis=1) == 1).all()
        real, padded = walked.sizes(batch)
        assert padded == 4 * (40 + walked.buckets.target_width)
        assert real == sum(len(rows.tokens[i]) + len(rows.labels[i]) for row in batch.rows for i in row)
    assert sorted(seen) == [*range(8)]


def test_a_process_makes_its_own_rows_alone():
    rng = np.random.default_rng(0)
    walked = walk(examples(rng.integers(3, 40, 30), rng.integers(1, 20, 30)), "best_fit", batch_size=4, accumulation=2)
    whole, (one, two) = next(walked.walk(0)), (next(walked.walk(0, None, own)) for own in ({0, 3}, {1, 2}))
    for name, array in whole.arrays.items():
        assert (one.arrays[name][:, [0, 3]] == array[:, [0, 3]]).all()
        assert (two.arrays[name][:, [1, 2]] == array[:, [1, 2]]).all()
    assert (one.arrays["labels"][:, [1, 2]] == IGNORED).all()


def test_a_walk_goes_on_from_any_position():
    rng = np.random.default_rng(3)
    walked = walk(examples(rng.integers(3, 40, 40), rng.integers(1, 20, 40)), "best_fit")
    once = walked.walk(seed=5)
    fed = [next(once) for _ in range(2 * walked.buckets.num_batches)]
    for at in (1, walked.buckets.num_batches - 1, walked.buckets.num_batches):
        same = next(walked.walk(5, json.loads(json.dumps(fed[at].start))))
        assert (same.start, same.after, same.real, same.padded) == (
            fed[at].start, fed[at].after, fed[at].real, fed[at].padded,
        )  # fmt: skip
        assert all((same.arrays[name] == x).all() for name, x in fed[at].arrays.items())


# ------------------------------------------------------------------------------------------------------------ losses


def random_adapter(method):
    """A model with an adapter that changes what it says."""
    base = jpeft.models.build(CONFIG, "SEQ_2_SEQ_LM", key=jax.random.key(0))
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(base, METHODS[method], key=jax.random.key(1)))
    rng = np.random.default_rng(2)
    moved = {path: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in trainable.items()}
    return graphdef, moved, frozen


def of_each(loss, walked, count):
    """`loss(arrays)` of every pair by itself, the labels of all others ignored."""
    found = {}
    for batch in walked.buckets.in_order():
        arrays = {name: x[0] for name, x in walked.collate(batch).items()}
        segments = arrays.get("decoder_segment_ids", np.ones_like(arrays["labels"]))
        for row, members in enumerate(batch.rows):
            for segment, member in enumerate(np.atleast_1d(members), 1):
                mine = (np.arange(len(segments))[:, None] == row) & (segments == segment)
                found[int(member)] = loss({**arrays, "labels": np.where(mine, arrays["labels"], IGNORED)}, arrays)
    return [found[i] for i in range(count)]


FAST = ("prompt",)
each = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in METHODS]
)


@each
def test_every_packed_pair_has_its_own_loss(method):
    graphdef, trainable, frozen = random_adapter(method)
    model = jpeft.combine(graphdef, trainable, frozen)

    @jax.jit
    def loss(arrays, whole):
        """Of one pair, beside what the decoder reads of the others."""
        inputs = model.decoder_inputs(whole["labels"], whole.get("decoder_segment_ids"))
        return seq2seq_sums(model, {**arrays, "decoder_input_ids": inputs})[0]

    rows = examples()
    alone, packed = (of_each(loss, walk(rows, kind), 8) for kind in ("none", "best_fit"))
    assert len(walk(rows, "best_fit").buckets.members) < 8
    np.testing.assert_allclose(packed, alone, rtol=TOLERANCE, atol=TOLERANCE)
    assert len({round(float(x), 3) for x in alone}) == 8


@each
def test_an_update_of_packed_pairs_is_that_of_the_pairs(method):
    """The program's own step, on all pairs in one batch: loss, gradients' norm, and the adapter that it makes."""
    graphdef, trainable, frozen = random_adapter(method)
    tx = jpeft.optimizer(optax.sgd(1.0))
    step, found = make_step(graphdef, seq2seq_sums, tx), {}
    for kind in ("none", "best_fit"):
        walked = walk(examples(), kind, batch_size=8)
        (batch,) = walked.buckets.in_order()
        found[kind] = step(begin(tx, trainable), frozen, walked.collate(batch), None)
    (one, measured), (other, expected) = found["best_fit"], found["none"]
    assert float(measured.labels) == float(expected.labels) == sum(TARGETS) - 1
    np.testing.assert_allclose(measured.loss, expected.loss, rtol=TOLERANCE)
    np.testing.assert_allclose(measured.grad_norm, expected.grad_norm, rtol=TOLERANCE)
    assert float(expected.grad_norm) > 1e-3
    for path, leaf in other.trainable.items():
        error = np.linalg.norm(np.asarray(one.trainable[path]) - np.asarray(leaf))
        assert error < TOLERANCE * float(expected.grad_norm), path


def test_the_decoders_prompt_is_its_start_token():
    """What acts on a prompt's ends acts in training where it does in generation, however long the targets are."""
    graphdef, trainable, frozen = random_adapter("loreft")
    model = jpeft.combine(graphdef, trainable, frozen)
    arrays = {name: x[0] for name, x in walk(examples(), "none", batch_size=8).collate(_all(8)).items()}
    inputs, labels = model.decoder_inputs(arrays["labels"]), arrays["labels"]
    prompt = np.zeros(inputs.shape, bool)
    prompt[:, 0] = prompt[0, 1] = True  # of the first, whose first token is not learnt, what stands before the second
    with jpeft.prompt_tokens(None, decoder=prompt):
        logits = model(arrays["input_ids"], arrays["attention_mask"], decoder_input_ids=inputs)
    picked = np.take_along_axis(jax.nn.log_softmax(logits), np.maximum(labels, 0)[..., None], 2)[..., 0]
    expected = -picked[labels != IGNORED].sum()
    np.testing.assert_allclose(seq2seq_sums(model, arrays)[0], expected, rtol=TOLERANCE)


def _all(count):
    return made.Batch(40, np.arange(count))


# ----------------------------------------------------------------------------------------------------------- program


@pytest.fixture(name="summaries")
def _summaries(bert, reviews, tmp_path):
    """A configuration that trains a tiny T5 on packed pairs."""
    folder = tmp_path / "t5"
    tiny = T5 | {"vocab_size": 19, "d_model": 32, "d_kv": 8, "pad_token_id": 0, "eos_token_id": 3}
    jpeft.models.save(jpeft.models.build(tiny, "SEQ_2_SEQ_LM", key=jax.random.key(3)), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (bert / name).read_text()
        (folder / name).write_text(text.replace('"pad_token"', '"eos_token": "[SEP]", "pad_token"'))
    for name in ("train", "eval"):
        texts = [json.loads(line)["text"] for line in (reviews / f"{name}.jsonl").read_text().splitlines()]
        rows = [{"source": text, "target": " ".join(text.split()[:4])} for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(folder), "task": "SEQ_2_SEQ_LM"},
        "data": {
            "train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "max_length": 48,
            "max_target": 24, "packing": "best_fit",
        },
        "method": [{"kind": "lora", "rank": 4, "targets": ["q", "v"]}, {"kind": "prompt_tuning", "num_tokens": 3}],
        "optimizer": {"lr": 3e-2},
        "train": {"max_steps": 7, "batch_size": 4, "log_every": 1, "eval_every": 7},
        "out": str(tmp_path / "run"),
    }  # fmt: skip


def test_the_program_trains_on_pairs_and_goes_on_where_it_stopped(summaries, tmp_path, monkeypatch):
    """With a prompt for every pair of a row; stopped after an update, and gone on with, it is the same run."""
    whole, parts = (config.parse(summaries | {"out": str(tmp_path / name)}) for name in ("whole", "parts"))
    result = loop.train(whole)
    assert result.losses[-1] < result.losses[0]
    assert result.evaluation is not None

    update, calls = watch.Watch.update, iter(range(1, 100))

    def stopped(self, *args):
        update(self, *args)
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(watch.Watch, "update", stopped)
    with pytest.raises(interruption.Interrupted, match="after update 4"):
        loop.train(parts)
    monkeypatch.undo()
    again = loop.train(parts, resume=True)
    assert again.losses == result.losses[4:]
    one, other = (sorted((tmp_path / name / "adapter").rglob("*.safetensors")) for name in ("whole", "parts"))
    assert one
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]


def test_what_is_packed_is_shown_and_planned(summaries, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(summaries))
    cli.main(["data", "inspect", str(tmp_path / "run.yaml"), "--rows", "1"])
    said, packs = capsys.readouterr().out, job.read_data(config.load(tmp_path / "run.yaml")).train.buckets
    assert isinstance(packs, packing.Packs)
    assert packs.targets is not None
    assert packs.target_fill is not None
    shares = (
        f"{100 * packs.fill:.1f} % full, with targets in {packs.target_width} tokens, {100 * packs.target_fill:.1f}"
    )
    assert f"packed: {len(packs.members)} rows of 48 tokens, {shares} % full, up to {packs.most} examples" in said
    assert f"48 tokens and {packs.target_width} of targets, packed with up to {packs.most} examples" in said
    cli.main(["train", str(tmp_path / "run.yaml"), "--dry-run"])
    assert "compiled in" in capsys.readouterr().out
