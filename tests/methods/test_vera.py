# SPDX-License-Identifier: Apache-2.0
"""VeRA against NumPy and peft, its shared projections, start, counts and errors."""

import blocks_oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import subjects
from blocks_oracle import LAYERS, D, X, against_numpy, against_peft, against_transformers, listed, stacked
from flax import nnx

import jpeft
from jpeft.models import bert

BASE = bert.PRESETS["bert-base-uncased"]
KEY = jax.random.key(0)
TARGETS = ["up", "down"]
NAMES = blocks_oracle.NAMES["vera"]


@pytest.mark.parametrize("make", [stacked, listed])
def test_it_is_the_formula(make):
    """Every place reads the corner of its size."""

    def change(leaf, kernel, name):
        if name.startswith("blocks.0"):
            return kernel
        a, b = leaf["A"][: kernel.shape[0]], leaf["B"][:, : kernel.shape[1]]
        return kernel + a @ np.diag(leaf["d"]) @ b @ np.diag(leaf["b"])

    against_numpy(make, jpeft.VeRA(rank=5, targets=TARGETS, layers=[1, 2]), change)


@pytest.mark.parametrize("make", [stacked, listed])
def test_it_is_pefts(make):
    """Its projections too: both draw the same numbers."""
    config = peft.VeraConfig(r=5, projection_prng_key=9)
    against_peft(make, jpeft.VeRA(rank=5, targets=TARGETS, projection_key=9), config, NAMES, _double)


def _double(other):
    """peft draws its projections in float32 and keeps them so."""
    for buffer in (other.base_model.vera_A, other.base_model.vera_B):
        buffer["default"] = buffer["default"].double()


@pytest.mark.parametrize("family", ["bert tokens", "llama"])
def test_on_a_model_of_transformers_it_is_pefts(family):
    method = jpeft.VeRA(rank=7, modules_to_save=())
    against_transformers(family, method, peft.VeraConfig(r=7), NAMES)


@pytest.mark.parametrize(
    "module, x",
    [
        (lambda: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=nnx.Rngs(0)), (7, 2, 3)),
        (lambda: nnx.Conv(2, 3, (3, 2), (2, 1), padding=((1, 1), (1, 1)), rngs=nnx.Rngs(0)), (2, 7, 6, 2)),
    ],
    ids=["several axes", "convolution"],
)
def test_on_other_projections_it_is_the_base_with_the_kernel_changed(module, x):
    base = One(module())
    model = subjects.fill(jpeft.adapt(base, jpeft.VeRA(rank=3, targets=["inner"]), key=KEY))
    leaf = {path.split("/")[-1]: np.asarray(value, np.float64) for path, value in subjects.leaves(model).items()}
    projection = jpeft.seams.projection(base.inner)
    delta = jnp.asarray(leaf["A"] * leaf["d"] @ leaf["B"] * leaf["b"], jnp.float32)
    expected = nnx.clone(base)
    expected.inner.kernel.set_value(base.inner.kernel[...] + projection.unmatrix(base.inner, delta))
    x = np.random.default_rng(0).standard_normal(x).astype(np.float32)
    assert subjects.error(model(x), expected(x)) < subjects.FLOAT32
    assert subjects.error(jpeft.merge(model)(x), expected(x)) < subjects.FLOAT32


class One(nnx.Module):
    """A module with one in it."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


def test_the_projections_are_kept_once_and_never_trained():
    model = jpeft.adapt(stacked(), jpeft.VeRA(rank=5, targets=TARGETS), key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)
    assert {path: frozen[path].shape for path in frozen if "adapters" in path} == {
        "adapters/vera/A": (2 * D, 5),
        "adapters/vera/B": (5, 2 * D),
    }
    assert {path: value.shape for path, value in trainable.items()} == {
        "blocks/up/adapters/vera/d": (LAYERS, 5),
        "blocks/up/adapters/vera/b": (LAYERS, 2 * D),
        "blocks/down/adapters/vera/d": (LAYERS, 5),
        "blocks/down/adapters/vera/b": (LAYERS, D),
    }
    before = {path: np.array(value) for path, value in frozen.items()}
    tx = jpeft.optimizer(optax.adamw(0.1, weight_decay=0.1))
    state = tx.init(trainable)
    for _ in range(3):
        gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(X.astype(np.float32)) ** 2).sum())(trainable)
        updates, state = tx.update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    after = jpeft.partition(jpeft.combine(graphdef, trainable, frozen))[2]
    assert all((after[path] == value).all() for path, value in before.items())


def test_the_projections_depend_on_their_own_key_alone():
    def drawn(key=0, name="vera", **options):
        method = jpeft.VeRA(rank=4, targets=TARGETS, **options)
        leaves = subjects.leaves(jpeft.adapt(stacked(), method, key=jax.random.key(key), name=name))
        return leaves[f"adapters/{name}/A"], leaves[f"adapters/{name}/B"]

    first = drawn()
    for other in (drawn(key=5), drawn(name="second"), drawn(layers=[1]), drawn(d_initial=1.0)):
        assert all((a == b).all() for a, b in zip(first, other, strict=True))
    assert all((a != b).any() for a, b in zip(first, drawn(projection_key=1), strict=True))
    assert not np.array_equal(first[0].ravel(), first[1].ravel())


def test_two_adapters_on_one_model_add_up():
    """Each reads its own projections."""
    one = jpeft.adapt(stacked(), jpeft.VeRA(rank=4, targets=["up"]), key=KEY, name="one")
    second = jpeft.VeRA(rank=3, targets=["up"], projection_key=1)
    model = subjects.fill(jpeft.adapt(one, second, key=KEY, name="two"))
    leaf = subjects.as64(subjects.leaves(model))
    kernel = subjects.leaves(jpeft.merge(model))["blocks/up/kernel"]
    expected = leaf["blocks/up/kernel"].copy()
    for name in ("one", "two"):
        a, b = leaf[f"adapters/{name}/A"], leaf[f"adapters/{name}/B"]
        d, scale = (leaf[f"blocks/up/adapters/{name}/{n}"][:, None] for n in "db")
        expected += (a * d) @ b * scale
    assert subjects.error(kernel, expected) < subjects.MERGED
    x = X.astype(np.float32)
    assert subjects.error(jpeft.merge(model)(x), model(x)) < subjects.FLOAT32


def test_it_starts_as_the_papers():
    """d at 0.1, b at zero, A and B uniform, of the kaiming sizes."""
    model = jpeft.adapt(stacked(), jpeft.VeRA(rank=9, targets=TARGETS), key=KEY)
    leaves = subjects.leaves(model)
    assert (leaves["blocks/up/adapters/vera/d"] == np.float32(0.1)).all()
    assert not leaves["blocks/up/adapters/vera/b"].any()
    for name, bound in (("A", (6 / 12) ** 0.5), ("B", (6 / 9) ** 0.5)):
        assert 0.9 * bound < np.abs(leaves[f"adapters/vera/{name}"]).max() <= bound


def test_counts_are_the_papers():
    model = jax.eval_shape(lambda: jpeft.models.build(BASE, "FEATURE_EXTRACTION", key=KEY))
    adapted = jax.eval_shape(lambda m: jpeft.adapt(m, jpeft.VeRA(rank=8), key=KEY), model)
    summary = jpeft.summary(adapted)
    assert (summary.trainable, summary.changed, summary.rows[0].seams) == (18_624, 24 * 768 * 768, 24)
    assert summary.bytes == 4 * 18_624
    assert summary.base == jpeft.summary(model).base
    one = jpeft.adapt(stacked(), jpeft.VeRA(rank=4, targets=["up"], layers=[1]), key=KEY)
    assert (jpeft.summary(one).trainable, jpeft.summary(one).changed) == (4 + 12, 72)


WRONG = [
    ({"rank": 0}, "VeRA's rank must be a whole number of at least 1, got 0"),
    ({"dropout": 1.0}, r"VeRA's dropout must be in \[0, 1\), got 1.0"),
    ({"d_initial": 0}, r"d_initial must be a number other than 0 \(at 0 nothing is trained\), got 0"),
    ({"d_initial": float("nan")}, "got nan"),
    ({"projection_key": -1}, "projection_key must be a whole number of at least 0, got -1"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=str)
@pytest.mark.untyped
def test_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        jpeft.VeRA(targets=["a"], **fields)


def test_an_embedding_is_refused():
    base = One(nnx.Embed(7, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"inner is an embedding, .* a row for each of its 7 words; adapt it by LoRA"):
        jpeft.adapt(base, jpeft.VeRA(targets=["inner"]), key=KEY)


def test_a_place_alone_has_no_projections():
    model = jpeft.adapt(listed(), jpeft.VeRA(rank=4, targets=["up"]), key=KEY)
    with pytest.raises(ValueError, match="outside of a call of the model; call the adapted model itself"):
        model.blocks[0].up(X.astype(np.float32))
