# SPDX-License-Identifier: Apache-2.0
"""Convolutions as products: values and gradients of torch's, for every shape that the zoo has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jpeft.models._windows import Windows

#: (places, window, step, padding), patches that leave a rest over and windows that slide.
SHAPES = [
    ((8, 12), (4, 4), (4, 4), "VALID"),
    ((9, 7), (4, 2), (4, 2), "VALID"),
    ((10,), (3,), (1,), ((1, 1),)),
    ((10,), (3,), (2,), ((1, 1),)),
    ((11,), (3,), (2,), ((1, 1),)),
    ((11,), (5,), (3,), ((2, 1),)),
]
#: Of float64 sums of up to 96 products.
EXACT = 1e-13


@pytest.mark.parametrize(("places", "window", "step", "padding"), SHAPES)
def test_values_and_gradients_are_those_of_torch(places, window, step, padding):
    rng, axes = np.random.default_rng(0), len(places)
    with jax.enable_x64(True):
        conv = Windows(
            3, 5, window, strides=step, padding=padding, param_dtype=jnp.float64, dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        conv.bias = nnx.Param(jnp.asarray(rng.standard_normal(5)))
        x = rng.standard_normal((2, *places, 3))
        graphdef, state = nnx.split(conv)
        weights = rng.standard_normal(conv(x).shape)

        def loss(state, x):
            return (nnx.merge(graphdef, state)(x) * weights).sum()

        value, (by_state, by_x) = jax.value_and_grad(loss, (0, 1))(state, jnp.asarray(x))
        kernel, bias = (np.asarray(state[name][...]) for name in ("kernel", "bias"))

    theirs = [torch.tensor(np.moveaxis(x, -1, 1).copy(), requires_grad=True)]
    theirs.append(torch.tensor(np.moveaxis(kernel, (-1, -2), (0, 1)).copy(), requires_grad=True))
    theirs.append(torch.tensor(bias.copy(), requires_grad=True))
    if padding != "VALID":
        padded = torch.nn.functional.pad(theirs[0], padding[0])
        said = torch.nn.functional.conv1d(padded, *theirs[1:], stride=step)
    else:
        said = torch.nn.functional.conv2d(theirs[0], *theirs[1:], stride=step)
    sum_ = (said * torch.tensor(np.moveaxis(weights, -1, 1).copy())).sum()
    sum_.backward()
    np.testing.assert_allclose(value, sum_.item(), rtol=EXACT * 10)
    given = [np.moveaxis(np.asarray(by_x), -1, 1), np.moveaxis(np.asarray(by_state["kernel"][...]), (-1, -2), (0, 1))]
    for ours, leaf in zip([*given, np.asarray(by_state["bias"][...])], theirs, strict=True):
        np.testing.assert_allclose(ours, leaf.grad.numpy(), atol=EXACT * 100)
    assert said.ndim == axes + 2
