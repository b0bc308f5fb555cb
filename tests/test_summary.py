# SPDX-License-Identifier: Apache-2.0
"""Counts: by formula, and by counting what changes."""

import jax
import numpy as np
import pytest
import subjects
from flax import nnx

import jpeft

KEY = jax.random.key(0)
D = 4  # `up` is 4 x 8 with 8 biases, `down` 8 x 4 with 4
BLOCK = 2 * 32 + 12


def summary_of(base, **options):
    method = jpeft.LoRA(**{"rank": 2, "targets": ["up"], **options})
    return jpeft.summary(jpeft.adapt(base, method, key=KEY))


def listed(num_layers=3):
    return subjects.ListOfLayers(D, num_layers, nnx.Rngs(0))


def stacked(num_layers=3):
    return subjects.Stacked(D, num_layers, nnx.Rngs(0))


COUNTS = [
    ({}, 3, 3 * 2 * 12, 3 * 32),
    ({"targets": "all-linear"}, 6, 6 * 2 * 12, 6 * 32),
    ({"rank": 5, "layers": [1]}, 1, 5 * 12, 32),
    ({"rank_pattern": {"blocks.1.up": 7}}, 3, (2 + 7 + 2) * 12, 3 * 32),
    ({"rank_pattern": {"blocks.1.up": 7}, "layers": [1, 2]}, 2, (7 + 2) * 12, 2 * 32),
    ({"bias": "lora_only"}, 3, 3 * (2 * 12 + 8), 3 * (32 + 8)),
    ({"bias": "lora_only", "layers": [0]}, 1, 2 * 12 + 8, 32 + 8),
    ({"bias": "all"}, 6, 3 * (2 * 12 + 8 + 4), 3 * (32 + 8 + 4)),
    ({"modules_to_save": ["down"]}, 6, 3 * (2 * 12 + 36), 3 * (32 + 36)),
    ({"init": "pissa"}, 3, 3 * 2 * 12, 3 * 32),
]


@pytest.mark.parametrize("make", [listed, stacked])
@pytest.mark.parametrize("options, places, trainable, changed", COUNTS, ids=str)
def test_counts(make, options, places, trainable, changed):
    summary = summary_of(make(), **options)
    (row,) = summary.rows
    assert (row.name, row.seams, row.trainable, row.changed) == ("lora", places, trainable, changed)
    assert (summary.trainable, summary.changed, summary.base) == (trainable, changed, 3 * BLOCK)
    assert summary.percent == pytest.approx(100 * trainable / (3 * BLOCK))
    assert summary.base_bytes == 4 * 3 * BLOCK


@pytest.mark.parametrize("options", [options for options, *_ in COUNTS], ids=str)
def test_changed_is_what_a_merge_changes(options):
    base = stacked()
    model = subjects.fill(jpeft.adapt(base, jpeft.LoRA(**{"rank": 2, "targets": ["up"], **options}), key=KEY))
    before, after = subjects.leaves(base), subjects.leaves(jpeft.merge(model))
    assert jpeft.summary(model).changed == sum(int((after[path] != value).sum()) for path, value in before.items())


@pytest.mark.parametrize("options", [options for options, *_ in COUNTS], ids=str)
def test_trainable_is_what_gets_gradients(options):
    """Padding has a leaf's memory and no gradient."""
    model = subjects.fill(jpeft.adapt(stacked(), jpeft.LoRA(**{"rank": 2, "targets": ["up"], **options}), key=KEY))
    graphdef, trainable, frozen = jpeft.partition(model)
    x = np.random.default_rng(0).standard_normal((9, D)).astype(np.float32)
    gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(x) ** 3).sum())(trainable)
    summary = jpeft.summary(model)
    assert summary.trainable == sum(int((gradient != 0).sum()) for gradient in gradients.values())
    assert summary.bytes == sum(value.nbytes for value in trainable.values())


def test_several_adapters():
    model = jpeft.adapt(listed(), jpeft.LoRA(rank=2, targets=["up"]), key=KEY)
    model = jpeft.adapt(model, jpeft.LoRA(rank=3, targets=["down"]), key=KEY, name="second")
    summary = jpeft.summary(model)
    assert {row.name: (row.trainable, row.changed) for row in summary.rows} == {
        "lora": (3 * 2 * 12, 3 * 32),
        "second": (3 * 3 * 12, 3 * 32),
    }
    assert (summary.trainable, summary.changed) == (3 * 5 * 12, 6 * 32)


def test_every_kind_of_projection():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.general = nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=rngs)
            self.einsum = nnx.Einsum("bi,hid->bhd", (2, 3, 4), rngs=rngs)
            self.conv = nnx.Conv(3, 4, (2, 5), rngs=rngs)
            self.embed = nnx.Embed(7, 3, rngs=rngs)

    sizes = {"general": (6, 20), "einsum": (3, 8), "conv": (30, 4), "embed": (7, 3)}
    for name, (d_in, d_out) in sizes.items():
        summary = summary_of(Model(nnx.Rngs(0)), targets=[name])
        assert (summary.trainable, summary.changed) == (2 * (d_in + d_out), d_in * d_out), name


def test_a_shared_module_counts_once():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 8, rngs=rngs)
            self.second = self.first

    summary = summary_of(Model(nnx.Rngs(0)), targets=["first", "second"])
    assert (summary.trainable, summary.changed, summary.base) == (2 * 12, 32, 40)


def test_streams_and_statistics_are_no_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 4, param_dtype="bfloat16", rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    summary = summary_of(Model(nnx.Rngs(0)))
    assert (summary.base, summary.base_bytes) == (20 + 8, 2 * 20 + 4 * 8)
    assert summary.bytes == 4 * 2 * 8


def test_a_model_without_adapters():
    summary = jpeft.summary(listed())
    assert (summary.rows, summary.trainable, summary.changed, summary.percent) == ((), 0, 0, 0.0)
    assert summary.base == 3 * BLOCK
    assert jpeft.summary(nnx.Dict()).percent == 0.0


def test_it_prints_a_table():
    lines = str(summary_of(listed(), rank=2)).splitlines()
    assert lines[0].split() == ["adapter", "places", "trainable", "%", "of", "base", "changed", "bytes"]
    assert lines[1].split() == ["lora", "3", "72", "31.5789", "96", "288"]
    assert lines[2].split()[0] == "all"
    assert lines[3] == "base: 228 parameters, 912 bytes"
    assert lines[4].startswith("lora: LoRA(rank=2, ")
