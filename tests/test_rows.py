# SPDX-License-Identifier: Apache-2.0
"""Products with what all rows share, against the plain ones and float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import _rows
from jpeft._scope import scope


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (2, 3, 5)], ids=str)
def test_a_product_with_a_table_and_its_gradients_are_the_formula(lead):
    rng = np.random.default_rng(0)
    rows, table, weights = rng.normal(size=(*lead, 6)), rng.normal(size=(11, 6)), rng.normal(size=(*lead, 11))

    def loss(rows, table):
        return (_rows.against_table(rows, table) * weights.astype(np.float32)).sum()

    given = rows.astype(np.float32), table.astype(np.float32)
    np.testing.assert_allclose(jax.jit(_rows.against_table)(*given), rows @ table.T, rtol=1e-5, atol=1e-5)
    of_rows, of_table = jax.jit(jax.grad(loss, (0, 1)))(*given)
    np.testing.assert_allclose(of_rows, weights @ table, rtol=1e-5, atol=1e-5)
    expected = weights.reshape(-1, 11).T @ rows.reshape(-1, 6)
    np.testing.assert_allclose(of_table, expected, rtol=1e-5, atol=1e-5)


def test_a_product_with_a_table_is_the_plain_one_elsewhere():
    rows, table = jnp.ones((2, 3)), jnp.ones((4, 3))
    with scope(platform="tpu"):
        elsewhere = str(jax.make_jaxpr(_rows.against_table)(rows, table))
    assert "optimization_barrier" not in elsewhere
    assert "optimization_barrier" in str(jax.make_jaxpr(_rows.against_table)(rows, table))


def test_a_product_with_many_tables_maps_over_them():
    rng = np.random.default_rng(1)
    rows, tables = rng.normal(size=(3, 2, 6)), rng.normal(size=(3, 5, 6))
    given = rows.astype(np.float32), tables.astype(np.float32)
    found = jax.vmap(_rows.against_table)(*given)
    np.testing.assert_allclose(found, np.einsum("brd,bcd->brc", rows, tables), rtol=1e-5, atol=1e-5)
    grads = jax.vmap(jax.grad(lambda r, t: (_rows.against_table(r, t) ** 2).sum(), (0, 1)))(*given)
    twice = 2 * np.einsum("brd,bcd->brc", rows, tables)
    np.testing.assert_allclose(grads[0], np.einsum("brc,bcd->brd", twice, tables), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads[1], np.einsum("brc,brd->bcd", twice, rows), rtol=1e-4, atol=1e-4)
