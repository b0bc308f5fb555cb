# SPDX-License-Identifier: Apache-2.0
"""LoKr against NumPy and peft, its factorisation, what it never makes, its start, counts and errors."""

from typing import Any

import blocks_oracle
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import subjects
from blocks_oracle import against_numpy, against_peft, against_transformers, listed, stacked
from flax import nnx
from jaxprs import sizes
from peft.tuners.lokr.layer import factorization as pefts_factorization

import jpeft
from jpeft.methods.lokr import factorization
from jpeft.models import bert

BASE = bert.PRESETS["bert-base-uncased"]
NAMES = blocks_oracle.NAMES["lokr"]
TARGETS = ["up", "down"]
#: up is 6 x 12 and down 12 x 6: parted into 2 * 3 and 3 * 4, with a factor of 6 into 6 * 1 and 6 * 2 (where w2 is one
#: row, which torch.kron cannot multiply with a product, and so peft cannot either).
OPTIONS: dict[str, dict[str, Any]] = {
    "w2 of low rank": {"rank": 1},
    "both whole": {"rank": 8},
    "both of low rank": {"rank": 1, "decompose_both": True},
    "a factor that does not divide": {"rank": 1, "decompose_factor": 5},
    "of several alphas": {"rank": 1, "alpha_pattern": {"blocks.1.up": 2.0}, "init": "lycoris"},
}
PEFT_NAMES = {"rank": "r", "init": "init_weights"}


def whole(leaf, name, columns=slice(None)):
    return leaf[name] if name in leaf else leaf[f"{name}_in"][:, columns] @ leaf[f"{name}_out"][columns]


FORMULA: dict[str, dict[str, Any]] = {
    "w2 of low rank": {"rank": 2, "decompose_factor": 1, "rank_pattern": {"blocks.1.up": 1}},
    "both of low rank": {"rank": 1, "decompose_both": True},
    "w1 of low rank": {
        "rank": 2,
        "decompose_both": True,
        "decompose_factor": 6,
        "rank_pattern": {"blocks.1.up": 1},
    },
}


@pytest.mark.parametrize("options", FORMULA.values(), ids=FORMULA)
@pytest.mark.parametrize("make", [stacked, listed])
def test_it_is_the_formula(make, options):
    """With other ranks and alphas in some layers, and none in the last."""
    alphas = {"blocks.0.down": 2.0}
    method = jpeft.LoKr(alpha=3, targets=TARGETS, layers=[0, 1], alpha_pattern=alphas, **options)

    def change(leaf, kernel, name):
        if name.startswith("blocks.2"):
            return kernel
        rank, alpha = options.get("rank_pattern", {}).get(name, options["rank"]), alphas.get(name, 3)
        w1, w2 = (whole(leaf, part, slice(rank)) for part in ("w1", "w2"))
        return kernel + alpha / rank * np.kron(w1, w2)

    against_numpy(make, method, change)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_pefts(options):
    theirs: Any = {PEFT_NAMES.get(name, name): value for name, value in options.items()}
    against_peft(stacked, jpeft.LoKr(alpha=3, targets=TARGETS, **options), peft.LoKrConfig(alpha=3, **theirs), NAMES)


def test_in_layers_of_their_own_it_is_pefts():
    """There a layer may hold w2 whole, and another its factors."""
    pattern = {"rank_pattern": {"blocks.1.up": 6, "blocks.2.down": 2}}
    method = jpeft.LoKr(rank=1, alpha=3, targets=TARGETS, **pattern)
    against_peft(listed, method, peft.LoKrConfig(r=1, alpha=3, **pattern), NAMES)


@pytest.mark.parametrize("family", ["bert tokens", "llama"])
def test_on_a_model_of_transformers_it_is_pefts(family):
    method = jpeft.LoKr(rank=1, alpha=2, decompose_both=True, modules_to_save=())
    against_transformers(family, method, peft.LoKrConfig(r=1, alpha=2, decompose_both=True), NAMES)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 8, 16, 1000])
def test_sizes_are_parted_as_by_peft(factor):
    for size in [*range(1, 200), 768, 3072, 4096, 30522, 50257]:
        assert factorization(size, factor) == pefts_factorization(size, factor)


class One(nnx.Module):
    """A module with one in it."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


OTHERS = {
    "table": (lambda: nnx.Embed(14, 15, rngs=nnx.Rngs(0)), np.array([[1, 0, 6], [13, 3, 8]])),
    "several axes": (lambda: nnx.LinearGeneral((2, 9), (4, 5), axis=(-2, -1), rngs=nnx.Rngs(0)), (7, 2, 9)),
    "axes in another order": (lambda: nnx.Einsum("bdt,dhk->bthk", (12, 2, 3), rngs=nnx.Rngs(0)), (2, 12, 5)),
}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_on_other_projections_it_is_the_base_with_the_kernel_changed(name, both):
    make, x = OTHERS[name]
    x = np.random.default_rng(0).standard_normal(x).astype(np.float32) if isinstance(x, tuple) else x
    base = One(make())
    method = jpeft.LoKr(rank=1, alpha=3, targets=["inner"], decompose_both=both)
    model = subjects.fill(jpeft.adapt(base, method, key=jax.random.key(0)))
    leaf = {path.split("/")[-1]: np.asarray(v, np.float64) for path, v in jpeft.partition(model)[1].items()}
    projection = jpeft.seams.projection(base.inner)
    delta = jnp.asarray(3 * np.kron(whole(leaf, "w1"), whole(leaf, "w2")), jnp.float32)
    expected = nnx.clone(base)
    own = getattr(base.inner, projection.kernel)[...]
    getattr(expected.inner, projection.kernel).set_value(own + projection.unmatrix(base.inner, delta))
    assert subjects.error(model(x), expected(x)) < subjects.FLOAT32
    assert subjects.error(jpeft.merge(model)(x), expected(x)) < subjects.FLOAT32


@pytest.mark.parametrize("options", [{}, {"decompose_both": True}, {"rank": 16}], ids=str)
def test_the_kronecker_product_is_never_made(options):
    """Nor one of its factors' sides, in the forward or in the backward pass."""
    base = One(nnx.Linear(64, 96, use_bias=False, rngs=nnx.Rngs(0)))
    method = jpeft.LoKr(**{"rank": 2, "targets": ["inner"], **options})
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(base, method, key=jax.random.key(0)))
    x = jnp.ones((3, 64))

    def step(trainable):
        return jax.value_and_grad(lambda t: jpeft.combine(graphdef, t, frozen)(x).sum())(trainable)

    found = [*sizes(jax.make_jaxpr(step)(trainable).jaxpr)]
    assert max(found) < 64 * 96
    assert len(found) > 10


@pytest.mark.parametrize("init, zero", [("default", {"w1", "w1_out"}), ("lycoris", {"w2", "w2_in"})])
@pytest.mark.parametrize("options", [{"rank": 1, "decompose_both": True}, {"rank": 9}], ids=str)
def test_it_starts_as_pefts(init, zero, options):
    """Uniform in ±1/sqrt(its inputs), but for one leaf."""
    base = One(nnx.Linear(64, 100, rngs=nnx.Rngs(0)))
    model = jpeft.adapt(base, jpeft.LoKr(targets=["inner"], init=init, **options), key=jax.random.key(3))
    leaves = {path.split("/")[-1]: np.asarray(value) for path, value in jpeft.partition(model)[1].items()}
    assert len(zero & set(leaves)) == 1
    for name, value in leaves.items():
        assert value.any() == (name not in zero)
        assert np.abs(value).max() <= len(value) ** -0.5
        assert name in zero or np.abs(value).max() > 0.6 * len(value) ** -0.5


def test_counts():
    model = jax.eval_shape(lambda: jpeft.models.build(BASE, "FEATURE_EXTRACTION", key=jax.random.key(0)))
    for method, one in [
        (jpeft.LoKr(rank=8), 24 * 24 + 8 * (32 + 32)),
        (jpeft.LoKr(rank=16), 24 * 24 + 32 * 32),
        (jpeft.LoKr(rank=8, decompose_both=True), 8 * (24 + 24) + 8 * (32 + 32)),
        (jpeft.LoKr(rank=8, decompose_factor=4), 4 * 4 + 8 * (192 + 192)),
    ]:
        adapted = jax.eval_shape(lambda m, method=method: jpeft.adapt(m, method, key=jax.random.key(0)), model)
        summary = jpeft.summary(adapted)
        assert (summary.trainable, summary.changed) == (24 * one, 24 * 768 * 768)
        assert summary.trainable == sum(value.size for value in jpeft.partition(adapted)[1].values())


@pytest.mark.parametrize("rescale", [False, True])
def test_dropout_leaves_outputs_out(rescale):
    base = One(nnx.Linear(8, 64, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    options = {"rank": 1, "targets": ["inner"], "rank_dropout_scale": rescale}
    model = subjects.fill(jpeft.adapt(base, jpeft.LoKr(**options, rank_dropout=0.4), key=jax.random.key(0)))
    whole = np.asarray(model(x) - base(x))
    with jpeft.dropout_key(jax.random.key(0)):
        dropped = np.asarray(model(x) - base(x))
    kept = (dropped != 0).any(0)
    assert 20 < kept.sum() < 55
    np.testing.assert_allclose(dropped, whole * kept / (kept.mean() if rescale else 1), rtol=1e-4, atol=1e-5)


WRONG = [
    ({"rank": 0}, "LoKr's rank must be a whole number of at least 1, got 0"),
    ({"alpha": -1}, "LoKr's alpha must be a positive number .*, got -1"),
    ({"init": True}, "LoKr's init must be one of default, lycoris; got True"),
    ({"decompose_factor": 0}, "decompose_factor must be a whole number of at least 1, or -1 .*; got 0"),
    ({"decompose_factor": 2.0}, "got 2.0"),
    ({"module_dropout": 1}, r"LoKr's module_dropout must be in \[0, 1\), got 1"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=str)
@pytest.mark.untyped
def test_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        jpeft.LoKr(targets=["a"], **fields)


def test_a_stack_holds_whole_factors_or_low_ranks():
    method = jpeft.LoKr(rank=1, targets=["up"], rank_pattern={"blocks.1.up": 4})
    message = "blocks/up: w2 is 3 x 4, of low rank in the layers of a rank below 2 and whole in the others, .* choose"
    with pytest.raises(ValueError, match=message):
        jpeft.adapt(stacked(), method, key=jax.random.key(0))


def test_a_convolution_is_refused():
    base = One(nnx.Conv(2, 3, (3, 2), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"inner is a convolution, .* adapt it by LoRA or LoHa"):
        jpeft.adapt(base, jpeft.LoKr(rank=1, targets=["inner"]), key=jax.random.key(0))
