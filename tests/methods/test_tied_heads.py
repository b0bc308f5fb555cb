# SPDX-License-Identifier: Apache-2.0
"""Adapters of a table that is the output head too: the head's logits against float64, and what is made for them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from flax import nnx
from jaxprs import equations

import jpeft

KEY = jax.random.key(0)
VOCAB, WIDTH = 96, 40


def lora(leaves: dict[str, np.ndarray]) -> np.ndarray:
    return 1.5 * leaves["A"] @ leaves["B"]


def loha(leaves: dict[str, np.ndarray]) -> np.ndarray:
    return 1.5 * (leaves["A1"] @ leaves["B1"]) * (leaves["A2"] @ leaves["B2"])


def wide_loha(leaves: dict[str, np.ndarray]) -> np.ndarray:
    return loha(leaves) / 1.5 * 3 / 8


def lokr(leaves: dict[str, np.ndarray]) -> np.ndarray:
    first = leaves["w1"] if "w1" in leaves else leaves["w1_in"] @ leaves["w1_out"]
    second = leaves["w2"] if "w2" in leaves else leaves["w2_in"] @ leaves["w2_out"]
    return 1.5 * np.kron(first, second)


def fourier(leaves: dict[str, np.ndarray]) -> np.ndarray:
    spectrum = np.zeros(VOCAB * WIDTH)
    spectrum[leaves["places"].astype(int)] = leaves["c"]
    return 7 * np.fft.ifft2(spectrum.reshape(VOCAB, WIDTH)).real


CASES: dict[str, tuple[jpeft.Method, Any]] = {
    "lora": (jpeft.LoRA(rank=2, alpha=3, targets=".*"), lora),
    "loha": (jpeft.LoHa(rank=2, alpha=3, targets=".*"), loha),
    "loha of many ranks": (jpeft.LoHa(rank=8, alpha=3, targets=".*"), wide_loha),
    "lokr": (jpeft.LoKr(rank=2, alpha=3, targets=".*"), lokr),
    "lokr of two products": (jpeft.LoKr(rank=2, alpha=3, targets=".*", decompose_both=True), lokr),
    "fourierft": (jpeft.FourierFT(n_frequency=30, scaling=7, targets=".*"), fourier),
}


def adapted(method: jpeft.Method, scale: float = 1.0) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """A table with an adapter, the table in float64, and the adapter's leaves likewise."""
    table = nnx.Embed(VOCAB, WIDTH, rngs=nnx.Rngs(0))
    table.embedding = nnx.Param(table.embedding[...] * scale)
    model = subjects.fill(jpeft.adapt(table, method, key=KEY))
    leaves = {path.rpartition("/")[2]: np.asarray(leaf, np.float64) for path, leaf in subjects.leaves(model).items()}
    return model, np.asarray(table.embedding[...], np.float64), leaves


def queries(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((*shape, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_their_gradients_are_the_formula(name):
    method, change = CASES[name]
    model, table, leaves = adapted(method)
    whole, x = table + change(leaves), queries(2, 3)
    assert subjects.error(whole, table) > 1e-3
    assert subjects.error(model.attend(x), np.float64(x) @ whole.T) < 5 * subjects.FLOAT32
    assert subjects.error(model.attend(x[0, 0]), np.float64(x[0, 0]) @ whole.T) < 5 * subjects.FLOAT32
    graphdef, trainable, frozen = jpeft.partition(model)

    def loss(t: Any, x: Any) -> jax.Array:
        return (jpeft.combine(graphdef, t, frozen).attend(x) ** 2).sum() / 2

    slopes, into = jax.jit(jax.grad(loss, (0, 1)))(trainable, x)
    assert subjects.error(into, np.float64(x) @ whole.T @ whole) < 10 * subjects.FLOAT32

    def formula(trained: dict[str, Any]) -> Any:
        w = table + change(leaves | {path.rpartition("/")[2]: value for path, value in trained.items()})
        return ((np.float64(x) @ w.T) ** 2).sum() / 2

    if name != "fourierft":  # whose transform takes a real part, which a complex step is lost in
        exact = subjects.complex_step(formula, subjects.as64(trainable))
    else:
        (path,) = trainable
        logits = np.einsum("abv,abd->vd", np.float64(x) @ whole.T, np.float64(x))
        exact = {path: np.array([(fourier(leaves | {"c": one}) * logits).sum() for one in np.eye(30)])}
    for path, expected in exact.items():
        assert subjects.error(slopes[path], expected) < 20 * subjects.FLOAT32, path


@pytest.mark.parametrize("name", CASES)
def test_a_small_change_is_not_lost_in_a_large_table(name):
    """Beside numbers of 1e4 a change of 1 has four digits in float32, but has all of them on its own."""
    method, change = CASES[name]
    model, table, leaves = adapted(method, scale=1e6)
    x = queries(2, 3)
    found = np.asarray(model.attend(x), np.float64) - np.asarray(jpeft.strip(model).attend(x), np.float64)
    rounding = 2**-23 * np.abs(np.float64(x) @ table.T).max()
    assert np.abs(found - np.float64(x) @ change(leaves).T).max() < rounding


@pytest.mark.parametrize("name", [name for name in CASES if "many" not in name])
def test_no_matrix_of_the_tables_size_is_made(name):
    graphdef, trainable, frozen = jpeft.partition(adapted(CASES[name][0])[0])

    def loss(t: Any, x: Any) -> jax.Array:
        return jpeft.combine(graphdef, t, frozen).attend(x).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(trainable, jnp.ones((2, WIDTH)))
    shapes = [out.aval.shape for equation in equations(jaxpr.jaxpr) for out in equation.outvars]
    made = [shape for shape in shapes if math.prod(shape) >= VOCAB * WIDTH]
    assert {*made} <= {(WIDTH, VOCAB), (VOCAB, WIDTH)}
    assert len(made) <= 1 + TURNED  # the table itself, turned for the product


#: The table turned for the product, and once more for its gradient.
TURNED = 1
