# SPDX-License-Identifier: Apache-2.0
"""What a step trains: every trainable leaf, by its exact gradient, and nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import subjects
from contracts.table import CASES, IDS, KEY

import jpeft


def test_three_steps_change_the_trainable_leaves_alone(case):
    graphdef, trainable, frozen = jpeft.partition(case.fresh())
    before = {path: np.array(value) for path, value in {**trainable, **frozen}.items()}
    tx = jpeft.optimizer(optax.adamw(1e-2, weight_decay=0.1))
    state = tx.init(trainable)
    for i in range(3):
        model = jpeft.combine(graphdef, trainable, frozen)
        updates, state = tx.update(case.step(model, IDS, jax.random.key(i))[1], state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    model = jpeft.combine(graphdef, trainable, frozen)
    _, after, still = jpeft.partition(model)
    for path, value in still.items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    assert all((np.asarray(value) != before[path]).any() for path, value in after.items())
    np.testing.assert_array_equal(case.run(jpeft.strip(model), IDS), case.run(case.base, IDS))
    assert subjects.error(case.run(model, IDS), case.run(case.base, IDS)) > 1e-4


def test_every_trainable_leaf_has_a_gradient(case):
    """Under one of a few keys: a method may leave a whole module out under another."""
    steps = [case.step(case.filled, IDS, key)[1] for key in jax.random.split(KEY, 4)]
    for path, value in jpeft.partition(case.filled)[1].items():
        gradients = [step[path] for step in steps]
        assert {(gradient.shape, gradient.dtype) for gradient in gradients} == {(value.shape, jnp.dtype("float32"))}
        assert np.isfinite(gradients).all(), path
        assert np.any(gradients), path


@pytest.mark.costly
def test_a_step_with_weight_decay_is_adamws(case):
    """p - rate * (g / (|g| + eps) + decay * p), with a gradient and moments of the trainable tree alone."""
    _, trainable, _ = jpeft.partition(case.filled)
    _, gradients = case.step(case.filled, IDS, KEY)
    tx = jpeft.optimizer(optax.adamw(0.01, eps=1e-8, weight_decay=0.5))
    state = tx.init(trainable)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state)) - 1
    assert moments == 2 * sum(value.size for value in trainable.values())
    updates, _ = tx.update(gradients, state, trainable)
    after: Any = optax.apply_updates(trainable, updates)
    for path, value in after.items():
        p, g = (np.asarray(tree[path], np.float64) for tree in (trainable, gradients))
        expected = p - 0.01 * (g / (np.abs(g) + 1e-8) + 0.5 * p)
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6, err_msg=path)


FOREIGN = [case for case in CASES if case.model == "foreign" and case.line.exact]


@pytest.mark.parametrize("double", FOREIGN, ids=lambda case: case.method)
def test_gradients_are_finite_differences(double):
    """In float64, leaf by leaf, along a random direction, to the fourth order of the step."""
    with jax.enable_x64(True):
        model = subjects.in_float64(double.filled)
        graphdef, trainable, frozen = jpeft.partition(model)
        _, gradients = double.step(model, IDS, KEY)
        rng = np.random.default_rng(3)
        for path, value in trainable.items():
            direction = rng.standard_normal(value.shape)
            at = [
                float(double.step(jpeft.combine(graphdef, {**trainable, path: moved}, frozen), IDS, KEY)[0])
                for moved in (value + 1e-4 * n * direction for n in (-2, -1, 1, 2))
            ]
            slope = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / 12e-4
            assert abs(slope - float((gradients[path] * direction).sum())) < 1e-8 * max(1.0, abs(slope)), path
