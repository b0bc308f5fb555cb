# SPDX-License-Identifier: Apache-2.0
"""Several examples in one row: placed as the rules say, and each learnt as if it were alone."""

import jax
import numpy as np
import pytest

import jpeft
from jpeft.train import batches as made
from jpeft.train import packing
from jpeft.train.examples import IGNORED, Examples
from jpeft.train.losses import lm_sums
from jpeft.train.records import DataError

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 53, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 53, "n_embd": 24, "n_layer": 2,
    "n_head": 3, "n_positions": 64, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
METHODS = {
    "lora": jpeft.LoRA(rank=3, alpha=5, targets="all-linear"),
    "prefix": jpeft.PrefixTuning(num_tokens=3),
}
#: Sums over other shapes in float32; the rule of the house for packed and unpacked losses.
TOLERANCE = 1e-5


def examples(lengths, seed=0):
    """Random tokens, of which the first third of every row is a prompt."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(3, 53, n).astype(np.int32) for n in lengths]
    labels = [np.where(np.arange(len(ids)) < len(ids) // 3, IGNORED, ids).astype(np.int32) for ids in tokens]
    return Examples(tokens, labels, len(tokens), 0, 0, 0, {}, labels_of="token")


def walk(rows, kind, **changes):
    shape = {"batch_size": 2, "accumulation": 1, "max_length": 40, "num_widths": 2, "pad_id": 0, "packing": kind}
    return made.make_batches(rows, **{**shape, **changes})


# ------------------------------------------------------------------------------------------------------------- rules


def naive(lengths, width, kind):
    """The rule by its words: which rows have room, and of them the first, or the fullest."""
    rows: list[list[int]] = []
    order = np.argsort(-np.array(lengths), kind="stable") if kind == "best_fit" else range(len(lengths))
    for example in order:
        rooms = [(width - sum(lengths[i] for i in row), at) for at, row in enumerate(rows)]
        fits = [(room, at) for room, at in rooms if room >= lengths[example]]
        if not fits:
            rows.append([example])
        else:
            rows[min(fits)[1] if kind == "best_fit" else fits[0][1]].append(example)
    return rows


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["first_fit", "best_fit"])
def test_examples_lie_where_the_rule_puts_them(kind, seed):
    lengths = np.random.default_rng(seed).integers(1, 41, 60)
    packs = packing.pack(lengths, 40, 4, kind)
    rooms = sorted(sum(lengths[i] for i in row) for row in naive(lengths, 40, kind))
    assert sorted(int(lengths[row].sum()) for row in packs.members) == rooms
    if kind == "first_fit":
        assert [row.tolist() for row in packs.members] == [sorted(row) for row in naive(lengths, 40, kind)]
    assert sorted(np.concatenate(packs.members)) == [*range(60)]
    assert packs.fill == lengths.sum() / (40 * len(packs.members))
    assert packs.most == max(map(len, packs.members))


def test_best_fit_fills_rows_better_than_padding():
    rows = examples(np.random.default_rng(1).integers(4, 40, 300))
    shares = {}
    for kind in ("none", "first_fit", "best_fit"):
        walked = walk(rows, kind, num_widths=8)
        real, padded = np.sum([walked.sizes(batch) for batch in walked.buckets.epoch(0, 0)], axis=0)
        shares[kind] = real / padded
    assert shares["best_fit"] > 0.95
    assert shares["best_fit"] >= shares["first_fit"] > 0.9


def test_an_example_that_is_too_long():
    with pytest.raises(ValueError, match="an example of 41 tokens is longer than a row of 40"):
        packing.pack(np.array([3, 41]), 40, 2, "best_fit")


def test_a_packed_batch_holds_its_examples_and_tells_them_apart():
    rows = examples([7, 30, 9, 3, 22, 18, 40, 5])
    walked = walk(rows, "best_fit", accumulation=2)
    seen = []
    for batch in walked.buckets.epoch(0, 0):
        arrays = {name: x.reshape(4, -1) for name, x in walked.collate(batch).items()}
        assert {x.shape for x in arrays.values()} == {(4, 40)}
        for at, members in enumerate(batch.rows):
            for segment, member in enumerate(members, 1):
                mine = (arrays["segment_ids"][at] == segment) & (arrays["attention_mask"][at] == 1)
                assert arrays["input_ids"][at][mine].tolist() == rows.tokens[member].tolist()
                assert arrays["labels"][at][mine].tolist() == rows.labels[member].tolist()
                assert arrays["positions"][at][mine].tolist() == [*range(mine.sum())]
                seen.append(member)
            assert (arrays["labels"][at][arrays["attention_mask"][at] == 0] == IGNORED).all()
        assert (arrays["attention_mask"][len(batch.rows) :].sum(axis=1) == 1).all()
    assert sorted(seen) == [*range(8)]


@pytest.mark.parametrize("kind", ["none", "best_fit"])
def test_a_process_makes_its_own_rows_alone(kind):
    walked = walk(examples(np.random.default_rng(0).integers(3, 40, 30)), kind, batch_size=4, accumulation=2)
    whole, (one, two) = next(walked.walk(0)), (next(walked.walk(0, None, own)) for own in ({0, 3}, {1, 2}))
    assert walked.rows == 4
    for name, array in whole.arrays.items():
        assert (one.arrays[name][:, [0, 3]] == array[:, [0, 3]]).all()
        assert (two.arrays[name][:, [1, 2]] == array[:, [1, 2]]).all()
    assert (one.arrays["labels"][:, [1, 2]] == IGNORED).all()


def test_what_is_evaluated_beside_packed_rows_is_padded():
    train, held = walk(examples([9, 30, 7]), "best_fit"), examples([5, 6, 50, 7])
    made_like = train.like(held)
    assert made_like.buckets.widths == (8, 50)
    assert "segment_ids" not in made_like.collate(made_like.buckets.in_order()[0])


# ------------------------------------------------------------------------------------------------------------ losses


def random_adapter(config, method):
    """A model with an adapter that changes what it says."""
    model = jpeft.adapt(jpeft.models.build(config, key=jax.random.key(0)), METHODS[method], key=jax.random.key(1))
    graphdef, trainable, frozen = jpeft.partition(model)
    key = jax.random.key(2)
    moved = {
        path: leaf + 0.3 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        for i, (path, leaf) in enumerate(trainable.items())
    }
    return graphdef, moved, frozen


def of_each(loss, walked, count):
    """`loss(arrays)` of every example by itself, the labels of all others ignored."""
    found = {}
    for batch in walked.buckets.in_order():
        arrays = {name: x[0] for name, x in walked.collate(batch).items()}
        segments = arrays.get("segment_ids", np.ones_like(arrays["labels"]))
        for row, members in enumerate(batch.rows):
            for segment, member in enumerate(np.atleast_1d(members), 1):
                mine = (np.arange(len(segments))[:, None] == row) & (segments == segment)
                found[int(member)] = loss({**arrays, "labels": np.where(mine, arrays["labels"], IGNORED)})
    return [found[i] for i in range(count)]


CASES = [
    pytest.param(LLAMA, "lora", id="llama-lora"),
    pytest.param(GPT2, "prefix", id="gpt2-prefix"),
    pytest.param(LLAMA, "prefix", id="llama-prefix", marks=pytest.mark.slow),
    pytest.param(GPT2, "lora", id="gpt2-lora", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("config, method", CASES)
def test_every_packed_example_has_its_own_loss(config, method):
    graphdef, trainable, frozen = random_adapter(config, method)
    loss = jax.jit(lambda arrays: lm_sums(jpeft.combine(graphdef, trainable, frozen), arrays)[0])
    rows = examples([7, 30, 9, 3, 22, 18, 40, 5])
    alone = of_each(loss, walk(rows, "none", num_widths=1), 8)
    packed = of_each(loss, walk(rows, "best_fit"), 8)
    np.testing.assert_allclose(packed, alone, rtol=TOLERANCE, atol=TOLERANCE)
    assert len({round(float(x), 3) for x in alone}) == 8


@pytest.mark.slow
@pytest.mark.parametrize("config, method", [case.values for case in CASES])
def test_packed_rows_have_the_gradients_of_their_examples(config, method):
    graphdef, trainable, frozen = random_adapter(config, method)
    slope = jax.jit(jax.grad(lambda t, arrays: lm_sums(jpeft.combine(graphdef, t, frozen), arrays)[0]))
    rows, sums = examples([7, 30, 9, 3, 22, 18, 40, 5]), {}
    for kind in ("none", "best_fit"):
        walked = walk(rows, kind, num_widths=1)
        of_batches = [
            slope(trainable, {name: x[0] for name, x in walked.collate(batch).items()})
            for batch in walked.buckets.in_order()
        ]
        sums[kind] = jax.tree.map(lambda *parts: sum(parts), *of_batches)
    for path, one in sums["none"].items():
        atol = TOLERANCE * max(float(abs(one).max()), 1)
        np.testing.assert_allclose(sums["best_fit"][path], one, rtol=0, atol=atol, err_msg=path)


# ---------------------------------------------------------------------------------------------------------- position


@pytest.mark.parametrize("kind", ["none", "best_fit"])
def test_a_walk_goes_on_from_any_position(kind):
    walked = walk(examples(np.random.default_rng(3).integers(3, 40, 40)), kind)
    once = walked.walk(seed=5)
    fed = [next(once) for _ in range(3 * walked.buckets.num_batches)]
    assert fed[0].start == {"seed": 5, "epoch": 0, "index": 0}
    for number, one in enumerate(fed[:-1]):
        assert one.after == fed[number + 1].start == walked.position(5, number + 1)
    for at in (1, walked.buckets.num_batches - 1, walked.buckets.num_batches, 2 * walked.buckets.num_batches + 1):
        again = walked.walk(5, fed[at].start)
        for one in fed[at : at + 2]:
            same = next(again)
            assert (same.start, same.real, same.padded) == (one.start, one.real, one.padded)
            assert all((same.arrays[name] == x).all() for name, x in one.arrays.items())
    size = walked.buckets.num_batches
    orders = [[one.arrays["input_ids"].tobytes() for one in fed[e : e + size]] for e in (0, size)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    "position", [{"seed": 1, "epoch": 0, "index": 0}, {"seed": 5, "epoch": 0, "index": 99}, {"epoch": 0}]
)
def test_a_position_of_other_data_is_refused(position):
    walked = walk(examples([5, 6, 7]), "none")
    with pytest.raises(DataError, match="is no position in this data, whose seed is 5"):
        next(walked.walk(5, position))
