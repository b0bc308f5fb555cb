# SPDX-License-Identifier: Apache-2.0
"""Trials that are trained together, one lane each, from one update to another.

A lane gets what `jpeft train` would give it: the same start, batches in the same order, the same dropout, the same
optimizer at its own numbers. Its state is kept at its own size (`many.part`), so it can go on beside other lanes.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..._bank import Bank
from ..._masks import optimizer
from ..._partition import GraphDef, Leaves, combine, partition
from ..._steering import check_steered
from ...io.checkpoint import Checkpoints
from .. import config as configuration
from .. import devices, job
from ..config import Config
from ..evaluate import Evaluation, assembled
from ..feed import Feed
from ..interruption import Interrupted, Interruption
from ..loop import max_skips
from ..many import begin_one, fix, join, make_step_many, part
from ..measures import Measure
from ..objective import objective
from ..optim import make_optimizer
from ..prefetch import Prefetch
from ..step import Compiled, State
from .groups import numbers
from .material import Material, stack
from .space import Trial

#: Updates that the host is ahead of the device at most.
AHEAD = 3


@dataclasses.dataclass(frozen=True)
class Leg:
    """What lanes did between two updates.

    Attributes:
      losses: of every update, by lane; `evaluations`: `{"update": ..., "loss": ..., ...}`, by lane.
      failed: whose loss, gradient or evaluation was not finite, by lane.
      states: at the end, by lane, each at its own size.
      seconds: of all lanes together, compilation among them.
      compiled: programs that were compiled for it, and `compile_seconds` the time that the steps among them took.
    """

    losses: list[list[float]]
    evaluations: list[list[dict[str, Any]]]
    failed: list[bool]
    states: list[State]
    seconds: float
    compiled: int
    compile_seconds: float


class Programs:
    """Compiled steps and evaluations, each made once for all legs that it fits."""

    def __init__(self) -> None:
        self._known: list[tuple[Any, Compiled, Evaluator]] = []

    def find(self, bank: Bank, config: Config, updates: int, shapes: Any, *, own: bool) -> tuple[Compiled, "Evaluator"]:
        """The step and the evaluation of lanes of one make.

        Args:
          bank: of the lanes.
          config: of one of them.
          updates: of a whole training, by which rates fall.
          shapes: of state and constants.
          own: whether every lane has batches of its own.
        """
        tree = configuration.plain(config)
        fixed = {key: value for key, value in tree["optimizer"].items() if key not in numbers(config)}
        signature = (bank.graphdef, json.dumps([fixed, tree["train"] | {"seed": 0}]), updates, shapes, own)
        for known, step, evaluator in self._known:
            if known == signature:
                return step, evaluator
        sums, measure = objective(config)
        tx = optimizer_of(config, updates, bank.graphdef)
        limits = {"ema": config.train.ema, "max_skips": max_skips(config)}
        step = make_step_many(bank, sums, tx, own_batches=own, **limits)
        evaluator = Evaluator(bank.graphdef, measure)
        self._known.append((signature, step, evaluator))
        return step, evaluator


class Evaluator:
    """Evaluates all lanes on each batch at once; as `evaluate.Evaluator` each by itself."""

    def __init__(self, graphdef: GraphDef, measure: Measure):
        self._measure = measure

        def compute(trainable: Leaves, constants: Leaves, frozen: Leaves, batch: dict[str, Any]) -> dict[str, Any]:
            micro = jax.tree.map(lambda x: x[0], batch)

            def one(trainable: Leaves, constants: Leaves) -> dict[str, Any]:
                return measure.sums(combine(graphdef, trainable, {**frozen, **constants}), micro, 1)

            return jax.vmap(one)(trainable, constants)

        self._compute = jax.jit(compute)

    def __call__(self, lanes: int, trainable: Leaves, fixed: Any, batches: Feed) -> list[Evaluation | None]:
        """Of every lane, None where the loss is not finite."""
        order = batches.buckets.in_order()
        found = jax.device_get(
            [
                self._compute(trainable, fixed.constants, fixed.frozen, devices.place(batches.collate(batch), None))
                for batch in order
            ]
        )
        by_lane = ([{name: x[at] for name, x in sums.items()} for sums in found] for at in range(lanes))
        return [self._one(batches, outcomes) for outcomes in by_lane]

    def _one(self, batches: Feed, outcomes: Sequence[Mapping[str, np.ndarray]]) -> Evaluation | None:
        try:
            return assembled(self._measure, batches, outcomes)
        except FloatingPointError:
            return None


def optimizer_of(config: Config, updates: int, graphdef: GraphDef) -> Callable[..., Any]:
    """`tx(lr, weight_decay, clip)`, the optimizer that `jpeft train` makes of a configuration, at these numbers."""

    def tx(**given: Any) -> Any:
        return optimizer(make_optimizer(dataclasses.replace(config.optimizer, **given), updates), model=graphdef)

    return tx


def first_state(config: Config, material: Material, model: Any) -> State:
    """A lane's state before its first update."""
    graphdef, trainable, _ = partition(model)
    updates = material.dataset(config).num_updates
    average = config.train.ema is not None
    state = begin_one(optimizer_of(config, updates, graphdef), trainable, numbers(config), average=average)
    check_steered(graphdef, state.optimizer)
    return state


class _Course(NamedTuple):
    """Lanes ready to be trained: their state, what no update changes, and the shapes of each lane's own state."""

    state: State
    fixed: Any
    own: list[Any]
    update: Compiled
    evaluate: Evaluator


def train(
    trials: Sequence[Trial],
    material: Material,
    programs: Programs,
    states: Sequence[State] | None,
    span: tuple[int, int],
    folder: Path,
    *,
    last: bool = True,
) -> Leg:
    """Trains lanes together, from update `span[0]` to `span[1]`.

    Args:
      trials: of one group (`groups.chunks`).
      material, programs: of the sweep.
      states: where each stands; None at the beginning.
      span: updates made, and updates to be made.
      folder: where a leg that is cut off has its checkpoints, from which it goes on.
      last: whether no other leg follows, for which the states at the end would be kept there.

    Raises:
      Interrupted: by a signal; a checkpoint is written.
      CheckpointError: every checkpoint of a leg that was cut off is damaged, or of another one.
    """
    started, options = time.perf_counter(), trials[0].config.train
    course = _prepared(trials, material, programs, states)
    update, held = course.update, material.dataset(trials[0].config).eval
    assert held is not None
    before, compiling = update.num_compiled, update.compile_seconds
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    state, done, losses, evaluations = _resumed(checkpoints, course.state, span[0], len(trials))
    key, fresh = _keys(trials), []

    def flush() -> None:
        losses.extend(np.asarray(jax.device_get(fresh), float).tolist())
        fresh.clear()

    def save(number: int) -> None:
        flush()
        checkpoints.save(number, state, {"losses": losses, "evaluations": evaluations})

    walk = Prefetch(_walk(trials, material, done), then=lambda batch: devices.place(batch, None))
    with Interruption() as interruption, walk as batches:
        for number, batch in zip(range(done + 1, span[1] + 1), batches, strict=False):
            state, metrics = update(state, course.fixed, batch, key)
            fresh.append(metrics.loss)
            jax.block_until_ready(fresh[-AHEAD:][0])  # so that a signal is heard soon, and few batches wait
            if number == span[1] or (options.eval_every and number % options.eval_every == 0):
                _note(evaluations, number, course.evaluate(len(trials), state.served, course.fixed, held))
            if interruption.after(number):
                save(number)
                checkpoints.close()
                raise Interrupted(f"after update {number} of {len(trials)} trials; called again, the sweep goes on")
            if (not last) if number == span[1] else (options.save_every and number % options.save_every == 0):
                save(number)
    flush()
    checkpoints.close()
    host = jax.device_get(state)
    return Leg(
        np.asarray(losses).T.tolist(),
        evaluations,
        [bool(f) or lane[-1]["loss"] is None for f, lane in zip(host.failed, evaluations, strict=True)],
        [] if last else [part(host, at, own) for at, own in enumerate(course.own)],
        time.perf_counter() - started,
        update.num_compiled - before,
        update.compile_seconds - compiling,
    )


def _prepared(
    trials: Sequence[Trial], material: Material, programs: Programs, states: Sequence[State] | None
) -> _Course:
    config, models = trials[0].config, [material.model(trial.config) for trial in trials]
    firsts = [first_state(trial.config, material, model) for trial, model in zip(trials, models, strict=True)]
    bank = stack(models)
    fixed: Any = fix(bank, {name: [numbers(trial.config)[name] for trial in trials] for name in numbers(config)})
    state = join(firsts if states is None else states)
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), (state._asdict(), fixed._asdict()))
    own = len({trial.seed for trial in trials}) > 1
    found = programs.find(bank, config, material.dataset(config).num_updates, shapes, own=own)
    return _Course(state, fixed, jax.eval_shape(lambda: firsts), *found)


def _resumed(checkpoints: Checkpoints, state: State, start: int, lanes: int) -> tuple[State, int, list[Any], list[Any]]:
    """(state, updates made, losses, evaluations) of the newest good checkpoint, or of the beginning."""
    step, _ = checkpoints.newest()
    if step is None:
        return state, start, [], [[] for _ in range(lanes)]
    state, plain = checkpoints.restore(step, like=state)
    checkpoints.drop_after(step)
    return state, step, plain["losses"], plain["evaluations"]


def _note(evaluations: list[list[dict[str, Any]]], number: int, found: Sequence[Evaluation | None]) -> None:
    for lane, one in zip(evaluations, found, strict=True):
        lane.append({"update": number, **(one.metrics if one else {"loss": None})})


def restored(trials: Sequence[Trial], material: Material, folder: Path, stop: int) -> list[State]:
    """The states at the end of a leg that is made, as `Leg.states`.

    Raises:
      CheckpointError: they are damaged, or of other trials.
    """
    firsts = [first_state(trial.config, material, material.model(trial.config)) for trial in trials]
    state, _ = Checkpoints(folder / "checkpoints").restore(stop, like=join(firsts))
    host = jax.device_get(state)
    return [part(host, at, own) for at, own in enumerate(firsts)]


def _keys(trials: Sequence[Trial]) -> jax.Array | None:
    """The key of all lanes' dropout, or theirs where their seeds differ; None where it is off."""
    if len({trial.seed for trial in trials}) == 1:
        return job.dropout_key(trials[0].config)
    keys = [key for trial in trials if (key := job.dropout_key(trial.config)) is not None]
    return jnp.stack(keys) if keys else None


def _walk(trials: Sequence[Trial], material: Material, done: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches after so many updates: one for all lanes, or `[lanes, ...]` where their seeds differ."""
    walks = {}
    for trial in trials:
        feed = material.dataset(trial.config).feed
        if trial.seed not in walks:
            walks[trial.seed] = feed.walk(trial.seed, feed.position(trial.seed, done))
    if len(walks) == 1:
        yield from (fed.arrays for fed in next(iter(walks.values())))
        return
    while True:
        fed = {seed: next(walk).arrays for seed, walk in walks.items()}
        yield {name: np.stack([fed[trial.seed][name] for trial in trials]) for name in fed[trials[0].seed]}
