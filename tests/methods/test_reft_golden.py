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
from contracts.table import QUICK

import jpeft

#: The whole tiny BERT in float32 and its gradients, against torch's sums in another order.
GOLDEN = 1e-5


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


@pytest.mark.parametrize("i", range(7))
def test_outputs_and_gradients_are_those_of_adapters(golden, base, i):
    case = json.loads(str(golden[f"{i}/case"]))
    case["layers"] = layers = case.get("layers", [0, 1])
    method = getattr(jpeft, case.pop("method"))(**case)
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(base, method, key=jax.random.key(0)))
    leaves, expected = {}, {}
    for path, value in trainable.items():
        given, slope = golden[f"{i}/{path[-1]}"], golden[f"{i}/gradient of {path[-1]}"]
        if isinstance(method, jpeft.LoReFT) and path.endswith("R"):
            slope = on_the_manifold(given, slope)
        given, slope = (np.swapaxes(a, -1, -2) if path[-1] != "b" else a for a in (given, slope))
        leaves[path] = jnp.zeros_like(value).at[np.array(layers)].set(given)
        expected[path] = np.zeros(value.shape)
        expected[path][layers] = slope
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
