# SPDX-License-Identifier: Apache-2.0
"""One update of training as one compiled function: gradients, clipping, optimizer, and the guard against NaN.

  state = begin(tx, trainable)
  update = make_step(graphdef, lm_sums, tx)
  state, metrics = update(state, frozen, batch, key)

A batch's arrays are `[accumulation, rows, ...]`: the micro-batches of one update. Losses and gradients are summed over
all of them and divided once by the number of labels that count, so k micro-batches of b rows are the update of one of
k * b, however unequally the labels are spread. What the methods add to the loss (`jpeft.penalty`) is added once.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from .._adapt import penalty
from .._freed import give_back
from .._partition import GraphDef, Leaves, combine
from .._scope import scope
from .._sharding import mirrored
from .._steering import check_steered
from .losses import Batch, Measured, Sums, cls_loss, lm_loss, qa_loss, token_cls_loss

__all__ = ["Metrics", "State", "begin", "cls_loss", "lm_loss", "make_step", "qa_loss", "token_cls_loss"]


#: How a step is compiled for CPU. Matrix products by XLA's older library: the newer one runs at 60-80 % of its rate on
#: these shapes. And sums along rows in one pass: the rewriting into a tree of windows takes twice as long.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_disable_hlo_passes": "tree_reduction_rewriter"}


class State(NamedTuple):
    """All that training changes; saved and restored, it goes on as if it had not been stopped.

    Attributes:
      trainable: the adapter's leaves.
      optimizer: the optimizer's state.
      updates: updates made so far; the next batch and the dropout key follow from it.
      failed: a loss or gradient was not finite: no update has been made since, and none will be.
      skipped: of `updates`, those left out because their loss or gradient was not finite.
      average: exponential moving average of `trainable`; None where none is kept.
    """

    trainable: Leaves
    optimizer: Any
    updates: Int[Array, ""]
    failed: Bool[Array, ""]
    skipped: Int[Array, ""]
    average: Leaves | None = None

    @property
    def served(self) -> Leaves:
        """What is evaluated and saved: the average where one is kept, else the leaves themselves."""
        return self.trainable if self.average is None else self.average


class Metrics(NamedTuple):
    """What one update measured, still on the device.

    Attributes:
      loss: mean over the labels that count, and what the methods add to it (`jpeft.penalty`).
      labels: their number.
      grad_norm: of the whole trainable tree, before clipping.
      figures: means of what else the loss measures, by name.
    """

    loss: Float[Array, ""]
    labels: Float[Array, ""]
    grad_norm: Float[Array, ""]
    figures: dict[str, jax.Array]


Update = Callable[..., tuple[State, Metrics]]


def fresh() -> tuple[jax.Array, jax.Array, jax.Array]:
    """`updates`, `failed` and `skipped` before the first update."""
    return jnp.int32(0), jnp.bool(False), jnp.int32(0)


def first_state(tx: optax.GradientTransformation, trainable: Leaves, *, average: bool = False) -> State:
    """As `begin`, wherever the arrays may lie: for `jax.eval_shape`."""
    own = jax.tree.map(jnp.copy, trainable)
    mean = jax.tree.map(jnp.copy, trainable) if average else None
    return State(own, tx.init(trainable), *fresh(), mean)


def begin(
    tx: optax.GradientTransformation, trainable: Leaves, *, average: bool = False, offload: bool = False
) -> State:
    """The state before the first update. Its arrays are its own: the first update may donate them.

    Args:
      tx, trainable: as of `make_step`.
      average: keep a moving average, for a step with `ema`.
      offload: keep the optimizer's state in the host's memory; every update fetches it and puts it back.
    """

    first = functools.partial(first_state, tx, average=average)
    places = _places(jax.eval_shape(first, trainable), trainable, offload)
    return jax.jit(first, out_shardings=places)(trainable)


def _places(state: State, trainable: Mapping[str, Any], offload: bool) -> Any:
    """Where a state of shapes lies beside placed parameters."""
    places = mirrored(state, trainable)
    return places._replace(optimizer=jax.tree.map(_on_host, places.optimizer)) if offload else places


def _on_host(place: jax.sharding.Sharding) -> jax.sharding.Sharding:
    return place.with_memory_kind("pinned_host")


def _fetched(leaf: jax.Array) -> jax.Array:
    """A leaf on the device, wherever it lay; under `jax.jit`."""
    on_host = jax.typeof(leaf).memory_space == jax.memory.Space.Host
    return jax.device_put(leaf, jax.memory.Space.Device) if on_host else leaf


def begin_shapes(
    tx: optax.GradientTransformation, trainable: Mapping[str, Any], *, average: bool = False, offload: bool = False
) -> State:
    """`begin`'s state as shapes in their places, of shapes in theirs."""
    state = jax.eval_shape(functools.partial(first_state, tx, average=average), trainable)
    places = _places(state, trainable, offload)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, places)


def make_step(
    graphdef: GraphDef,
    sums: Callable[..., Sums | Measured],
    tx: optax.GradientTransformation,
    *,
    groups: int = 1,
    ema: float | None = None,
    max_skips: int = 0,
) -> "Compiled":
    """`update(state, frozen, batch, key) -> (state, metrics)`, compiled; `state` is donated.

    Where the loss or the gradients' norm is not finite, the adapter and the optimizer come back as they were: the first
    `max_skips` times the update counts as made and `skipped`, after that the state is marked `failed`.

    Args:
      graphdef: of `jpeft.partition`.
      sums: (model, batch, key, groups) -> (sum of losses, number of labels) and perhaps sums of further figures, one of
        `losses.SUMS`.
      tx: optimizer of the trainable tree, clipping included; where a method takes part in updates, as AdaLoRA does, of
        `jpeft.optimizer(tx, model=graphdef)`, and anything else is an error.
      groups: number of devices that a batch's rows are split over.
      max_skips: updates that may be left out.
      ema: decay of the moving average in `State.average`; None keeps none. After n updates the decay is
        `min(ema, (1 + n) / (10 + n))`, so that the first values are soon forgotten.

    The function's arguments: `frozen` of `jpeft.partition`; `batch` with arrays `[accumulation, rows, ...]`; `key`
    turns dropout on, another one in each update and micro-batch, and may be None.
    """

    def update(state: State, frozen: Leaves, batch: Batch, key: jax.Array | None) -> tuple[State, Metrics]:
        check_steered(graphdef, state.optimizer)
        state = state._replace(optimizer=jax.tree.map(_fetched, state.optimizer))

        def of_one(trainable: Leaves, batch: Batch, key: jax.Array | None) -> Sums | Measured:
            return sums(combine(graphdef, trainable, frozen), batch, key, groups)

        def added(leaves: Leaves) -> jax.Array | None:
            return penalty(combine(graphdef, leaves, frozen))

        return advance(of_one, tx, state, batch, key, added, ema=ema, max_skips=max_skips)

    return Compiled(update)


def advance(
    sums: Callable[[Leaves, Batch, jax.Array | None], Sums | Measured],
    tx: optax.GradientTransformation,
    state: State,
    batch: Batch,
    key: jax.Array | None,
    added: Callable[[Leaves], jax.Array | None],
    *,
    ema: float | None = None,
    max_skips: int = 0,
) -> tuple[State, Metrics]:
    """One update of one adapter.

    Args:
      sums: (trainable, micro-batch, key) -> (sum of losses, number of labels), and perhaps sums of further figures.
      tx, state, batch, key, ema: as of `make_step` and its function.
      added: trainable -> what the adapters' own leaves add to the loss, or None.
      max_skips: as of `make_step`.
    """
    (loss, (labels, figures)), grads = _gradients(sums, state, batch, key)
    figures = {name: value / labels for name, value in figures.items()}
    loss, grads = loss / labels, jax.tree.map(lambda g: g / labels, grads)
    if jax.eval_shape(added, state.trainable) is not None:
        more, its_grads = jax.value_and_grad(added)(state.trainable)
        loss, grads = loss + more, jax.tree.map(jnp.add, grads, its_grads)
    norm = optax.tree.norm(grads)
    broken = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    failed = state.failed | (broken & (state.skipped >= max_skips))
    changes, optimizer = tx.update(grads, state.optimizer, state.trainable)
    trainable: Any = optax.apply_updates(state.trainable, changes)
    trainable, optimizer, average = jax.tree.map(
        lambda new, old: jnp.where(failed | broken, old, new),
        (trainable, optimizer, _averaged(state, trainable, ema)),
        (state.trainable, state.optimizer, state.average),
    )
    skipped = state.skipped + (broken & ~failed)
    new = State(trainable, optimizer, state.updates + ~failed, failed, skipped, average)
    return new, Metrics(loss, labels, norm, figures)


def _averaged(state: State, trainable: Leaves, ema: float | None) -> Leaves | None:
    """The average after an update that made the leaves `trainable`."""
    if (ema is None) != (state.average is None):
        raise ValueError(
            f"the step's ema is {ema}, and the state has {'no' if ema else 'an'} average; begin(average=...)"
        )
    if ema is None or state.average is None:
        return None
    done = state.updates + 1
    rate = jnp.minimum(ema, (1.0 + done) / (10.0 + done))
    return jax.tree.map(
        lambda mean, leaf: (rate * mean + (1 - rate) * leaf).astype(leaf.dtype), state.average, trainable
    )


def _gradients(sums: Callable[..., Sums | Measured], state: State, batch: Batch, key: jax.Array | None) -> Any:
    """Sums over the micro-batches: (loss, (labels, further figures)), gradients."""

    def with_figures(*arguments: Any) -> Any:
        loss, labels, *figures = sums(*arguments)
        return loss, (labels, figures[0] if figures else {})

    def of_one(micro: Any) -> Any:
        index, batch = micro
        own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, state.updates), index)
        return jax.value_and_grad(with_figures, has_aux=True)(state.trainable, batch, own)

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_one(micro)), None

    micros = jnp.arange(len(batch["labels"])), batch
    shapes = jax.eval_shape(of_one, jax.tree.map(lambda x: x[0], micros))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), micros)[0]


class Cost(NamedTuple):
    """What one update costs, as its compiled program tells.

    Attributes:
      flops: floating-point operations.
      arguments: bytes of what goes in: base, state and batch.
      donated: bytes of these that the new state takes the place of: adapter and optimizer.
      temporaries: bytes of what is made on the way.
    """

    flops: float
    arguments: int
    donated: int
    temporaries: int


class Compiled:
    """`update`, compiled once for each shape of batch, with the new state in the places of the old one.

    Attributes:
      update: the function, not compiled.
      compile_seconds: spent on compiling so far.
    """

    def __init__(self, update: Update):
        self.update = update
        self._programs: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    @property
    def cost(self) -> Cost | None:
        """Of the largest program; None before the first, and where the backend does not tell."""
        costs = [found for program in self._programs.values() if (found := _cost(program)) is not None]
        return max(costs, default=None)

    def __call__(self, state: State, frozen: Leaves, batch: Batch, key: jax.Array | None) -> tuple[State, Metrics]:
        return self.compiled(state, frozen, batch, key)(state, frozen, batch, key)

    def compiled(self, state: Any, frozen: Any, batch: Any, key: Any) -> Any:
        """The program for arguments of these shapes, made if need be; shapes alone (`jax.ShapeDtypeStruct`) will do."""
        shapes = tuple((name, batch[name].shape) for name in sorted(batch)), None if key is None else key.shape
        if shapes not in self._programs:
            start = time.perf_counter()
            self._programs[shapes] = self.lower(state, frozen, batch, key).compile()
            give_back()
            self.compile_seconds += time.perf_counter() - start
        return self._programs[shapes]

    def lower(self, state: Any, frozen: Any, batch: Any, key: Any) -> jax.stages.Lowered:
        """The program before it is compiled, for the devices that the arguments lie on; shapes in places will do.

        Arguments that it does not read are its arguments all the same, so that its memory is what a run takes.
        """
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        target = next(iter(state.updates.sharding.device_set)).platform
        jitted = jax.jit(
            self.update,
            donate_argnums=0,
            out_shardings=(places, None),
            compiler_options=CPU_OPTIONS if target == "cpu" else None,
            keep_unused=True,
        )
        with scope(platform=target):
            return jitted.lower(state, frozen, batch, key)


def _cost(program: Any) -> Cost | None:
    memory, found = program.memory_analysis(), program.cost_analysis()
    if memory is None or not found:
        return None
    sizes = memory.argument_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes
    return Cost(float(found["flops"]), *sizes)
