# SPDX-License-Identifier: Apache-2.0
"""FourierFT against NumPy and peft, its places, start, counts, bank and errors."""

import blocks_oracle
import jax
import numpy as np
import peft
import pytest
import subjects
import torch
from blocks_oracle import LAYERS, D, X, against_numpy, against_transformers, listed, stacked
from flax import nnx

import jpeft
from jpeft.models import bert

KEY = jax.random.key(0)
TARGETS = ["up", "down"]
NAMES = blocks_oracle.NAMES["fourierft"]


def cosines(c, places, shape):
    """Re IFFT2 written out: a sum of cosines, entry by entry."""
    rows, columns = np.unravel_index(places, shape)
    i, j = np.arange(shape[0])[:, None, None], np.arange(shape[1])[None, :, None]
    waves = np.cos(2 * np.pi * (rows * i / shape[0] + columns * j / shape[1]))
    return (waves * c).sum(-1) / (shape[0] * shape[1])


@pytest.mark.parametrize("make", [stacked, listed])
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_it_is_the_formula(make, layers):
    def change(leaf, kernel, name):
        if layers and name.startswith("blocks.1"):
            return kernel
        places = torch.randperm(kernel.size, generator=torch.Generator().manual_seed(777))[:5].numpy()
        return kernel + 7 * cosines(leaf["c"], places, kernel.T.shape).T

    against_numpy(make, jpeft.FourierFT(n_frequency=5, scaling=7, targets=TARGETS, layers=layers), change)


@pytest.mark.parametrize("family", ["bert tokens", "llama"])
def test_on_a_model_of_transformers_it_is_pefts(family):
    """Its places too: both draw the same."""
    method = jpeft.FourierFT(n_frequency=7, scaling=40, location_key=3, modules_to_save=())
    config = peft.FourierFTConfig(n_frequency=7, scaling=40, random_loc_seed=3)
    against_transformers(family, method, config, NAMES)


@pytest.mark.parametrize("make", [stacked, listed])
def test_merging_keeps_the_outputs(make, optimised):
    model = subjects.fill(jpeft.adapt(make(), jpeft.FourierFT(n_frequency=9, targets=TARGETS, layers=[1, 2]), key=KEY))
    x = X.astype(np.float32)
    assert subjects.error(jpeft.merge(model)(x), model(x)) < subjects.FLOAT32
    assert subjects.error(model(x), make()(x)) > 0.01


def test_on_an_embedding_it_is_the_table_changed():
    table = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
    model = subjects.fill(jpeft.adapt(One(table), jpeft.FourierFT(n_frequency=3, targets=["inner"]), key=KEY))
    leaf = {path.split("/")[-1]: np.asarray(value) for path, value in subjects.leaves(model).items()}
    changed = np.asarray(table.embedding[...]) + 150 * cosines(leaf["c"], leaf["places"], (7, 4))
    ids = np.array([[0, 6, 3], [5, 1, 1]])
    assert subjects.error(model(ids), changed[ids]) < subjects.FLOAT32


class One(nnx.Module):
    """A module with one in it."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


def places_of(model):
    return {path: np.asarray(value) for path, value in subjects.leaves(model).items() if path.endswith("places")}


def test_places_follow_from_their_key_and_the_sizes_alone():
    def make(seed, **options):
        method = jpeft.FourierFT(n_frequency=11, targets=TARGETS, **options)
        return places_of(jpeft.adapt(stacked(), method, key=jax.random.key(seed)))

    one, other, moved = make(0), make(1), make(0, location_key=3)
    for path, places in one.items():
        assert places.shape == (LAYERS, 11)
        assert places.dtype == np.int32
        assert (places == places[0]).all()
        assert len({*places[0]}) == 11
        assert places.min() >= 0
        assert places.max() < 2 * D * D
        assert (places == other[path]).all()
        assert (places != moved[path]).any()


@pytest.mark.parametrize("init, spread", [("normal", 1.0), ("zero", 0.0)])
def test_the_start(init, spread):
    model = jpeft.adapt(stacked(), jpeft.FourierFT(n_frequency=70, targets=TARGETS, init=init), key=KEY)
    for path, value in jpeft.partition(model)[1].items():
        assert abs(float(value.std()) - spread) < 0.2 * spread + 1e-9, path
    same_as_base = (model(X.astype(np.float32)) == stacked()(X.astype(np.float32))).all()
    assert same_as_base == (init == "zero")


def test_counts():
    """BERT-base, 1000 numbers on query and value of 12 layers."""

    def make():
        model = jpeft.models.build(bert.PRESETS["bert-base-uncased"], key=KEY)
        return jpeft.adapt(model, jpeft.FourierFT(targets=["query", "value"]), key=KEY)

    found = jpeft.summary(nnx.eval_shape(make))
    assert found.trainable == 24_000
    assert found.changed == 24 * 768 * 768


def test_a_bank_of_other_numbers_and_factors_gives_each_its_own():
    methods = [
        jpeft.FourierFT(n_frequency=n, scaling=s, location_key=n, targets=TARGETS) for n, s in ((5, 20), (9, 70))
    ]
    models = [subjects.fill(jpeft.adapt(stacked(), method, key=KEY), seed=i) for i, method in enumerate(methods)]
    bank = jpeft.bank(models)
    x = X.astype(np.float32)
    rows = np.concatenate([x[:1], x[:1], x[:1]])
    out = jpeft.apply_bank(bank, np.array([0, 1, 2]), lambda model, x: model(x), rows)
    for row, model in zip(out, [stacked(), *models], strict=True):
        assert subjects.error(row, model(x[:1])[0]) < subjects.FLOAT32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_frequency": 0}, "n_frequency"),
        ({"n_frequency": 73}, "72 weights, and FourierFT's n_frequency is 73"),
        ({"scaling": 0}, "scaling must be a positive number"),
        ({"scaling": float("nan")}, "scaling must be a positive number"),
        ({"init": "ones"}, "init"),
        ({"location_key": -1}, "location_key"),
        ({"targets": ".*up", "layers": [0]}, "with a regular expression, say the layers in it"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.adapt(stacked(), jpeft.FourierFT(**{"n_frequency": 5, "targets": TARGETS} | options), key=KEY)
