# SPDX-License-Identifier: Apache-2.0
"""Four adapters with four learning rates, trained at once on one base by `jax.vmap`, and another one for every row."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jpeft

base = nnx.Sequential(nnx.Linear(8, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 4, rngs=nnx.Rngs(1)))
adapted = jpeft.adapt(base, jpeft.LoRA(rank=4, alpha=8, targets=["layers.0", "layers.2"]), key=jax.random.key(0))
graphdef, trainable, frozen = jpeft.partition(adapted)

rates = jnp.array([1e-3, 3e-3, 1e-2, 3e-2])
bank = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(rates)), trainable)  # [4, ...] per leaf; the base once
x, y = jax.random.normal(jax.random.key(1), (64, 8)), jax.random.normal(jax.random.key(2), (64, 4))
adam = optax.scale_by_adam()


def step(trainable, state, rate):
    def loss(trainable):
        return jnp.mean((jpeft.combine(graphdef, trainable, frozen)(x) - y) ** 2)

    value, grads = jax.value_and_grad(loss)(trainable)
    updates, state = adam.update(grads, state)
    return jax.tree.map(lambda p, u: p - rate * u, trainable, updates), state, value


state = jax.vmap(adam.init)(bank)
steps = jax.jit(jax.vmap(step))
for _ in range(100):
    bank, state, losses = steps(bank, state, rates)
for rate, loss in zip(rates, losses, strict=True):
    print(f"rate {float(rate):.0e}: loss {float(loss):.3f}")

ids = jnp.arange(64) % 4  # row i is answered by adapter ids[i]
rows = jax.vmap(lambda i, row: jpeft.combine(graphdef, jax.tree.map(lambda leaf: leaf[i], bank), frozen)(row))(ids, x)
alone = jpeft.combine(graphdef, jax.tree.map(lambda leaf: leaf[2], bank), frozen)(x)
print(f"rows of adapter 2 differ from running it alone by {float(jnp.abs(rows - alone)[ids == 2].max()):.1e}")
