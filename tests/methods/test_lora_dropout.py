# SPDX-License-Identifier: Apache-2.0
"""LoRA's dropout: unbiased, of its own in every layer, and of the key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from flax import nnx

import jpeft
from jpeft._stack import REMAT_POLICIES, scan, stack

KEY = jax.random.key(0)


# Dropout.


class Echo(nnx.Module):
    """A stack whose layers all see the input; with factors of one and a kernel of zero, each gives back its mask."""

    def __init__(self, d, num_layers, remat="none", unroll=False):
        self.layers = stack(lambda r: nnx.Linear(d, d, use_bias=False, rngs=r), num_layers, nnx.Rngs(0))
        self.layers.kernel[...] *= 0.0
        self.remat, self.unroll = remat, unroll

    def __call__(self, x):
        body = lambda layer, x, _: (x, layer(x))  # noqa: E731
        return scan(self.layers, body, x, remat_policy=self.remat, unroll=self.unroll)[1]


class EchoByVmap(Echo):
    """The same, run by jax.vmap."""

    def __init__(self, d, num_layers):
        self.layers = nnx.vmap(lambda r: nnx.Linear(d, d, use_bias=False, rngs=r))(nnx.Rngs(0).split(num_layers))
        self.layers.kernel[...] *= 0.0

    def __call__(self, x):
        return jax.vmap(lambda layer: layer(x))(self.layers)


def echo(model, rate, names=("lora",)):
    d = model.layers.kernel.shape[-1]
    for name in names:
        model = jpeft.adapt(model, jpeft.LoRA(rank=d, alpha=d, targets=["layers"], dropout=rate), key=KEY, name=name)
    graphdef, trainable, frozen = jpeft.partition(model)
    one = {p: jnp.broadcast_to(jnp.eye(d), v.shape) for p, v in trainable.items()}
    return jpeft.combine(graphdef, one, frozen)


def dropped(model, x, key):
    with jpeft.dropout_key(key):
        return np.asarray(model(x))


def test_dropout_is_unbiased_and_scales_what_it_keeps():
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (50, 40)).astype(np.float32))
    y = dropped(echo(Echo(40, 4), 0.3), x, jax.random.key(5))
    kept = y != 0
    scaled = np.broadcast_to(np.asarray(x, np.float64) / 0.7, y.shape)
    np.testing.assert_allclose(y[kept], scaled[kept], rtol=1e-6)
    assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.3 * 0.7 / kept.size)
    assert abs((y / np.asarray(x)).mean() - 1) < 0.02


def test_every_layer_draws_its_own_mask_however_the_stack_runs():
    x = jnp.ones((5, 20))
    key = jax.random.key(5)
    masks = dropped(echo(Echo(20, 3), 0.5), x, key)
    assert len({layer.tobytes() for layer in masks}) == 3
    for policy in REMAT_POLICIES:
        np.testing.assert_array_equal(dropped(echo(Echo(20, 3, remat=policy), 0.5), x, key), masks)
    np.testing.assert_array_equal(dropped(echo(Echo(20, 3, unroll=True), 0.5), x, key), masks)
    np.testing.assert_array_equal(dropped(echo(EchoByVmap(20, 3), 0.5), x, key), masks)
    jitted = jax.jit(lambda model, x, key: dropped_traced(model, x, key))
    np.testing.assert_array_equal(jitted(echo(Echo(20, 3), 0.5), x, key), masks)


def dropped_traced(model, x, key):
    with jpeft.dropout_key(key):
        return model(x)


def test_the_key_decides_the_mask():
    model, x = echo(Echo(20, 3), 0.5), jnp.ones((5, 20))
    first = dropped(model, x, jax.random.key(5))
    np.testing.assert_array_equal(dropped(model, x, jax.random.key(5)), first)
    assert (dropped(model, x, jax.random.key(6)) != first).any()
    np.testing.assert_array_equal(dropped(model, x, jax.random.PRNGKey(5)), first)
    np.testing.assert_array_equal(model(x), np.ones((3, 5, 20)))
    np.testing.assert_array_equal(dropped(echo(Echo(20, 3), 0.0), x, jax.random.key(5)), np.ones((3, 5, 20)))


def test_two_adapters_on_one_module_draw_masks_of_their_own():
    both = dropped(echo(Echo(20, 1), 0.5, ("lora", "second")), jnp.ones((5, 20)), jax.random.key(5))
    assert {0.0, 2.0, 4.0} == set(np.unique(both))


def test_a_layer_that_is_not_known_is_an_error():
    model, x = echo(Echo(4, 4), 0.5), jnp.ones((2, 4))

    def first_layer(model):
        layer = nnx.clone(model.layers)
        nnx.update(layer, jax.tree.map(lambda leaf: leaf[0], nnx.state(layer)))
        return layer

    first_layer(model)(x)  # without a key nothing depends on the layer
    with jpeft.dropout_key(KEY), pytest.raises(ValueError, match=r"layers differs .* where its layer is not known"):
        first_layer(model)(x)
    ranked = jpeft.adapt(
        Echo(4, 4), jpeft.LoRA(rank=2, targets=["layers"], rank_pattern={r"layers\.1": 1}, bias="lora_only"), key=KEY
    )
    with pytest.raises(ValueError, match=r"layers differs .* where its layer is not known"):
        first_layer(ranked)(x)


def test_integers_are_dropped_too():
    model = jpeft.adapt(nnx.Linear(40, 40, rngs=nnx.Rngs(0)), jpeft.LoRA(rank=4, targets=".*", dropout=0.5), key=KEY)
    model, x = subjects.fill(model), np.ones((3, 40), np.int32)
    assert (dropped(model, x, KEY) != np.asarray(model(x))).any()


def test_ids_of_an_embedding_are_not_dropped():
    model = jpeft.adapt(nnx.Embed(9, 4, rngs=nnx.Rngs(0)), jpeft.LoRA(rank=4, targets=".*", dropout=0.5), key=KEY)
    model, ids = subjects.fill(model), np.arange(9)
    np.testing.assert_array_equal(dropped(model, ids, KEY), model(ids))
