# SPDX-License-Identifier: Apache-2.0
"""How an adapted model is run must not matter: jit, scan or unrolled, rematerialised, one adapter or many at once."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.table import IDS, QUICK
from flax import nnx

import jpeft
from jpeft._stack import REMAT_POLICIES

pytestmark = pytest.mark.costly

KEY = jax.random.key(9)
#: The same sums and their gradients in another order, in float32, through all layers; of the whole gradient's norm.
COMPILED = 1e-5


def assert_close(got, expected):
    assert subjects.error(got[0], expected[0]) < COMPILED
    whole = np.linalg.norm([np.linalg.norm(value) for value in expected[1].values()])
    for path, value in expected[1].items():
        assert np.linalg.norm(got[1][path] - value) <= COMPILED * whole, path


def with_options(model, **options):
    """`model` with other static attributes."""
    model = nnx.clone(model)
    for name, value in options.items():
        assert hasattr(model, name)
        setattr(model, name, value)
    return model


def test_jit_compiles_once_for_all_adapters_of_a_make(case):
    chex.clear_trace_counter()
    graphdef, *_ = jpeft.partition(case.fresh())
    step = jax.jit(chex.assert_max_traces(case.loss(graphdef), n=1), compiler_options=QUICK)
    for seed in range(3):
        again, trainable, frozen = jpeft.partition(subjects.fill(case.fresh(key=jax.random.key(seed)), seed))
        assert again == graphdef
        assert hash(again) == hash(graphdef)
        step(trainable, frozen, IDS, jax.random.key(seed))


def test_unrolled_is_scanned(case):
    if case.row.scans:
        unrolled = with_options(case.filled, unroll=True)
        assert_close(case.step(unrolled, IDS, KEY), case.step(case.filled, IDS, KEY))


SLOW = [pytest.param(policy, marks=pytest.mark.slow) for policy in REMAT_POLICIES if policy not in ("none", "full")]


@pytest.mark.parametrize("policy", ["full", *SLOW])
def test_rematerialising_changes_nothing(case, policy):
    if case.row.scans:
        again = with_options(case.filled, remat=policy)
        assert_close(case.step(again, IDS, KEY), case.step(case.filled, IDS, KEY))


def test_many_adapters_at_once_are_one_at_a_time(case):
    graphdef, trainable, frozen = jpeft.partition(case.filled)
    factors = jnp.array([0.5, 1.0, -2.0])
    many = {path: factors.reshape(-1, *(1,) * value.ndim) * value[None] for path, value in trainable.items()}
    together = jax.jit(jax.vmap(jax.value_and_grad(case.loss(graphdef)), (0, None, None, None)), compiler_options=QUICK)
    got = together(many, frozen, IDS, KEY)
    for i, factor in enumerate(factors):
        one = jpeft.combine(graphdef, {path: factor * value for path, value in trainable.items()}, frozen)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], got), case.step(one, IDS, KEY))


def test_an_adapter_per_example_is_one_at_a_time(case):
    graphdef, trainable, frozen = jpeft.partition(case.filled)
    bank = {path: jnp.stack([0.5 * value, value, -value]) for path, value in trainable.items()}

    def one(i, ids):
        model = jpeft.combine(graphdef, {path: value[i] for path, value in bank.items()}, frozen)
        return case.row.run(model, ids[None])[0]

    which = jnp.array([2, 0, 1])
    mixed = jax.jit(jax.vmap(one), compiler_options=QUICK)(which, IDS)
    for row, i in enumerate(which):
        model = jpeft.combine(graphdef, {path: value[i] for path, value in bank.items()}, frozen)
        assert subjects.error(mixed[row], case.run(model, IDS)[row]) < COMPILED


def test_a_bank_gives_every_row_its_own_adapter(case):
    """Of two adapters and none, in every order; the row without one is the base's."""
    models = [case.base, case.filled, subjects.fill(case.fresh(), seed=1, scale=0.2)]
    alone, bank = [case.run(model, IDS) for model in models], jpeft.bank(models[1:])
    run = jax.jit(lambda bank, which: jpeft.apply_bank(bank, which, case.row.run, IDS), compiler_options=QUICK)
    base = run(bank, np.zeros(3, int))
    for which in itertools.permutations(range(3)):
        mixed = run(bank, np.array(which))
        for row, i in enumerate(which):
            assert subjects.error(mixed[row], alone[i][row]) < COMPILED, (which, row)
        empty = which.index(0)
        np.testing.assert_array_equal(mixed[empty], base[empty])
    assert subjects.error(base[1], alone[1][1]) > 1e-3


def test_dropout_is_a_function_of_its_key(case):
    one, same, other = (case.step(case.filled, IDS, jax.random.key(seed))[0] for seed in (1, 1, 2))
    assert one == same
    assert (one != other) == ("dropout" in case.method)
