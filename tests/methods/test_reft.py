# SPDX-License-Identifier: Apache-2.0
"""LoReFT, NoReFT and DiReFT against a NumPy formula in float64; where they act, how they start, what stays of R."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import subjects
from contracts.models import BERT
from contracts.table import QUICK
from flax import nnx

import jpeft
from jpeft import seams
from jpeft._scope import scope
from jpeft._stack import scan, stack
from jpeft.methods.reft import orthonormal
from jpeft.models.bert import PRESETS

KEY = jax.random.key(0)
METHODS = {method.kind: method for method in (jpeft.LoReFT, jpeft.NoReFT, jpeft.DiReFT)}
#: Rᵀ R against the identity, in float32.
ORTHONORMAL = 1e-6


# Against the formula. -----------------------------------------------------------------------------------------------


class Layer(nnx.Module):
    """x + tanh(up(x))."""

    def __init__(self, d, rngs):
        self.up = nnx.Linear(d, d, rngs=rngs, bias_init=nnx.initializers.normal())
        self.residual = seams.Residual(d, "mlp")

    def __call__(self, x):
        return self.residual(jnp.tanh(self.up(x)), x)


class Net(nnx.Module):
    """Layers in a list, or stacked; `text` and `segments` as a model of the zoo says them."""

    def __init__(self, d, num_layers, stacked):
        rngs = nnx.Rngs(0)
        self.layers = (
            stack(lambda r: Layer(d, r), num_layers, rngs)
            if stacked
            else nnx.List([Layer(d, rngs) for _ in range(num_layers)])
        )

    def __call__(self, x, text=None, segments=None, key=None):
        x = jnp.asarray(x)
        with scope(text=text, segments=segments, key=key):
            if not isinstance(self.layers, nnx.List):
                return scan(self.layers, lambda layer, x, _: (layer(x), None), x)[0]
            for layer in self.layers:
                x = layer(x)
            return x


def net64(flat, x, ends, method, stacked, num_layers):
    """The adapted layers in NumPy, complex numbers allowed; `ends` are the masks of front and back."""

    def leaf(i, name):
        return flat[f"layers/{name}"][i] if stacked else flat[f"layers/{i}/{name}"]

    at = [ends[0] | ends[1]] if method.tied else ends
    for i in range(num_layers):
        y = x + np.tanh(x @ leaf(i, "up/kernel") + leaf(i, "up/bias"))
        x = y
        for unit, mask in enumerate(at):
            r, w, b = (leaf(i, f"residual/adapters/{method.kind}/{n}")[unit] for n in "RWb")
            r = gram_schmidt(r) if isinstance(method, jpeft.LoReFT) else r
            inner = y @ w + b - (0 if isinstance(method, jpeft.DiReFT) else y @ r)
            x = x + mask[..., None] * (inner @ r.T)
    return x


def gram_schmidt(matrix):
    columns = []
    for column in matrix.T:
        column = column - sum(q * (q @ column) for q in columns)
        columns.append(column / np.sqrt(column @ column))
    return np.stack(columns, 1)


#: Rows: padded on both sides; packed, with padding at the end; shorter than both ends.
TEXT = np.array([[0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]], bool)
SEGMENTS = np.array([[0] * 8, [3] * 2 + [1] * 4 + [0] * 2, [0] * 8])
FRONT = np.array([[0, 1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]], bool)
BACK = np.array([[0, 0, 0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]], bool)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", METHODS)
def test_outputs_and_gradients_are_those_of_the_formula(kind, tied, stacked):
    method = METHODS[kind](rank=3, first=2, last=2, tied=tied)
    x = np.random.default_rng(1).standard_normal((3, 8, 5))
    weights = np.random.default_rng(2).standard_normal(x.shape)
    with jax.enable_x64(True):
        model = subjects.in_float64(subjects.fill(jpeft.adapt(Net(5, 2, stacked), method, key=KEY)))
        graphdef, trainable, frozen = jpeft.partition(model)

        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss(trainable):
            out = jpeft.combine(graphdef, trainable, frozen)(x, jnp.asarray(TEXT), jnp.asarray(SEGMENTS))
            return (weights * jnp.tanh(out)).sum(), out

        (_, out), gradients = jax.jit(loss, compiler_options=QUICK)(trainable)
        trainable, frozen = subjects.as64(trainable), subjects.as64(frozen)

    def expected(trainable):
        return net64({**frozen, **trainable}, x, (FRONT, BACK), method, stacked, 2)

    assert subjects.error(out, expected(trainable)) < subjects.FLOAT64
    slopes = subjects.complex_step(lambda t: (weights * np.tanh(expected(t))).sum(), trainable)
    for path, slope in slopes.items():
        assert subjects.error(gradients[path], slope) < 10 * subjects.FLOAT64, path  # a QR and its inverse more


def filled(method, num_layers=2, stacked=True):
    return subjects.fill(jpeft.adapt(Net(5, num_layers, stacked), method, key=KEY))


X = np.random.default_rng(3).standard_normal((3, 8, 5)).astype(np.float32)


def changed(model, dtype=np.float32, **options):
    """Where the adapted model's output is another than the base's."""
    x, text = jnp.asarray(X, dtype), jnp.asarray(TEXT)
    return np.asarray(model(x, text, **options) != jpeft.strip(model)(x, text)).any(-1)


@pytest.mark.parametrize("kind", METHODS)
def test_elsewhere_the_output_is_the_bases_bit_for_bit(kind):
    one_layer = subjects.fill(jpeft.adapt(Net(5, 1, True), METHODS[kind](first=1, last=2), key=KEY))
    for dtype in (jnp.float32, jnp.bfloat16):
        expected = np.array([[c == "1" for c in row] for row in ("01000110", "10001100", "00011000")])
        np.testing.assert_array_equal(changed(subjects.cast(one_layer, dtype), dtype), expected)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("stacked", [False, True])
def test_where_no_token_is_the_prompt_the_model_is_the_base(kind, stacked):
    """As in the steps of generation after the prompt has been read."""
    model = filled(METHODS[kind](rank=2, last=2), stacked=stacked)
    assert changed(model).any()
    with jpeft.prompt_tokens(np.zeros(TEXT.shape)):
        assert not changed(model, key=KEY).any()


@pytest.mark.parametrize("kind", METHODS)
def test_in_other_layers_the_model_is_the_base(kind):
    """Whatever their leaves in a stack hold; zeros do nothing."""
    graphdef, trainable, frozen = jpeft.partition(filled(METHODS[kind](rank=2, layers=[1]), 3))

    def run(others):
        leaves = {path: value.at[np.array([0, 2])].set(others) for path, value in trainable.items()}
        return jpeft.combine(graphdef, leaves, frozen)(X)

    np.testing.assert_array_equal(run(5.0), run(0.0))
    listed = jpeft.adapt(Net(5, 3, False), METHODS[kind](rank=2, layers=[1]), key=KEY)
    assert {path.split("/")[1] for path in jpeft.partition(listed)[1]} == {"1"}


def test_leaves_of_zeros_are_the_base():
    for method in METHODS.values():
        model = jpeft.adapt(Net(5, 2, True), method(rank=2), key=KEY)
        graphdef, trainable, frozen = jpeft.partition(model)
        assert not changed(jpeft.combine(graphdef, jax.tree.map(jnp.zeros_like, trainable), frozen)).any()


def test_a_bfloat16_base_is_edited_in_float32():
    """One rounding, of the result."""
    method = jpeft.LoReFT(rank=2, first=8)
    model = subjects.cast(subjects.fill(jpeft.adapt(Net(5, 1, False), method, key=KEY)), jnp.bfloat16)
    y = jpeft.strip(model)(jnp.asarray(X, jnp.bfloat16))
    flat = subjects.as64(jpeft.partition(model)[1])
    r, w, b = (flat[f"layers/0/residual/adapters/loreft/{name}"][0] for name in "RWb")
    r, y = gram_schmidt(r), np.asarray(y, np.float64)
    expected = jnp.asarray(y + (y @ w + b - y @ r) @ r.T, jnp.float32).astype(jnp.bfloat16)
    got = model(jnp.asarray(X, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert (np.asarray(got) != np.asarray(expected)).mean() < 0.02  # ties that float32 rounds the other way


# R stays orthonormal. -----------------------------------------------------------------------------------------------


def off(r):
    r = np.asarray(r, np.float64)
    return float(np.abs(np.einsum("...dr,...ds->...rs", r, r) - np.eye(r.shape[-1])).max())


def test_r_starts_and_stays_orthonormal_under_weight_decay():
    """One step of AdamW with weight decay 0.01 takes torch's R from length 2 to 0."""
    model = jpeft.adapt(Net(6, 2, True), jpeft.LoReFT(rank=4, first=2, last=1), key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)
    path = "layers/residual/adapters/loreft/R"
    np.testing.assert_allclose(orthonormal(trainable[path]), trainable[path], atol=ORTHONORMAL)
    assert off(trainable[path]) < ORTHONORMAL
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    tx = jpeft.optimizer(optax.adamw(0.05, weight_decay=0.5))
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(x) ** 2).sum())(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state

    before = trainable[path]
    for _ in range(20):
        trainable, state = step(trainable, state)
        assert off(orthonormal(trainable[path])) < ORTHONORMAL
    assert off(trainable[path]) > 0.1  # the trained matrix itself is another
    assert subjects.error(orthonormal(trainable[path]), before) > 0.1


def test_weight_decay_alone_changes_no_output():
    model = filled(jpeft.LoReFT(rank=2))
    graphdef, trainable, frozen = jpeft.partition(model)
    decayed = {path: value * (0.5 if path.endswith("R") else 1.0) for path, value in trainable.items()}
    again = jpeft.combine(graphdef, decayed, frozen)
    assert subjects.error(again(X), model(X)) < subjects.FLOAT32


# Starts, dropout, counts. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS)
def test_starts_are_torchs(kind):
    """W and b, and a free R, uniform in ±1/sqrt(d_model); every unit and layer of its own."""
    model = jpeft.adapt(Net(64, 3, True), METHODS[kind](rank=8, last=1, tied=False), key=KEY)
    for path, value in jpeft.partition(model)[1].items():
        assert value.shape == (3, 2, *((8,) if path.endswith("b") else (64, 8)))
        assert value.dtype == jnp.float32
        rows = np.asarray(value).reshape(6, -1)
        assert len({tuple(row) for row in rows}) == 6
        if kind == "loreft" and path.endswith("R"):
            continue
        assert np.abs(rows).max() <= 64**-0.5
        if rows.size > 1000:
            assert rows.std() == pytest.approx(64**-0.5 / math.sqrt(3), rel=0.05)
            assert np.abs(rows).max() > 0.99 * 64**-0.5


def test_dropout_takes_whole_entries_of_the_output_at_the_ends_alone():
    rate, d = 0.25, 400
    model = subjects.fill(jpeft.adapt(Net(d, 1, True), jpeft.LoReFT(first=2, last=1, dropout=rate), key=KEY), scale=0.1)
    x = np.random.default_rng(0).standard_normal((3, 8, d)).astype(np.float32)

    def run(key):
        return np.asarray(model(x, jnp.asarray(TEXT), key=key), np.float32)

    plain, dropped = run(None), run(jax.random.key(1))
    touched = np.any(dropped != plain, axis=-1)
    ends = np.array([[c == "1" for c in row] for row in ("01100010", "11000100", "00011000")])
    np.testing.assert_array_equal(touched, ends)
    kept = touched[..., None] & (dropped != 0)
    np.testing.assert_allclose(dropped[kept], plain[kept] / (1 - rate), rtol=1e-6)
    assert (dropped == 0)[touched].mean() == pytest.approx(rate, abs=0.03)
    np.testing.assert_array_equal(run(jax.random.key(1)), dropped)
    assert (run(jax.random.key(2)) != dropped).any()


@pytest.mark.parametrize(
    "options, count",
    [
        ({}, 18_444),
        ({"last": 3, "tied": False}, 36_888),
        ({"rank": 4, "last": 1}, 73_776),
        ({"rank": 8, "layers": [2, 7]}, 2 * (2 * 768 + 1) * 8),
    ],
)
@pytest.mark.parametrize("kind", METHODS)
def test_counts_of_bert_base(kind, options, count):
    shapes = nnx.eval_shape(
        lambda: jpeft.adapt(
            jpeft.models.build(PRESETS["bert-base-uncased"], "FEATURE_EXTRACTION", key=KEY),
            METHODS[kind](**options),
            key=KEY,
        )
    )
    found = jpeft.summary(shapes)
    assert (found.trainable, found.changed) == (count, 0)


# Refusals. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"first": -1}, "first must be a whole number of at least 0, got -1"),
        ({"last": 1.5}, "last must be a whole number of at least 0, got 1.5"),
        ({"first": 0}, "first=0 and last=0 would act nowhere"),
        ({"tied": False}, "first=3 and last=0; give both, or tied=True"),
        ({"tied": "yes"}, "tied must be one of True, False; got 'yes'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"layers": []}, "layers takes the indices of layers"),
    ],
)
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.untyped
def test_a_wrong_option_is_an_error(kind, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[kind](**options)


def test_what_cannot_be_is_an_error():
    bert = jpeft.models.build(BERT, "TOKEN_CLS", key=KEY)
    with pytest.raises(ValueError, match="is 8 wide, which has no 9 orthonormal directions; lower the rank"):
        jpeft.adapt(bert, jpeft.LoReFT(rank=9), key=KEY)
    with pytest.raises(ValueError, match=r"layers=\[2\]: the targets stand in layers \[0, 1\]"):
        jpeft.adapt(bert, jpeft.LoReFT(layers=[2]), key=KEY)
    with pytest.raises(ValueError, match="acts at a place where a block meets the residual stream"):
        jpeft.adapt(subjects.ListOfLayers(4, 2, nnx.Rngs(0)), jpeft.LoReFT(), key=KEY)
    adapted = jpeft.adapt(bert, jpeft.LoReFT(), key=KEY)
    with pytest.raises(ValueError, match="LoReFT computes what no weights of the base can, so it has no merged form"):
        jpeft.merge(adapted)
    with jpeft.prompt_tokens(np.ones((1, 4))), pytest.raises(ValueError, match=r"\(1, 4\) which are the prompt"):
        adapted(np.ones((2, 4), int))
