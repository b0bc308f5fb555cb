# SPDX-License-Identifier: Apache-2.0
"""N adapters trained in one compiled step on one base: other starts, ranks, alphas, learning rates, data.

  bank = jpeft.bank([model_a, model_b, model_c])
  trained = jpeft.train_many(bank, lm_sums, lambda lr: optax.adamw(lr), batches, options={"lr": [1e-4, 3e-4, 1e-3]})
  model = trained.bank.model(2)

The step of `make_step` under `jax.vmap`: every adapter has its own optimizer, clipping, count of updates and guard
against NaN, and the base is in memory once. Each is trained as it would be alone.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from .._adapt import penalty
from .._bank import Bank
from .._partition import Leaves, combine
from .losses import Batch, Sums
from .step import Compiled, Metrics, State, advance, first_state

_LOG = logging.getLogger("jpeft")

#: An optimizer, or what makes it of the options of one adapter.
Optimizer = optax.GradientTransformation | Callable[..., optax.GradientTransformation]


class Fixed(NamedTuple):
    """What no update changes; of every adapter but for `frozen`, with an axis of adapters.

    Attributes:
      frozen: the base, and what all adapters have in common.
      constants: the adapters' own.
      options: what their optimizers are made of.
      sizes: `[adapters, axes]`: how far a padded leaf is the adapter's own.
    """

    frozen: Leaves
    constants: Leaves
    options: Mapping[str, jax.Array]
    sizes: Mapping[str, jax.Array]


class Trained(NamedTuple):
    """What `train_many` gives.

    Attributes:
      bank: with the trained adapters.
      losses: of every update before it was made.
      grad_norms: likewise, before clipping.
      failed: whose loss or gradient was not finite; such an adapter is as it was before that update.
    """

    bank: Bank
    losses: Float[Array, "updates adapters"]
    grad_norms: Float[Array, "updates adapters"]
    failed: Bool[Array, " adapters"]


def train_many(
    bank: Bank,
    sums: Callable[..., Sums],
    tx: Optimizer,
    batches: Iterable[Batch],
    *,
    options: Mapping[str, Sequence[float]] | None = None,
    key: jax.Array | None = None,
    own_batches: bool = False,
) -> Trained:
    """Trains all adapters of a bank at once, one update per batch; each as `make_step` would train it alone.

    With an optimizer that treats every number by itself, as Adam, SGD and clipping by the norm do, an adapter that was
    padded is trained as if it were not; one that averages over a whole leaf, as Adafactor does, sees the zeros too.

    Args:
      bank: the adapters at their start.
      sums: (model, batch, key, groups) -> (sum of losses, number of labels), one of `jpeft.train.losses.SUMS`.
      tx: an optimizer for all of them, or `lambda lr, decay: optax.adamw(lr, weight_decay=decay)`, clipping included.
      batches: of arrays `[accumulation, rows, ...]`.
      options: what `tx` takes, a number for every adapter: `{"lr": [1e-4, 3e-4], "decay": [0.0, 0.1]}`.
      key: turns dropout on; one for all, who then drop the same, or `[adapters]` of them.
      own_batches: whether every adapter has data of its own: arrays `[adapters, accumulation, rows, ...]`.

    Raises:
      TypeError: what comes is no bank.
      ValueError: options, keys or batches are not as many as the adapters; there are no batches.

    Example:
      >>> trained = jpeft.train_many(bank, lm_sums, optax.adamw(1e-3), batches)
    """
    if not isinstance(bank, Bank):
        raise TypeError(f"train_many takes a bank, which jpeft.bank makes of adapted models; got {type(bank).__name__}")
    fixed: Any = fix(bank, options or {})
    state = begin_many(tx, bank, fixed)
    update = make_step_many(bank, sums, tx, own_batches=own_batches)
    metrics = []
    for batch in batches:
        state, measured = update(state, fixed, batch, key)
        metrics.append(measured)
    if not metrics:
        raise ValueError("there are no batches, so nothing was trained")
    _warn(state)
    return Trained(
        put_back(bank, state),
        jnp.stack([m.loss for m in metrics]),
        jnp.stack([m.grad_norm for m in metrics]),
        state.failed,
    )


def fix(bank: Bank, options: Mapping[str, Any]) -> Fixed:
    """What the step of `make_step_many` takes as `frozen`.

    Raises:
      ValueError: an option has not one number for every adapter.
    """
    count = len(bank) - 1
    arrays = {name: jnp.asarray(values) for name, values in options.items()}
    for name, values in arrays.items():
        if values.shape != (count,):
            raise ValueError(f"the option {name!r} has the shape {values.shape}; the bank has {count} adapters")
    shapes = [own.shapes for own in bank.own]
    sizes = {
        path: jnp.asarray(np.array([shape[path] for shape in shapes]), jnp.int32)
        for path, leaf in bank.trainable.items()
        if any(shape[path] != leaf.shape[1:] for shape in shapes)
    }
    return Fixed(bank.frozen, _filled(bank.constants), arrays, sizes)


def begin_many(tx: Optimizer, bank: Bank, fixed: Fixed) -> State:
    """The state before the first update, every leaf `[adapters, ...]`. Its arrays are its own."""

    def first(trainable: Leaves, options: Mapping[str, jax.Array], sizes: Mapping[str, jax.Array]) -> State:
        return first_state(_transform(tx, options, sizes), trainable)

    return jax.jit(jax.vmap(first))(_filled(bank.trainable), fixed.options, fixed.sizes)


def begin_one(tx: Optimizer, trainable: Leaves, options: Mapping[str, Any], *, average: bool = False) -> State:
    """One adapter's part of such a state, at the adapter's own size: what `join` takes and `part` gives.

    Args:
      tx, options: as of `train_many`, the options of this adapter.
      trainable: its leaves.
      average: keep a moving average, for a step with `ema`.
    """
    transform = _transform(tx, {name: jnp.asarray(value) for name, value in options.items()}, {})
    return jax.jit(lambda leaves: first_state(transform, leaves, average=average))(trainable)


def join(states: Sequence[State]) -> State:
    """States of adapters of one make as the state of their bank: padded with zeros to the largest, and stacked."""

    def stacked(*leaves: Any) -> jax.Array:
        whole = np.zeros(
            (len(leaves), *np.max([np.shape(leaf) for leaf in leaves], axis=0).astype(int)), np.asarray(leaves[0]).dtype
        )
        for at, leaf in enumerate(leaves):
            whole[(at, *map(slice, np.shape(leaf)))] = leaf
        return jnp.asarray(whole)

    return jax.tree.map(stacked, *jax.device_get(list(states)))


def part(state: State, at: int, like: State) -> State:
    """One adapter's part of a bank's state, at the size of `like`; NumPy arrays.

    Args:
      state: of a bank, on the host.
      at: which adapter, from 0.
      like: a state of that adapter, or its shapes.
    """
    return jax.tree.map(lambda leaf, own: np.asarray(leaf)[at][tuple(map(slice, own.shape))].copy(), state, like)


def make_step_many(
    bank: Bank,
    sums: Callable[..., Sums],
    tx: Optimizer,
    *,
    own_batches: bool = False,
    groups: int = 1,
    ema: float | None = None,
    max_skips: int = 0,
) -> Compiled:
    """`update(state, fixed, batch, key) -> (state, metrics)`, compiled; as `make_step`, with an axis in front.

    Args:
      bank: whose adapters are trained; of it only the graphdef is used.
      sums, tx, own_batches: as of `train_many`.
      groups: number of devices that a batch's rows are split over.
      ema, max_skips: as of `make_step`.
    """
    graphdef, count = bank.graphdef, len(bank) - 1

    def update(state: State, fixed: Any, batch: Batch, key: jax.Array | None) -> tuple[State, Metrics]:
        _check(count, batch, key, own_batches)

        def one(state: State, constants: Leaves, options: Any, sizes: Any, batch: Batch, key: Any) -> Any:
            def model(trainable: Leaves) -> Any:
                return combine(graphdef, trainable, {**fixed.frozen, **constants})

            def of_one(trainable: Leaves, batch: Batch, key: jax.Array | None) -> Sums:
                return sums(model(trainable), batch, key, groups)

            transform = _transform(tx, options, sizes)

            def added(leaves: Leaves) -> jax.Array | None:
                return penalty(model(leaves))

            return advance(of_one, transform, state, batch, key, added, ema=ema, max_skips=max_skips)

        axes = (0, 0, 0, 0, 0 if own_batches else None, 0 if _many(key) else None)
        return jax.vmap(one, axes)(state, fixed.constants, fixed.options, fixed.sizes, batch, key)

    return Compiled(update)


def put_back(bank: Bank, state: State) -> Bank:
    """`bank` with the leaves of a state; slot 0 as it was."""
    trained = state.trainable
    return bank.with_trainable({p: jnp.concatenate([leaf[:1], trained[p]]) for p, leaf in bank.trainable.items()})


def _transform(tx: Optimizer, options: Mapping[str, Any], sizes: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optimizer of one adapter, which leaves padding at zero."""
    own = tx if isinstance(tx, optax.GradientTransformation) else tx(**options)
    if isinstance(tx, optax.GradientTransformation) and options:
        raise ValueError(
            f"tx takes no options, so {', '.join(options)} would change nothing; pass a function of them that makes it"
        )

    def inside(updates: Any, _: Any) -> Any:
        return {path: _within(update, sizes.get(path)) for path, update in updates.items()}

    return optax.chain(own, optax.stateless(inside))


def _within(update: jax.Array, size: jax.Array | None) -> jax.Array:
    """`update` with zeros beyond the first `size[i]` entries of axis i."""
    if size is None:
        return update
    inside = jnp.ones(update.shape, bool)
    for axis in range(update.ndim):
        inside &= jax.lax.broadcasted_iota(jnp.int32, update.shape, axis) < size[axis]
    return jnp.where(inside, update, 0)


def _filled(leaves: Leaves) -> Leaves:
    """Leaves of a bank without slot 0."""
    return {path: leaf[1:] for path, leaf in leaves.items()}


def _many(key: jax.Array | None) -> bool:
    return key is not None and key.ndim > (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)


def _check(count: int, batch: Batch, key: jax.Array | None, own_batches: bool) -> None:
    for name, values in batch.items() if own_batches else ():
        if values.shape[0] != count:
            raise ValueError(f"the batch's {name} is of {values.shape[0]} adapters; the bank has {count}")
    if _many(key) and len(key) != count:  # type: ignore[arg-type]
        raise ValueError(f"got {len(key)} keys; the bank has {count} adapters")  # type: ignore[arg-type]


def _warn(state: State) -> None:
    failed = [i + 1 for i, failed in enumerate(np.asarray(state.failed)) if failed]
    if failed:
        _LOG.warning("the loss of the adapters in slots %s was not finite: they were trained no further", failed)
