# SPDX-License-Identifier: Apache-2.0
"""What an output may depend on: its own row, earlier tokens, no padding; and a start on its key and place alone."""

import functools

import jax
import numpy as np
import pytest
import subjects
from contracts.models import VOCAB
from contracts.table import CASES, IDS, KEY

import jpeft

#: The same numbers summed over another shape of batch or row, in float32.
SHAPE = subjects.FLOAT32
#: Likewise, of rows that hold more.
PACKED = 1e-5

#: What packed rows are tested of in the fast lane.
QUICK = ("p-tuning on bert", "gated prefix tuning on bert", "noreft on bert", "prompt tuning on t5")
PACKING = [
    pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for case in CASES
    if case.row.packs
    for name in [f"{case.method} on {case.model}"]
]


def test_a_row_does_not_depend_on_another(case):
    model = case.filled
    other = IDS.copy()
    other[1] = (other[1] + 1) % VOCAB
    before, after = case.run(model, IDS), case.run(model, other)
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] != before[1]).any()
    assert subjects.error(case.run(model, IDS[:1]), before[:1]) < SHAPE


def test_a_causal_model_stays_causal(case):
    if not case.row.causal:
        return
    model = case.filled
    other = IDS.copy()
    other[:, 4] = (other[:, 4] + 1) % VOCAB
    before, after = case.run(model, IDS), case.run(model, other)
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert (after[:, 4] != before[:, 4]).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(case, side):
    if not case.row.masks:
        return
    model = case.filled
    tokens = slice(2, None) if side == "left" else slice(None, -2)
    shape = (IDS.shape[0], IDS.shape[1] + 2)
    ids, mask, positions = np.full(shape, 7), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ids[:, tokens], mask[:, tokens], positions[:, tokens] = IDS, 1, np.arange(IDS.shape[1])
    alone = case.run(model, IDS, np.ones_like(IDS), np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape))
    padded = case.run(model, ids, mask, positions)
    assert subjects.error(padded[:, tokens], alone) < SHAPE
    ids[mask == 0] = 3
    np.testing.assert_array_equal(case.run(model, ids, mask, positions)[:, tokens], padded[:, tokens])


@pytest.mark.parametrize("packing", PACKING)
def test_an_example_of_a_packed_row_is_as_by_itself(packing):
    """One example in a row, two or three, with padding between and at the end."""
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [5, 5, 0, 4, 6, 6, 6, 6], [3] * 7 + [0]])
    mask, ids = (segments > 0) * 1, np.random.default_rng(1).integers(1, VOCAB, segments.shape)
    packed = packing.run(packing.filled, ids, mask, segments=segments)
    owns = [(row, segments[row] == i) for row in range(3) for i in np.unique(segments[row]) if i]
    alone, seen = np.zeros((len(owns), 8), ids.dtype), np.zeros((len(owns), 8), ids.dtype)
    for at, (row, own) in enumerate(owns):
        alone[at, : own.sum()], seen[at, : own.sum()] = ids[row][own], 1
    expected = packing.run(packing.filled, alone, seen)
    for at, (row, own) in enumerate(owns):
        assert subjects.error(packed[row][own], expected[at, : own.sum()]) < PACKED


def test_a_start_does_not_depend_on_the_other_targets(case):
    """The same key gives the same start, whatever else is adapted."""
    if not case.line.targeted:
        return
    every, fewer = (jpeft.partition(case.fresh(targets=t))[1] for t in (case.row.targets, case.row.fewer))
    assert fewer.keys() < every.keys()
    for path, value in fewer.items():
        np.testing.assert_array_equal(every[path], value, err_msg=path)


def test_a_start_depends_on_the_key(case):
    one, same, other = (jpeft.partition(case.fresh(key=key))[1] for key in (KEY, jax.random.key(0), jax.random.key(1)))
    assert all((one[path] == same[path]).all() for path in one)
    assert case.line.drawn == any((one[path] != other[path]).any() for path in one)


def test_no_two_leaves_start_alike(case):
    start = {path: np.asarray(value) for path, value in jpeft.partition(case.fresh())[1].items()}
    constant = [path for path, value in start.items() if path.split("/")[-1] in case.line.constant or value.std() == 0]
    flat = [value.ravel() for path, value in start.items() if path not in constant]
    for i, one in enumerate(flat):
        for other in flat[i + 1 :]:
            size = min(one.size, other.size)
            assert not np.array_equal(one[:size], other[:size])


def test_every_method_of_the_table_is_told_apart():
    """Equal graphdefs would make one compiled function serve two methods."""
    graphdefs = []

    def make(case):
        graphdef, trainable, _ = jpeft.partition(case.fresh())
        graphdefs.append(graphdef)
        return trainable

    for case in CASES:
        jax.eval_shape(functools.partial(make, case))
    assert len(set(graphdefs)) == len(CASES)
