# SPDX-License-Identifier: Apache-2.0
"""A small model of two stacked layers, under names that the zoo's rules know, of any width."""

import jax.numpy as jnp
from flax import nnx

from jpeft._stack import scan, stack


class Mlp(nnx.Module):
    """Two stacked layers under names that the zoo has too."""

    def __init__(self, d_model: int, d_ff: int, *, rngs: nnx.Rngs):
        self.up_proj = nnx.Linear(d_model, d_ff, rngs=rngs)
        self.down_proj = nnx.Linear(d_ff, d_model, rngs=rngs)

    def __call__(self, x):
        return x + self.down_proj(jnp.tanh(self.up_proj(x)))


class Toy(nnx.Module):
    def __init__(self, d_model: int = 16, d_ff: int = 32, *, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(24, d_model, rngs=rngs)
        self.layers = stack(lambda r: Mlp(d_model, d_ff, rngs=r), 2, rngs)
        self.norm = nnx.LayerNorm(d_model, rngs=rngs)

    def __call__(self, ids):
        x, _ = scan(self.layers, lambda layer, x, _: (layer(x), None), self.embed_tokens(ids))
        return self.embed_tokens.attend(self.norm(x))
