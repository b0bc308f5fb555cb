# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in a layer's MLP: a router, and gated MLPs of which each token passes through a few.

Axes: batch, seq, tokens (batch · seq), experts, top (num_experts_per_tok), d_model (hidden_size), d_ff.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .._scope import current, fold_path, platform, scope
from .._stream import on_mesh
from .._wide import widened
from ..seams import Grouped, by_expert, register
from ._layers import gated


class ExpertLinear(nnx.Module):
    """One projection of all experts, `[experts, d_in, d_out]`, without biases; rows come and go as of `by_expert`."""

    def __init__(self, experts: int, d_in: int, d_out: int, std: float, *, rngs: nnx.Rngs, dtype: Any):
        init = nnx.initializers.normal(std)
        self.kernel = nnx.Param(init(rngs.params(), (experts, d_in, d_out), dtype))

    def __call__(self, rows: Float[Array, "*rows d_in"]) -> Float[Array, "*rows d_out"]:
        return by_expert(rows, self.kernel[...])


register(ExpertLinear, Grouped())


class Experts(nnx.Module):
    """w2(act(w1(x)) · w3(x)) by each of a token's experts, summed with the router's weights; no token is dropped.

    Tokens are sorted by expert, and each meets its own alone. On a mesh of CPU devices every expert computes every
    token, and those that were not chosen weigh 0: blocks of rows would be gathered there one after another.
    """

    def __init__(
        self, experts: int, d_model: int, d_ff: int, activation: str, std: float, *, rngs: nnx.Rngs, dtype: Any
    ):
        self.experts, self.activation = experts, activation
        self.w1 = ExpertLinear(experts, d_model, d_ff, std, rngs=rngs, dtype=dtype)
        self.w2 = ExpertLinear(experts, d_ff, d_model, std, rngs=rngs, dtype=dtype)
        self.w3 = ExpertLinear(experts, d_model, d_ff, std, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "tokens d_model"],
        chosen: Int[Array, "tokens top"],
        weights: Float[Array, "tokens top"],
    ) -> Float[Array, "tokens d_model"]:
        each = self._sorted if sorts(x) else self._all
        return each(x, chosen, weights).astype(x.dtype)

    def _all(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        share = (jax.nn.one_hot(chosen, self.experts) * weights[..., None]).sum(1)  # [tokens, experts]
        y = self._mlp(jnp.broadcast_to(x, (self.experts, *x.shape)))
        return jnp.einsum("eto,te->to", y.astype(share.dtype), share)

    def _sorted(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        tokens, top = chosen.shape
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        with scope(groups=jnp.bincount(chosen.reshape(-1), length=self.experts)):
            y = self._mlp(x[order // top])
        y = y[jnp.argsort(order)].reshape(tokens, top, -1)
        return (y.astype(weights.dtype) * weights[..., None]).sum(1)

    def _mlp(self, rows: jax.Array) -> jax.Array:
        return self.w2(gated(self.activation, self.w1(rows), self.w3(rows)))


def sorts(x: jax.Array) -> bool:
    """Whether tokens are sorted by expert: where a token's own experts are computed alone."""
    return platform() != "cpu" or not on_mesh(x)


class SparseMoe(nnx.Module):
    """The router's softmax over all experts, of which a token's largest count, made to sum to 1; and the experts.

    Args:
      top: how many experts a token has.
      jitter: in training the input is multiplied with numbers in 1 ± jitter.
    """

    def __init__(self, gate: nnx.Linear, experts: Experts, top: int, jitter: float):
        self.gate, self.experts, self.top, self.jitter = gate, experts, top, jitter

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        x = _jittered(x, self.jitter)
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = jax.lax.top_k(jax.nn.softmax(widened(self.gate(tokens))), self.top)
        return self.experts(tokens, chosen, weights / weights.sum(-1, keepdims=True)).reshape(x.shape)


def _jittered(x: jax.Array, jitter: float) -> jax.Array:
    """`x` times numbers drawn uniformly from 1 ± jitter, where the running call has a key."""
    running = current()
    if jitter == 0 or running.key is None:
        return x
    key = fold_path(running.key, "layers/block_sparse_moe/jitter")
    key = key if running.layer is None else jax.random.fold_in(key, running.layer)
    return x * jax.random.uniform(key, x.shape, x.dtype, 1 - jitter, 1 + jitter)
