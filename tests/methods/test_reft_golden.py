# SPDX-License-Identifier: Apache-2.0
"""LoReFT, NoReFT and DiReFT against AdapterHub's `adapters` 1.3.0, whose results golden/make_reft.py saved.

Not copied from it: an R that one step with weight decay sets to zero; a second unit that is never used; positions
beyond a short text, in its padding; positions counted anew in every decoded token; a DiReFT that is loaded as NoReFT.
Where both ends want a token, there the last ones get it, here the nearer end.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import subjects
import trajectory
from contracts.table import QUICK

import jpeft

#: The whole tiny BERT in float32 and its gradients, against torch's sums in another order.
GOLDEN = 1e-5
#: Leaves after 20 updates, each of which starts from the last one's rounding.
TRAINED = 1e-4


@pytest.fixture(scope="module", name="golden")
def _golden():
    with np.load(Path(__file__).parents[1] / "golden" / "reft.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", name="base")
def _base(golden, tmp_path_factory):
    """The tiny BERT of golden/make_reft.py."""
    folder = tmp_path_factory.mktemp("bert")
    weights = {name.removeprefix("base/"): value for name, value in golden.items() if name.startswith("base/")}
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **json.loads(str(golden["config"]))}))
    return jpeft.models.load(folder, "FEATURE_EXTRACTION")


def method_of(golden, i):
    """(the case's method, the layers that it acts in)."""
    case = json.loads(str(golden[f"{i}/case"]))
    case["layers"] = case.get("layers", [0, 1])
    case.pop("trained", None)
    return getattr(jpeft, case.pop("method"))(**case), case["layers"]


def laid(array, path, shape, layers):
    """The library's array as a leaf of jpeft, zero in the other layers."""
    found = np.zeros(shape, np.float32)
    found[layers] = array if path.endswith("b") else np.swapaxes(array, -1, -2)
    return jnp.asarray(found)


@pytest.mark.parametrize("i", range(7))
def test_outputs_and_gradients_are_those_of_adapters(golden, base, i):
    method, layers = method_of(golden, i)
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(base, method, key=jax.random.key(0)))
    leaves, expected = {}, {}
    for path, value in trainable.items():
        given, slope = golden[f"{i}/{path[-1]}"], golden[f"{i}/gradient of {path[-1]}"]
        if isinstance(method, jpeft.LoReFT) and path.endswith("R"):
            slope = on_the_manifold(given, slope)
        leaves[path], expected[path] = (laid(a, path, value.shape, layers) for a in (given, slope))
    ids, mask = golden["ids"], golden["mask"]
    rows = mask.sum(1) >= (0 if method.tied else method.first + method.last)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(trainable):
        out = jpeft.combine(graphdef, trainable, frozen)(ids, mask)
        sines = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (sines * jnp.tanh(out))[mask == 1].sum(), out

    (_, states), gradients = jax.jit(loss, compiler_options=QUICK)(leaves)
    seen = (mask == 1) & rows[:, None]
    assert subjects.error(states[seen], golden[f"{i}/states"][seen]) < GOLDEN
    overlap = (mask == 1) & ~rows[:, None]
    if overlap.any():  # there the last ones win
        assert subjects.error(states[overlap], golden[f"{i}/states"][overlap]) > 0.01
        return
    for path, gradient in gradients.items():
        assert subjects.error(gradient, expected[path]) < GOLDEN, path


def on_the_manifold(r, slope):
    """The gradient of a function of Q, given that of R as if it were free, at a matrix that is R itself.

    There a change m of the matrix M = Q T moves Q by the part of m outside of Q's columns, and in their span by the
    skew matrix whose lower triangle is that of Qᵀ m.
    """
    q, g = (np.swapaxes(a, -1, -2).astype(np.float64) for a in (r, slope))
    inside = np.swapaxes(q, -1, -2) @ g
    return np.swapaxes(g - q @ inside + q @ np.tril(inside - np.swapaxes(inside, -1, -2), -1), -1, -2)


@pytest.mark.parametrize("i", [1, 4, 5, 6])
def test_a_training_is_that_of_adapters(golden, base, i):
    """20 updates by AdamW, each loss and the leaves after the last one; with LoReFT's R held, as golden says why."""
    method, layers = method_of(golden, i)
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(base, method, key=jax.random.key(0)))
    given = {path: laid(golden[f"{i}/{path[-1]}"], path, value.shape, layers) for path, value in trainable.items()}
    batch = {"input_ids": golden["ids"], "attention_mask": golden["mask"], "labels": golden["mask"]}
    turned = {name: value[:, ::-1] for name, value in batch.items()}
    selectors = ("**/W", "**/b") if isinstance(method, jpeft.LoReFT) else ()
    model = jpeft.combine(graphdef, given, frozen)
    rate = trajectory.golden_rate(golden["training"])
    losses, trained = trajectory.train(model, [batch, turned], rate, *selectors, sums=squares)
    expected = golden[f"{i}/losses"]
    assert expected[-2:].mean() < 0.9 * expected[:2].mean()
    np.testing.assert_allclose(losses, expected, rtol=GOLDEN)
    for path, value in trained.items():
        theirs = laid(golden[f"{i}/trained {path[-1]}"], path, value.shape, layers)
        assert subjects.error(value, theirs) < TRAINED, path


def squares(model, batch, key, groups):
    """Sum over the tokens of (sines - states)², and the number of its terms."""
    del key, groups
    out = model(batch["input_ids"], batch["attention_mask"])
    sines = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    seen = jnp.broadcast_to(batch["labels"][..., None] == 1, out.shape)
    return jnp.square(jnp.where(seen, out - sines, 0)).sum(), seen.sum().astype(jnp.float32)
