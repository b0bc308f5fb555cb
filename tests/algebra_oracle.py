# SPDX-License-Identifier: Apache-2.0
"""LoRAs of several kinds on one small base, and what they change there by formula, in float64."""

import functools
import math
from typing import Any

import jax
import numpy as np
import subjects
from contracts.table import QUICK
from flax import nnx

import jpeft

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(5), (5, 8))
LAYERS, PROJECTIONS = 3, ("up", "down")

#: Rank and alpha of every LoRA: by layer and projection; and what divides alpha.
SPECS = (
    ({}, lambda layer, name: (4, 8), lambda rank: rank),
    ({"rslora": True, "bias": "lora_only"}, lambda layer, name: (6, 5), math.sqrt),
    (
        {"rank_pattern": {r".*\.1\..*": 5}, "alpha_pattern": {".*up": 7}, "init": "pissa"},
        lambda layer, name: (5 if layer == 1 else 2, 7 if name == "up" else 3),
        lambda rank: rank,
    ),
)
WEIGHTS = (0.7, -0.4, 1.5)


@functools.cache
def base(stacked=True):
    return (subjects.Stacked if stacked else subjects.ListOfLayers)(8, LAYERS, nnx.Rngs(0))


@functools.cache
def adapted(i, stacked=True):
    options, sizes, _ = SPECS[i]
    rank, alpha = sizes(0, "down")
    method = jpeft.LoRA(rank=rank, alpha=alpha, targets=PROJECTIONS, **options)
    return subjects.fill(jpeft.adapt(base(stacked), method, key=jax.random.key(i)), i)


@functools.cache
def delta(i):
    """What an adapter changes, by (layer, projection, leaf), from its leaves."""
    _, sizes, root = SPECS[i]
    flat, found = subjects.as64(subjects.leaves(adapted(i))), {}
    for layer in range(LAYERS):
        for name in PROJECTIONS:
            rank, alpha = sizes(layer, name)
            leaf: Any = {k: flat.get(f"blocks/{name}/adapters/lora/{k}") for k in ("A", "B", "A0", "B0", "saved/bias")}
            dw = leaf["A"][layer][:, :rank] @ leaf["B"][layer][:rank]
            if leaf["A0"] is not None:
                dw = dw - leaf["A0"][layer][:, :rank] @ leaf["B0"][layer][:rank]
            found[layer, name, "kernel"] = alpha / root(rank) * dw
            if leaf["saved/bias"] is not None:
                found[layer, name, "bias"] = leaf["saved/bias"][layer] - flat[f"blocks/{name}/bias"][layer]
    return found


def changed(model, name="lora"):
    """The same of a result: a LoRA with a scale of 1, and copies of biases."""
    flat, found = subjects.as64(subjects.leaves(model)), {}
    for layer in range(LAYERS):
        for name_ in PROJECTIONS:
            at = f"blocks/{name_}/adapters/{name}"
            found[layer, name_, "kernel"] = flat[f"{at}/A"][layer] @ flat[f"{at}/B"][layer]
            if f"{at}/saved/bias" in flat:
                found[layer, name_, "bias"] = flat[f"{at}/saved/bias"][layer] - flat[f"blocks/{name_}/bias"][layer]
    return found


def pairs(weights=WEIGHTS):
    return [(adapted(i), weight) for i, weight in enumerate(weights)]


def check(model, expected, tolerance=subjects.MERGED):
    """The leaves, and the outputs, against the numbers of `expected`."""
    found = changed(model)
    assert found.keys() == expected.keys()
    for at in expected:
        assert subjects.error(found[at], expected[at]) < tolerance, at
    flat, x = subjects.as64(subjects.leaves(base())), np.asarray(X, np.float64)

    def linear(layer, name, x):
        w, b = (
            flat[f"blocks/{name}/{leaf}"][layer] + expected.get((layer, name, leaf), 0.0) for leaf in ("kernel", "bias")
        )
        return x @ w + b

    for layer in range(LAYERS):
        x = x + linear(layer, "down", np.tanh(linear(layer, "up", x)))
    got = jax.jit(lambda x: model(x), compiler_options=QUICK)(X)
    assert subjects.error(got, x) < 10 * tolerance


def joined(values, function):
    """`function(arrays of all adapters)` at every place; zeros where an adapter changes nothing."""
    places = {at: value for found in values for at, value in found.items()}
    return {at: function([found.get(at, 0.0 * like) for found in values]) for at, like in places.items()}


def best(matrix, rank):
    u, s, v = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank]
