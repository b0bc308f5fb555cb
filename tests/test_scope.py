# SPDX-License-Identifier: Apache-2.0
"""What belongs to the running call: its dropout key and layer, also where JAX keeps a trace."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from flax import nnx

import jpeft
from jpeft import _scope

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)


@pytest.fixture(scope="module", name="model")
def _model():
    method = jpeft.LoRA(rank=2, alpha=3, targets=".*", dropout=0.5)
    return subjects.fill(jpeft.adapt(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), method, key=KEY))


_jitted = jax.jit(lambda model, x: model(x))
_checkpointed = jax.checkpoint(lambda model, x: model(x))


def _body(x, model):
    return x, model(x)


def _scanned(model, x):
    graphdef, *halves = jpeft.partition(model)
    once = jax.tree.map(lambda leaf: leaf[None], halves)
    return jax.lax.scan(lambda x, leaves: _body(x, jpeft.combine(graphdef, *leaves)), x, once)[1][0]


INNER = {
    "nothing": lambda model, x: model(x),
    "jax.jit": _jitted,
    "jax.checkpoint": _checkpointed,
    "jax.lax.scan": _scanned,
    "nnx.jit": nnx.jit(lambda model, x: model(x)),
    "nnx.remat": nnx.remat(lambda model, x: model(x)),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_no_kept_trace_serves_another_key(model, inner):
    """A function jitted inside of the model is traced once per scope, not once for all."""

    def run(key=None):
        if key is None:
            return np.asarray(inner(model, X))
        with jpeft.dropout_key(key):
            return np.asarray(inner(model, X))

    plain, one, two = run(), run(jax.random.key(1)), run(jax.random.key(2))
    assert (plain != one).any()
    assert (one != two).any()
    np.testing.assert_array_equal(run(), plain)
    np.testing.assert_allclose(run(jax.random.key(1)), one, atol=1e-6)


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_a_key_that_is_traced_does_not_leak(model, inner):
    """Two traces of the outer function meet one inner function, whose trace must not hold the first one's key."""

    graphdef, trainable, frozen = jpeft.partition(model)

    def run(key, x, factor):
        with jpeft.dropout_key(key):
            return factor * inner(jpeft.combine(graphdef, trainable, frozen), x)

    one = jax.jit(lambda key, x: run(key, x, 1.0))(jax.random.key(1), X)
    two = jax.jit(lambda key, x: run(key, x, 2.0))(jax.random.key(1), X)
    np.testing.assert_allclose(2 * one, two, rtol=1e-6)
    grad = jax.jit(jax.grad(lambda x, key: run(key, x, 1.0).sum()))
    assert (grad(X, jax.random.key(1)) != grad(X, jax.random.key(2))).any()


def test_the_scope_ends_with_its_block():
    assert _scope.current() == _scope.Scope()
    with _scope.scope(key=KEY), _scope.scope(layer=3) as inner:
        assert inner == _scope.current()
        assert (inner.key, inner.layer) == (KEY, 3)
    with pytest.raises(RuntimeError, match="inside"), jpeft.dropout_key(KEY):
        raise RuntimeError("inside")
    assert _scope.current() == _scope.Scope()


def test_a_key_of_none_keeps_the_outer_one():
    with _scope.scope(key=KEY), _scope.scope(key=None):
        assert _scope.current().key is KEY
    with _scope.scope(key=None):
        assert _scope.current().key is None


def test_threads_have_scopes_of_their_own(model):
    def run(i):
        with jpeft.dropout_key(jax.random.key(i)):
            return np.asarray(model(X))

    expected = [run(i) for i in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(run, range(4)), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_dropout_is_a_function_of_key_path_and_layer():
    x = jnp.ones((40, 40))

    def draw(key=1, path="a", layer=None):
        with _scope.scope(key=jax.random.key(key)):
            return np.asarray(_scope.dropout(x, 0.5, path, layer))

    masks = [draw(), draw(key=2), draw(path="b"), draw(layer=0), draw(layer=1)]
    assert len({mask.tobytes() for mask in masks}) == 5
    np.testing.assert_array_equal(draw(), draw())
    with _scope.scope(layer=1):
        np.testing.assert_array_equal(draw(), draw(layer=1))
    for mask in masks:
        assert set(np.unique(mask)) == {0.0, 2.0}
        assert abs(mask.mean() - 1) < 4 / 40


def test_masks_are_independent():
    """Masks of two paths agree in half of their places, as coins do."""
    x = jnp.ones((100, 100))
    with _scope.scope(key=KEY):
        one, two = (np.asarray(_scope.dropout(x, 0.5, path)) != 0 for path in ("a", "b"))
    assert abs((one == two).mean() - 0.5) < 4 * 0.5 / 100


def test_dropout_keeps_the_dtype_and_without_key_or_rate_the_array():
    x = jnp.ones((8, 8), jnp.bfloat16)
    assert _scope.dropout(x, 0.5, "a") is x
    with _scope.scope(key=KEY):
        assert _scope.dropout(x, 0.0, "a") is x
        assert _scope.dropout(x, 0.5, "a").dtype == jnp.bfloat16
