# SPDX-License-Identifier: Apache-2.0
"""OFT against NumPy and peft, the orthogonality of its maps, its start, counts and errors."""

import blocks_oracle
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import subjects
import torch
from blocks_oracle import against_numpy, against_peft, against_transformers, listed, stacked
from flax import nnx

import jpeft
from jpeft.methods.oft import _skew
from jpeft.models import bert

BASE = bert.PRESETS["bert-base-uncased"]
KEY = jax.random.key(0)
TARGETS = ["up", "down"]
NAMES = blocks_oracle.NAMES["oft"]
#: PEFT's exact quotient is the inverse of the paper's.
INVERSE = {"Q": ("oft_R.default.weight", np.negative)}


def skew64(packed, size):
    """In a loop over the entries."""
    matrix = np.zeros((size, size), packed.dtype)
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    for value, (i, j) in zip(packed, pairs, strict=True):
        matrix[i, j], matrix[j, i] = value, -value
    return matrix


def exact64(q):
    identity = np.eye(len(q))
    return (identity + q) @ np.linalg.inv(identity - q)


def series64(q, terms):
    powers = [np.linalg.matrix_power(q, n) for n in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


def turn64(leaf, d_in, size, terms, eps=None):
    """R, `[d_in, d_in]`; one block for all where there is one."""
    packed = leaf["Q"]
    whole = np.zeros((d_in, d_in), packed.dtype)
    for n in range(d_in // size):
        q = skew64(packed[n % len(packed)], size)
        if eps is not None:
            norm, bound = np.sqrt((q * q).sum()), eps / np.sqrt(len(packed))
            q = q * bound / norm if norm.real > bound else q
        at = slice(n * size, (n + 1) * size)
        whole[at, at] = exact64(q) if terms is None else series64(q, terms)
    return whole


@pytest.mark.parametrize("make", [stacked, listed])
@pytest.mark.parametrize("terms", [None, 5])
@pytest.mark.parametrize("options", [{}, {"block_share": True, "coft": True, "eps": 0.7}], ids=["", "shared, bounded"])
def test_it_is_the_formula(make, terms, options):
    method = jpeft.OFT(block_size=3, targets=TARGETS, neumann_terms=terms, layers=[0, 1], **options)

    def change(leaf, kernel, name):
        return kernel if name[7] == "2" else turn64(leaf, len(kernel), 3, terms, options.get("eps")) @ kernel

    against_numpy(make, method, change)


OPTIONS = {
    "series": ({"block_size": 3}, {"oft_block_size": 3}, NAMES),
    "fewer powers": (
        {"block_size": 2, "neumann_terms": 4},
        {"oft_block_size": 2, "num_cayley_neumann_terms": 4},
        NAMES,
    ),
    "more powers": ({"rank": 3, "neumann_terms": 8}, {"r": 3, "num_cayley_neumann_terms": 8}, NAMES),
    "exact": ({"block_size": 6, "neumann_terms": None}, {"oft_block_size": 6, "use_cayley_neumann": False}, INVERSE),
    "shared": ({"rank": 2, "block_share": True}, {"r": 2, "block_share": True}, NAMES),
    "bounded, within": (
        {"block_size": 3, "coft": True, "eps": 9.0},
        {"oft_block_size": 3, "coft": True, "eps": 9.0},
        NAMES,
    ),
}


@pytest.mark.parametrize("make", [stacked, listed])
@pytest.mark.parametrize("ours, theirs, names", OPTIONS.values(), ids=OPTIONS)
def test_it_is_pefts(make, ours, theirs, names):
    config = peft.OFTConfig(**{"oft_block_size": 0, **theirs})
    against_peft(make, jpeft.OFT(targets=TARGETS, **ours), config, names)


@pytest.mark.parametrize("family", ["bert tokens", "llama"])
def test_on_a_model_of_transformers_it_is_pefts(family):
    config = peft.OFTConfig(oft_block_size=8)
    against_transformers(family, jpeft.OFT(block_size=8, modules_to_save=()), config, NAMES)


def test_outside_of_its_bound_the_output_is_pefts_and_the_gradient_that_of_the_output():
    """PEFT writes the bounded Q into its leaf, and gives the gradient there; the chain rule leads from that to ours."""
    size, eps = 4, 0.25  # with 4 blocks: PEFT rounds the bound to float32
    theirs = torch_linear(eps)
    with jax.enable_x64(True):
        base = One(nnx.Linear(16, 5, rngs=nnx.Rngs(0), param_dtype=jnp.float64))
        method = jpeft.OFT(block_size=size, targets=["inner"], coft=True, eps=eps)
        model = subjects.in_float64(subjects.fill(jpeft.adapt(base, method, key=KEY)))
        graphdef, trainable, frozen = jpeft.partition(model)
        (path,) = trainable
        torch_set(theirs, base, trainable[path])
        x = np.random.default_rng(1).standard_normal((7, 16))
        run = lambda t: jpeft.combine(graphdef, t, frozen)(jnp.asarray(x))  # noqa: E731
        expected, gradient = torch_run(theirs, x)
        assert subjects.error(run(trainable), expected) < subjects.FLOAT64
        got = jax.grad(lambda t: run(t).sum())(trainable)[path]
    packed = np.asarray(trainable[path])
    unit = packed / np.linalg.norm(packed, axis=1, keepdims=True)
    bound = eps / 2 / np.sqrt(2)  # four blocks, and every entry stands twice in the matrix
    across = gradient - unit * (unit * gradient).sum(1, keepdims=True)
    assert subjects.error(got, across * bound / np.linalg.norm(packed, axis=1, keepdims=True)) < 10 * subjects.FLOAT64


def torch_linear(eps):
    config = peft.OFTConfig(oft_block_size=4, coft=True, eps=eps, target_modules=["0"])
    return peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 5)).double(), config)


def torch_set(theirs, base, packed):
    layer = theirs.base_model.model[0]
    layer.base_layer.weight.data = torch.tensor(np.asarray(base.inner.kernel[...]).T)
    layer.base_layer.bias.data = torch.tensor(np.asarray(base.inner.bias[...]))
    layer.oft_R["default"].weight.data = torch.tensor(np.asarray(packed))


def torch_run(theirs, x):
    out = theirs(torch.tensor(x))
    out.sum().backward()
    return out.detach().numpy(), theirs.base_model.model[0].oft_R["default"].weight.grad.numpy()


class One(nnx.Module):
    """A module with one in it."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


def turns(method, packed, size):
    return np.asarray(method._turns(jnp.asarray(packed), size))


def test_the_exact_map_is_orthogonal_and_the_series_tends_to_it():
    with jax.enable_x64(True):
        packed = 0.1 * np.random.default_rng(0).standard_normal((4, 10))
        exact = turns(jpeft.OFT(block_size=5, neumann_terms=None), packed, 5)
        assert exact.dtype == np.float64
        assert np.abs(exact @ exact.swapaxes(1, 2) - np.eye(5)).max() < 1e-15 * 5
        assert np.abs(np.linalg.det(exact) - 1).max() < 1e-14
        errors = [np.abs(turns(jpeft.OFT(neumann_terms=n), packed, 5) - exact).max() for n in (4, 5, 8, 12, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-4
    assert errors[-1] < 1e-15
    np.testing.assert_array_equal(_skew(jnp.asarray(packed), 5)[2], skew64(np.float32(packed[2]), 5))


def test_merged_kernels_keep_the_lengths_and_angles_of_their_columns():
    base = stacked()
    model = subjects.fill(jpeft.adapt(base, jpeft.OFT(block_size=3, targets=["up"], neumann_terms=None), key=KEY))
    before, after = (subjects.leaves(m)["blocks/up/kernel"] for m in (base, jpeft.merge(model)))
    assert subjects.error(after, before) > 0.1
    products = [np.einsum("lia,lib->lab", w.astype(np.float64), w) for w in (before, after)]
    assert subjects.error(products[1], products[0]) < subjects.MERGED


@pytest.mark.parametrize(
    "module, x, d_in",
    [
        (lambda: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=nnx.Rngs(0)), (7, 2, 3), 6),
        (lambda: nnx.Einsum("bdt,dhk->bthk", (12, 2, 3), rngs=nnx.Rngs(0)), (2, 12, 5), 12),
    ],
    ids=["several axes", "axes in another order"],
)
def test_on_other_projections_it_is_the_base_with_the_kernel_turned(module, x, d_in):
    base = One(module())
    model = subjects.fill(jpeft.adapt(base, jpeft.OFT(block_size=3, targets=["inner"]), key=KEY))
    leaf = {"Q": np.asarray(model.inner.adapters["oft"].Q[...], np.float64)}
    projection = jpeft.seams.projection(base.inner)
    turned = turn64(leaf, d_in, 3, 5) @ np.asarray(projection.read(base.inner), np.float64)
    expected = nnx.clone(base)
    expected.inner.kernel.set_value(projection.unmatrix(base.inner, jnp.asarray(turned, jnp.float32)))
    x = np.random.default_rng(0).standard_normal(x).astype(np.float32)
    assert subjects.error(model(x), expected(x)) < subjects.FLOAT32
    assert subjects.error(jpeft.merge(model)(x), expected(x)) < subjects.FLOAT32


@pytest.mark.parametrize("share", [False, True])
def test_dropout_leaves_blocks_of_the_map_out(share):
    base = One(nnx.Linear(60, 60, use_bias=False, rngs=nnx.Rngs(0)))
    base.inner.kernel.set_value(jnp.eye(60))
    method = jpeft.OFT(block_size=2, targets=["inner"], block_dropout=0.4, block_share=share)
    model = subjects.fill(jpeft.adapt(base, method, key=KEY))
    whole = np.asarray(model(jnp.eye(60)))
    with jpeft.dropout_key(KEY):
        got = np.asarray(model(jnp.eye(60)))
    blocks = [slice(2 * n, 2 * n + 2) for n in range(30)]
    kept = [not np.array_equal(got[b, b], np.eye(2)) for b in blocks]
    assert 10 < sum(kept) < 26
    expected = np.eye(60)
    for block in (b for b, keep in zip(blocks, kept, strict=True) if keep):
        expected[block, block] = whole[block, block]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_counts():
    model = jax.eval_shape(lambda: jpeft.models.build(BASE, "FEATURE_EXTRACTION", key=KEY))
    for method, one in [
        (jpeft.OFT(), 24 * 32 * 31 // 2),
        (jpeft.OFT(rank=4), 4 * 192 * 191 // 2),
        (jpeft.OFT(block_size=64, block_share=True), 64 * 63 // 2),
    ]:
        adapted = jax.eval_shape(lambda m, method=method: jpeft.adapt(m, method, key=KEY), model)
        summary = jpeft.summary(adapted)
        assert (summary.trainable, summary.changed) == (24 * one, 24 * 768 * 768)
        assert summary.trainable == sum(value.size for value in jpeft.partition(adapted)[1].values())


WRONG = [
    ({"block_size": 4, "rank": 2}, "OFT takes block_size or rank, .* got both, 4 and 2"),
    ({"block_size": 1}, "OFT's block_size must be a whole number of at least 2, got 1"),
    ({"block_size": 0}, "got 0"),
    ({"rank": 0}, "OFT's rank must be a whole number of at least 1, got 0"),
    ({"neumann_terms": 3}, "OFT's neumann_terms must be a whole number of at least 4, got 3"),
    ({"eps": 0}, "OFT's eps must be a positive number, got 0"),
    ({"block_dropout": 1.0}, r"OFT's block_dropout must be in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=str)
@pytest.mark.untyped
def test_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        jpeft.OFT(targets=["a"], **fields)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "blocks/up reads 6 numbers, which block_size=32 does not part .* block_size can be 2, 3, 6 there"),
        ({"block_size": 4}, "block_size can be 2, 3, 6 there"),
        ({"rank": 4}, "rank=4 does not part into blocks of two or more; rank can be 1, 2, 3 there"),
        ({"rank": 6}, "rank can be 1, 2, 3 there"),
    ],
    ids=str,
)
def test_blocks_that_do_not_fit_are_an_error(options, message):
    """PEFT takes the nearest size that fits, down to blocks of one number, without a parameter."""
    with pytest.raises(ValueError, match=message):
        jpeft.adapt(stacked(), jpeft.OFT(targets=["up"], **options), key=KEY)


@pytest.mark.parametrize("module", [nnx.Embed(7, 4, rngs=nnx.Rngs(0)), nnx.Conv(4, 3, (2, 2), rngs=nnx.Rngs(0))])
def test_what_reads_no_rows_of_numbers_is_refused(module):
    with pytest.raises(ValueError, match=r"inner is a (Embed|Conv): OFT turns rows of d_in numbers, and it reads none"):
        jpeft.adapt(One(module), jpeft.OFT(block_size=2, targets=["inner"]), key=KEY)
