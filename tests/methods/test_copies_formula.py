# SPDX-License-Identifier: Apache-2.0
"""Trained copies against float64 formulas: outputs, gradients and merges, in stacks and lists of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from flax import nnx

import jpeft
from jpeft._stack import scan, stack
from jpeft.models._layer_norm import LayerNorm

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((2, 3, 5))


class NormBlock(nnx.Module):
    """`x + down(tanh(norm(x)))`."""

    def __init__(self, rngs):
        self.norm = LayerNorm(5, 1e-5, dtype=jnp.float32)
        self.down = nnx.Linear(5, 5, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.norm(jnp.asarray(x))))


class NormStack(nnx.Module):
    """Three of them, scanned by jpeft."""

    def __init__(self, d, num_layers, rngs):
        self.blocks = stack(NormBlock, num_layers, rngs)

    def __call__(self, x):
        return scan(self.blocks, lambda block, x, _: (block(x), None), x)[0]


class NormList(nnx.Module):
    """Three of them in a list."""

    def __init__(self, d, num_layers, rngs):
        self.blocks = nnx.List([NormBlock(rngs) for _ in range(num_layers)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


#: method, whether it trains the leaf of a module in a layer
METHODS = {
    "bitfit": (jpeft.BitFit(), lambda i, module, leaf: leaf == "bias"),
    "bitfit of some": (
        jpeft.BitFit(layers=[0, 2], exclude=["2.down"]),
        lambda i, module, leaf: leaf == "bias" and i != 1 and (i, module) != (2, "down"),
    ),
    "full": (jpeft.FullFineTune(), lambda i, module, leaf: True),
    "full of some": (
        jpeft.FullFineTune(targets=["down"], layers=[1]),
        lambda i, module, leaf: (i, module) == (1, "down"),
    ),
    "last": (
        jpeft.LastLayers(2, final=(), exclude=["2.down"]),
        lambda i, module, leaf: i > 0 and (i, module) != (2, "down"),
    ),
    "norms": (jpeft.NormTuning(layers=[0, 1]), lambda i, module, leaf: module == "norm" and i < 2),
}
BLOCKS = (subjects.Stacked, subjects.ListOfLayers, subjects.Vmapped)
CASES = [(name, build) for name in METHODS for build in (NormStack, NormList, *(BLOCKS if name != "norms" else ()))]


def leaf_of(flat, which, layer, module, leaf):
    """A leaf of a layer, the base's or its copy, in a stack or in a list."""
    trained = which(layer, module, leaf)
    for at, index in ((f"blocks/{layer}/{module}", ...), (f"blocks/{module}", layer)):
        if f"{at}/{leaf}" in flat:
            own = next((p for p in flat if trained and p.startswith(f"{at}/adapters") and p.endswith("/" + leaf)), None)
            assert (own is not None) == trained
            return flat[own or f"{at}/{leaf}"][index]
    raise AssertionError(f"no {module}/{leaf}")


def formula(flat, which, x):
    """Three blocks in NumPy."""
    normed = any("/norm/" in path for path in flat)
    for i in range(3):
        kernel, bias = (leaf_of(flat, which, i, "down", leaf) for leaf in ("kernel", "bias"))
        if normed:
            scale, shift = (leaf_of(flat, which, i, "norm", leaf) for leaf in ("scale", "bias"))
            centred = x - x.mean(-1, keepdims=True)
            h = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift
        else:
            up, up_bias = (leaf_of(flat, which, i, "up", leaf) for leaf in ("kernel", "bias"))
            h = x @ up + up_bias
        x = x + np.tanh(h) @ kernel + bias
    return x


@pytest.mark.parametrize("name, build", CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_copies_are_the_formula_in_float64(name, build):
    method, which = METHODS[name]
    with jax.enable_x64(True):
        model = subjects.in_float64(subjects.fill(jpeft.adapt(build(5, 3, nnx.Rngs(0)), method, key=KEY)))
        graphdef, trainable, frozen = jpeft.partition(model)
        flat = subjects.as64(subjects.leaves(model))
        expected = formula(flat, which, X)
        assert subjects.error(model(X), expected) < subjects.FLOAT64
        assert subjects.error(jpeft.merge(model)(X), expected) < subjects.FLOAT64
        run = jax.jit(jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(X) ** 2).sum()))
        gradients = run(trainable)
        exact = subjects.complex_step(
            lambda own: (formula({**flat, **own}, which, X) ** 2).sum(), {path: flat[path] for path in trainable}
        )
        for path, value in exact.items():
            assert subjects.error(gradients[path], value) < 1e3 * subjects.FLOAT64, path
