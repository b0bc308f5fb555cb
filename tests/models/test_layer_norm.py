# SPDX-License-Identifier: Apache-2.0
"""Layer norm against torch's, with all three gradients, in float64; and its dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jpeft.models._layer_norm import LayerNorm

#: float32 at unit scale, over rows of 37.
ATOL = 1e-6


def _torch(x, scale, bias, eps, weights):
    tensors = [torch.tensor(np.asarray(value), dtype=torch.float64, requires_grad=True) for value in (x, scale, bias)]
    y = torch.nn.functional.layer_norm(tensors[0], scale.shape, tensors[1], tensors[2], eps)
    (y * torch.tensor(np.asarray(weights))).sum().backward()
    return y.detach().numpy(), [tensor.grad.numpy() for tensor in tensors]


def test_values_and_gradients_are_torchs():
    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal((2, 5, 37)).astype(np.float32) for _ in range(2))
    x = 3 * x + 2
    scale, bias = rng.standard_normal((2, 37)).astype(np.float32)
    weights /= 4  # gradients of unit size
    for eps in (1e-12, 0.5):

        def loss(x, scale, bias, eps=eps):
            norm = LayerNorm(37, eps, dtype=jnp.float32)
            norm.scale.set_value(scale)
            norm.bias.set_value(bias)
            y = norm(x)
            return jnp.sum(y * weights), y

        gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)
        expected, expected_gradients = _torch(x, scale, bias, eps, weights)
        np.testing.assert_allclose(y, expected, atol=ATOL, rtol=0)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(gradient, expected_gradient, atol=ATOL, rtol=0)


def test_bfloat16_is_normalised_in_float32():
    """The mean of 1024 numbers near 100 needs more than 8 bits."""
    x = jnp.asarray(100 + np.random.default_rng(0).standard_normal((3, 1024)), jnp.bfloat16)
    y = LayerNorm(1024, 1e-6, dtype=jnp.bfloat16)(x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=2**-6, rtol=2**-8)


def test_unused_gradients_cost_nothing():
    """With frozen scale and bias, the backward pass keeps the normalised input and one number a row."""
    norm = LayerNorm(8, 1e-6, dtype=jnp.float32)
    _, pull = jax.vjp(norm, jnp.ones((3, 8)))
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) <= 3 * 8 + 3 + 8
