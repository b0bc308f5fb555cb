# SPDX-License-Identifier: Apache-2.0
"""LoRA on a model that nobody wrote for jpeft: stacked layers, remat, and a projection type of its own."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jpeft


class Dense(nnx.Module):
    """A projection that jpeft does not know yet."""

    def __init__(self, d_in: int, d_out: int, rngs: nnx.Rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (d_in, d_out)) * d_in**-0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w[...]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = Dense(32, 16, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.vmap(Block)(rngs.split(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda x, block: (block(x), None))
        return jax.lax.scan(body, x, self.blocks)[0]


jpeft.register(Dense, jpeft.seams.Matmul(kernel="w", bias=None))

model = Model(nnx.Rngs(0))
for site in jpeft.sites(model):
    print(site.path, site.type, site.lead, site.d_in, site.d_out)

model = jpeft.adapt(model, jpeft.LoRA(rank=4, alpha=8, targets=["up", "down"]), key=jax.random.key(0))
print(jpeft.summary(model))
graphdef, trainable, frozen = jpeft.partition(model)
tx = jpeft.optimizer(optax.adam(1e-2))
state = tx.init(trainable)
x, y = jax.random.normal(jax.random.key(1), (2, 8, 16))


@jax.jit
def step(trainable, state):
    def loss(trainable):
        return jnp.mean((jpeft.combine(graphdef, trainable, frozen)(x) - y) ** 2)

    value, grads = jax.value_and_grad(loss)(trainable)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, value


losses = []
for _ in range(50):
    trainable, state, value = step(trainable, state)
    losses.append(float(value))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]

tuned = jpeft.combine(graphdef, trainable, frozen)
merged = jpeft.merge(tuned)
print(f"merged, the outputs differ by {float(jnp.abs(merged(x) - tuned(x)).max()):.1e}")
print(f"and the projection is a plain {type(merged.blocks.up).__name__} again")
