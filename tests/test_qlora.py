# SPDX-License-Identifier: Apache-2.0
"""QLoRA beside peft with bitsandbytes: the same codes, the same adapters, the same losses over twenty steps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft

HERE = Path(__file__).parent / "golden"
GOLDEN = np.load(HERE / "qlora.npz")


def test_losses_are_those_of_peft_with_bitsandbytes():
    model = jpeft.models.load(HERE / "stored" / "nf4")
    targets = ["q_proj", "v_proj", "down_proj"]
    model = jpeft.adapt(model, jpeft.LoRA(rank=4, alpha=8, targets=targets), key=jax.random.key(0))
    graphdef, trainable, frozen = jpeft.partition(model)
    trainable = {path: started(path) for path in trainable}
    tx = optax.adamw(float(GOLDEN["rate"]), weight_decay=0.0)

    @jax.jit
    def step(trainable, state, ids):
        def loss(trainable):
            logits = jpeft.combine(graphdef, trainable, frozen)(ids)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for ids in GOLDEN["ids"]:
        trainable, state, value = step(trainable, state, ids)
        losses.append(float(value))
    assert GOLDEN["losses"][-1] < GOLDEN["losses"][0] - 0.3
    assert np.abs(np.array(losses) - GOLDEN["losses"]).max() < 1e-3


def started(path: str) -> jax.Array:
    """A factor of both layers, `[2, d_in, rank]` or `[2, rank, d_out]`, as peft started it."""
    *module, _, _, leaf = path.split("/")
    name = f"{'.'.join(module[1:])}.lora_{leaf}.default.weight"
    return jnp.stack([GOLDEN[f"model.layers.{i}.{name}"].T for i in range(2)])
