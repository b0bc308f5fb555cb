# SPDX-License-Identifier: Apache-2.0
"""LoHa against NumPy and peft, its two ways of computing, its start, counts and errors."""

import blocks_oracle
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import subjects
from blocks_oracle import against_numpy, against_peft, against_transformers, listed, stacked
from flax import nnx

import jpeft
from jpeft.models import bert

BASE = bert.PRESETS["bert-base-uncased"]
NAMES = blocks_oracle.NAMES["loha"]
#: PEFT rounds the factor alpha / rank to float32: here all are powers of two times three.
PATTERNS = {"rank_pattern": {"blocks.1.up": 8, "blocks.2.up": 1}, "alpha_pattern": {"blocks.0.down": 2.0}}


SEVERAL = {"rank_pattern": {"blocks.1.up": 5}, "alpha_pattern": {"blocks.0.down": 2.0}, "layers": [0, 1]}


@pytest.mark.parametrize("make", [stacked, listed])
@pytest.mark.parametrize("options", [{}, SEVERAL], ids=["alike", "of several ranks"])
def test_it_is_the_formula(make, options):
    """Rank 1 makes the product from its factors, rank 5 as a matrix."""

    def change(leaf, kernel, name):
        rank = options.get("rank_pattern", {}).get(name, 1)
        alpha = options.get("alpha_pattern", {}).get(name, 3.0)
        if options and name.startswith("blocks.2"):
            return kernel
        a1, a2, b1, b2 = (leaf[n][:, :rank] if n[0] == "A" else leaf[n][:rank] for n in ("A1", "A2", "B1", "B2"))
        return kernel + alpha / rank * (a1 @ b1) * (a2 @ b2)

    against_numpy(make, jpeft.LoHa(rank=1, alpha=3, targets=["up", "down"], **options), change)


@pytest.mark.parametrize("make", [stacked, listed])
@pytest.mark.parametrize("rank", [1, 4])
def test_it_is_pefts(make, rank):
    config = peft.LoHaConfig(r=rank, alpha=3, **PATTERNS)
    against_peft(make, jpeft.LoHa(rank=rank, alpha=3, targets=["up", "down"], **PATTERNS), config, NAMES)


@pytest.mark.parametrize("family", ["bert tokens", "llama"])
def test_on_a_model_of_transformers_it_is_pefts(family):
    method = jpeft.LoHa(rank=3, alpha=2, modules_to_save=())
    against_transformers(family, method, peft.LoHaConfig(r=3, alpha=2), NAMES)


def convolution():
    return nnx.Conv(2, 3, (3, 2), (2, 1), padding=((1, 1), (1, 1)), rngs=nnx.Rngs(0))


OTHERS = {
    "table": (lambda: nnx.Embed(7, 4, rngs=nnx.Rngs(0)), np.array([[1, 0, 6], [3, 3, 2]])),
    "several axes": (lambda: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=nnx.Rngs(0)), (7, 2, 3)),
    "convolution": (convolution, (2, 7, 6, 2)),
}


class One(nnx.Module):
    """A module with one in it."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", OTHERS)
def test_on_other_projections_it_is_the_base_with_the_kernel_changed(name, rank):
    make, x = OTHERS[name]
    x = np.random.default_rng(0).standard_normal(x).astype(np.float32) if isinstance(x, tuple) else x
    base = One(make())
    model = subjects.fill(jpeft.adapt(base, jpeft.LoHa(rank=rank, alpha=3, targets=["inner"]), key=jax.random.key(0)))
    a1, b1, a2, b2 = (np.asarray(getattr(model.inner.adapters["loha"], n)[...], np.float64) for n in NAMES)
    projection = jpeft.seams.projection(base.inner)
    delta = 3 / rank * (a1 @ b1) * (a2 @ b2)
    own = getattr(base.inner, projection.kernel)
    expected = nnx.clone(base)
    changed = own[...] + projection.unmatrix(base.inner, jnp.asarray(delta, jnp.float32))
    getattr(expected.inner, projection.kernel).set_value(changed)
    assert subjects.error(model(x), expected(x)) < subjects.FLOAT32
    assert subjects.error(jpeft.merge(model)(x), expected(x)) < subjects.FLOAT32


def test_no_matrix_of_the_kernels_size_is_kept():
    """Where the factors are cheaper none is made; elsewhere none waits for the backward pass."""
    d = 64

    def sizes(rank):
        base = One(nnx.Linear(d, d, rngs=nnx.Rngs(0)))
        model = jpeft.adapt(base, jpeft.LoHa(rank=rank, targets=["inner"]), key=jax.random.key(0))
        graphdef, trainable, frozen = jpeft.partition(model)
        x = jnp.ones((3, d))
        run = lambda t: jpeft.combine(graphdef, t, frozen)(x)  # noqa: E731
        kept = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(run, trainable)[1]) if hasattr(leaf, "shape")]
        made = [v.aval.shape for e in jax.make_jaxpr(run)(trainable).eqns for v in e.outvars]
        return made, [shape for shape in kept if np.prod(shape) >= d * d and shape != frozen["inner/kernel"].shape]

    made, kept = sizes(4)
    assert (d, d) not in made
    assert not kept
    _, kept = sizes(8)
    assert not kept


def test_it_starts_as_fedpara_and_peft_do():
    """A2 zero, the others uniform in ±1/sqrt(their inputs)."""
    model = jpeft.adapt(stacked(), jpeft.LoHa(rank=4, targets=["up"]), key=jax.random.key(1))
    leaves = {path.split("/")[-1]: np.asarray(value) for path, value in jpeft.partition(model)[1].items()}
    assert not leaves.pop("A2").any()
    for name, bound in {"A1": 6**-0.5, "B1": 4**-0.5, "B2": 4**-0.5}.items():
        assert 0.9 * bound < np.abs(leaves[name]).max() <= bound
        assert len(np.unique(leaves[name])) > 0.99 * leaves[name].size


def test_counts_and_places():
    model = jax.eval_shape(lambda: jpeft.models.build(BASE, "FEATURE_EXTRACTION", key=jax.random.key(0)))
    adapted = jax.eval_shape(lambda m: jpeft.adapt(m, jpeft.LoHa(rank=8), key=jax.random.key(0)), model)
    summary = jpeft.summary(adapted)
    assert (summary.trainable, summary.changed) == (24 * 2 * 8 * (768 + 768), 24 * 768 * 768)
    assert summary.trainable == sum(value.size for value in jpeft.partition(adapted)[1].values())
    mesh = jpeft.mesh("fsdp=2,tensor=4")
    places = {path: place.spec for path, place in jpeft.shardings(adapted, mesh, uneven="whole").items()}
    query = "layers/attention/self/query"
    assert tuple(places[f"{query}/kernel"]) == (None, "fsdp", "tensor")
    for name in "12":
        assert tuple(places[f"{query}/adapters/loha/A{name}"]) == (None, "fsdp", None)
        assert tuple(places[f"{query}/adapters/loha/B{name}"]) == (None, None, ("tensor", "fsdp"))
    pattern = jpeft.LoHa(rank=2, targets=["up"], rank_pattern={"blocks.1.up": 5}, layers=[1, 2])
    assert jpeft.summary(jpeft.adapt(stacked(), pattern, key=jax.random.key(0))).trainable == 2 * (5 + 2) * 18


def test_dropout_leaves_out_outputs_or_all():
    """For all tokens alike, divided by the part that is kept; a layer that is left out whole is the base."""
    base = One(nnx.Linear(8, 64, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)

    def changes(**options):
        model = jpeft.adapt(base, jpeft.LoHa(rank=2, targets=["inner"], **options), key=jax.random.key(0))
        graphdef, trainable, frozen = jpeft.partition(subjects.fill(model))

        def run(key):
            with jpeft.dropout_key(key):
                return jpeft.combine(graphdef, trainable, frozen)(x) - base(x)

        return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 40)))

    whole = changes()[0]
    for dropped in changes(rank_dropout=0.4)[:5]:
        kept = (dropped != 0).any(0)
        assert 20 < kept.sum() < 55
        np.testing.assert_allclose(dropped, whole * kept / kept.mean(), rtol=1e-4, atol=1e-5)
    layers = changes(module_dropout=0.5)
    acts = (layers != 0).any((1, 2))
    assert 8 < acts.sum() < 32
    np.testing.assert_allclose(layers, acts[:, None, None] * whole[None], rtol=1e-4, atol=1e-5)
    assert len({tuple(kept) for kept in (changes(rank_dropout=0.4) != 0).any(1)}) > 35


WRONG = [
    ({"rank": 0}, "LoHa's rank must be a whole number of at least 1, got 0"),
    ({"rank_pattern": {"a": 1.5}}, "LoHa's rank must be a whole number of at least 1, got 1.5"),
    ({"alpha": 0}, "LoHa's alpha must be a positive number .*, got 0"),
    ({"alpha_pattern": {"a": float("inf")}}, "got inf"),
    ({"rank_dropout": 1.0}, r"LoHa's rank_dropout must be in \[0, 1\), got 1.0"),
    ({"module_dropout": -0.1}, r"LoHa's module_dropout must be in \[0, 1\), got -0.1"),
    ({"layers": [-1]}, "layers takes the indices of layers"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=str)
@pytest.mark.untyped
def test_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        jpeft.LoHa(targets=["a"], **fields)


def test_it_needs_targets_where_peft_has_no_default():
    with pytest.raises(ValueError, match=r"LoHa knows no default targets for model type None .* pass targets="):
        jpeft.adapt(blocks_oracle.stacked(), jpeft.LoHa(), key=jax.random.key(0))
