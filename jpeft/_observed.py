# SPDX-License-Identifier: Apache-2.0
"""What the places of a model read while it runs on some data, gathered by a gradient.

A method that computes nothing stands at every place, and has a leaf whose cotangent is what is to be known, whatever
the loss is: so the model runs as it always does, stacked, scanned and rematerialised, and the values of all layers come
out where a training's gradients would.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._partition import combine, partition

#: (model, batch) -> outputs.
Run = Callable[[Any, Any], Any]


@jax.custom_vjp
def watched(y: jax.Array, seen: jax.Array, leaf: jax.Array) -> jax.Array:
    """`y`; the cotangent of `leaf` is `seen`, of its shape."""
    return y


def _forward(y: jax.Array, seen: jax.Array, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, seen


def _backward(seen: jax.Array, ct: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return ct, jnp.zeros_like(seen), seen


watched.defvjp(_forward, _backward)


def called(model: Any, batch: Any) -> Any:
    """The model's outputs: the batch is its only argument, or holds its arguments by name."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def gathered(model: Any, batches: Iterable[Any], run: Run) -> tuple[dict[str, np.ndarray], int]:
    """What was watched, summed over all batches, by the leaf's path in float64; and how many batches there were."""
    graphdef, trainable, frozen = partition(model)

    @jax.jit
    def gradients(trainable: Any, frozen: Any, batch: Any) -> Any:
        def total(trainable: Any) -> jax.Array:
            out = run(combine(graphdef, trainable, frozen), batch)
            return sum((x.astype(jnp.float32).sum() for x in jax.tree.leaves(out)), start=jnp.zeros(()))

        return jax.grad(total)(trainable)

    sums = {path: np.zeros(value.shape) for path, value in trainable.items()}
    count = 0
    for batch in batches:
        for path, value in gradients(trainable, frozen, batch).items():
            sums[path] += np.asarray(value, np.float64)
        count += 1
    return sums, count
