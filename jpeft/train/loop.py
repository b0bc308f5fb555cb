# SPDX-License-Identifier: Apache-2.0
"""The training loop: what `jpeft train` runs.

The device runs ahead of the host: nothing is read back between two log lines. What training is made of at any moment
is one `step.State`, from which the next batch and dropout key follow; so whatever saves a state can go on from it.
"""

import contextlib
import dataclasses
import functools
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from .. import _mesh
from .._masks import optimizer
from .._partition import combine, partition
from ..io.card import Card
from ..io.checkpoint import Checkpoints, described
from . import config as configuration
from . import devices, job, loggers, roll
from .clock import Clock
from .config import Config
from .evaluate import Evaluation, Evaluator
from .feed import Fed
from .folder import RunFolder, replaced
from .identity import compare, identity
from .interruption import Interrupted, Interruption
from .objective import objective
from .optim import make_optimizer
from .prefetch import Prefetch
from .progress import say
from .saved import Info, save_adapter
from .standing import Standing
from .step import Cost, State, begin, make_step
from .watch import Watch


class TrainingStopped(FloatingPointError):
    """A loss or gradient was not finite; the update was not made."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
      state: after the last update.
      evaluation: the last one, or None without evaluation data.
      losses: of every update that this process wrote a line of: all but those before a resume.
      real_rate, padded_rate: tokens/s, or images/s, over the whole run, compilation and evaluation left out.
      adapter: folder of the saved adapter.
      standing: of the evaluations, where the configuration follows a figure of theirs.
      clock: where the time went.
      cost: of one update of the widest batch; None where the backend does not tell.
    """

    state: State
    evaluation: Evaluation | None
    losses: list[float]
    real_rate: float
    padded_rate: float
    adapter: Path
    standing: Standing
    clock: Clock
    cost: Cost | None


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Result:
    """Trains as configured, and saves the adapter.

    Args:
      resume: go on from the newest good checkpoint in the run's folder, as if there had been no stop; from the
        beginning where there is none.
      overwrite: replace a run that the folder holds, once data and model are there.

    Raises:
      ConfigError, DataError, FileNotFoundError, FileExistsError, CheckpointError: before anything is trained.
      TrainingStopped: the loss was not finite.
      Interrupted: by SIGINT or SIGTERM; a checkpoint is written.
      OSError: a checkpoint could not be written; older ones remain.

    Example:
      >>> result = train(config.load("sst2.yaml", ["train.seed=1"]))
    """
    loggers.check(config.logging)
    method = configuration.method(config.method)  # wrong options before minutes of reading
    folder = RunFolder(config.out, devices.is_main(), resume, overwrite)
    if folder.finished and not overwrite:
        raise FileExistsError(f"{config.out} holds a finished run; --overwrite replaces it, out= names another")
    roll.at("the data")
    dataset = job.read_data(config)
    check_plan(method, dataset.num_updates)
    mesh = job.make_mesh(config)
    say(job.describe(config, dataset))
    roll.at("the model")
    parts = job.build(config, dataset.label_names, mesh)
    say(str(parts.summary))
    if parts.own_format is not None:
        say(f"the adapter will be saved in jpeft's own format, for PEFT's cannot hold it: {parts.own_format}")
    if config.preference.precompute:
        say("the reference's log-probabilities are computed")
        dataset = job.with_references(dataset, parts, mesh)
    with folder.held():
        if overwrite:
            folder.clear()
            devices.meet("the old run is removed")
        loop = Loop(config, dataset, parts, mesh, folder)
        try:
            return loop.resume() if resume else loop.begin()
        except BaseException:
            loop.give_up()
            raise


def check_plan(method: Any, num_updates: int) -> None:
    """Refuses a method that plans for a training of another length."""
    parts = getattr(method, "methods", (method,))
    planned = next((p.total_steps for p in parts if getattr(p, "total_steps", num_updates) != num_updates), None)
    if planned is not None:
        raise configuration.ConfigError(
            f"method.total_steps is {planned}, and this run makes {num_updates} updates; make the two equal, for the "
            "method plans its whole course by it"
        )


def max_skips(config: Config) -> int:
    """Updates that a run may leave out."""
    return config.train.max_skips if config.train.on_nan == "skip" else 0


class Loop:
    """One run, from a state to its end."""

    def __init__(self, config: Config, dataset: job.Dataset, parts: job.Parts, mesh: Any, folder: RunFolder):
        self._config, self._dataset, self._parts, self._mesh, self._folder = config, dataset, parts, mesh, folder
        self._tx = optimizer(make_optimizer(config.optimizer, dataset.num_updates), model=parts.graphdef)
        (sums, measure), groups = objective(config), devices.num_groups(mesh)
        self._update = make_step(
            parts.graphdef, sums, self._tx, groups=groups, ema=config.train.ema, max_skips=max_skips(config)
        )
        self._evaluate = Evaluator(parts.graphdef, measure, mesh)
        self._key = job.dropout_key(config)
        self._checkpoints = Checkpoints(folder.checkpoints, config.train.keep)

    def begin(self) -> Result:
        """Trains from the beginning."""
        self._folder.begin(self._config, self._dataset, self._parts)
        return self.run()

    def resume(self) -> Result:
        """Trains from the newest good checkpoint, or from the beginning where there is none.

        Raises:
          CheckpointError: every checkpoint is damaged, or they are of a run that is another one.
        """
        step, faults = self._checkpoints.newest()
        if faults:
            say(f"damaged checkpoints are left out:\n{described(faults)}")
        if step is None:
            say("there is no checkpoint to go on from: the run begins")
            return self.begin()
        stated = compare(self._checkpoints.plain(step)["identity"], self._identity)  # before leaves that do not fit
        state, plain = self._checkpoints.restore(step, like=self._first())
        self._folder.go_on(plain["folder"], step, stated)
        self._checkpoints.drop_after(step)
        say(f"resumed after update {step}" + "".join(f"\n  {line}" for line in stated))
        standing = Standing(**plain["standing"])
        return self.run(state, plain["position"], plain["carried"], standing, owes=plain["owes"])

    def run(
        self, state: State | None = None, position: Mapping[str, Any] | None = None, carried: Iterable[Any] = (),
        standing: Standing | None = None, *, owes: bool = False,
    ) -> Result:  # fmt: skip
        """Trains from `state`, by default from the beginning, and saves the adapter.

        Args:
          state: donated.
          position: of the next batch; None counts the state's updates from the start, which no stream can.
          carried, standing: of `Watch`.
          owes: whether the evaluation after the state's last update is still to be made.
        """
        state = self._first() if state is None else state
        done, seed = int(state.updates), self._config.train.seed
        watch = Watch(self._config, self._dataset, self._parts, self._folder, self._update, done, standing, carried)
        losses: list[float] = []
        evaluation = self._evaluation(done, state, watch) if owes else None
        feed, last = self._dataset.feed, done if watch.exhausted else self._dataset.num_updates
        own, starts = devices.own_rows(self._mesh, self._dataset.train.rows), {}
        walk = feed.walk(seed, feed.position(seed, done) if position is None else position, own)
        with Interruption() as interruption, Prefetch(walk, then=self._placed) as batches:
            for number, fed in zip(range(done + 1, last + 1), watch.waiting(batches), strict=False):
                roll.at(f"update {number}")
                state, metrics = self._update(state, self._parts.frozen, fed.arrays, self._key)
                roll.at(f"the end of update {number}")
                watch.update(metrics, fed.real, fed.padded)
                starts[number] = fed.start
                evaluates = self._evaluates_at(number)
                leaves, saves = interruption.after(number), self._saves_at(number)
                writes = watch.due(number) or evaluates
                if (writes or leaves or saves) and bool(state.failed):
                    self._stop(state, watch.pending_figures(), starts)
                if writes:
                    losses += watch.log(number)
                    starts.clear()
                if leaves:
                    self._leave(number, state, watch, fed.after, owes=evaluates)
                if evaluates:
                    evaluation = self._evaluation(number, state, watch)
                    if watch.exhausted:
                        break
                if saves:
                    self._checkpoint(number, state, watch, fed.after, owes=False)
        self._checkpoints.close()
        rates = watch.end()
        with watch.clock.on("save"):
            self._finish(state, evaluation, watch.standing)
        told = watch.standing, watch.clock, self._update.cost
        return Result(state, evaluation, losses, *rates, self._folder.adapter, *told)

    def give_up(self) -> None:
        """Waits for a checkpoint that is being written, where the run ended by an error: to go on, it must be settled.

        One process of several does not, for the others may never come to write their part.
        """
        if jax.process_count() == 1:
            with contextlib.suppress(OSError):  # the run's own error is what is told
                self._checkpoints.close()

    def _first(self) -> State:
        average, offload = self._config.train.ema is not None, self._config.optimizer.offload
        return begin(self._tx, self._parts.trainable, average=average, offload=offload)

    def _saves_at(self, number: int) -> bool:
        every = self._config.train.save_every
        return every is not None and number % every == 0 and number < self._dataset.num_updates

    def _checkpoint(self, number: int, state: State, watch: Watch, position: Mapping[str, Any], *, owes: bool) -> None:
        """Begins to write all that the run is after update `number`."""
        roll.at(f"checkpoint {number}")
        with watch.clock.on("save"):
            plain = {
                "position": dict(position),
                "carried": watch.carry(),
                "standing": dataclasses.asdict(watch.standing),
                "owes": owes,
                "folder": self._folder.mark(),
                "identity": self._identity,
            }
            self._checkpoints.save(number, state, plain)

    def _leave(self, number: int, state: State, watch: Watch, position: Mapping[str, Any], *, owes: bool) -> NoReturn:
        """Saves and ends, where a signal asked for it."""
        self._checkpoint(number, state, watch, position, owes=owes)
        self._checkpoints.close()
        watch.end()
        raise Interrupted(f"after update {number}; its checkpoint is in {self._folder.checkpoints}. --resume goes on")

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        return identity(self._config, self._dataset, self._parts)

    def _evaluation(self, number: int, state: State, watch: Watch) -> Evaluation:
        """Evaluates, and keeps a copy of the adapter where it is the best so far."""
        assert self._dataset.eval is not None
        with watch.clock.on("evaluation"):
            evaluation = self._evaluate(state.served, self._parts.frozen, self._dataset.eval)
        watch.evaluated(number, evaluation, lambda: combine(self._parts.graphdef, state.served, self._parts.frozen))
        if watch.improved:
            with watch.clock.on("save"):
                self._save(state, evaluation, self._folder.best)
        return evaluation

    def _placed(self, fed: Fed) -> Fed:
        return dataclasses.replace(fed, arrays=devices.place(fed.arrays, self._mesh))

    def _evaluates_at(self, number: int) -> bool:
        every = self._config.train.eval_every or self._dataset.train.buckets.num_batches
        return self._dataset.eval is not None and (number % every == 0 or number == self._dataset.num_updates)

    def _stop(self, state: State, figures: np.ndarray, starts: Mapping[int, Mapping[str, Any]]) -> None:
        """Saves the batch of the update that failed; `starts` are the positions of the last updates' batches."""
        done = int(state.updates)
        batch = next(self._dataset.feed.walk(self._config.train.seed, starts[done + 1])).arrays
        loss, _, norm = figures[~np.isfinite(figures).all(axis=1)][0]
        folder = self._folder.save_failure(_mesh.gather(state), batch)
        raise TrainingStopped(
            f"update {done + 1}: loss {loss}, gradient norm {norm}. The update was not made; its batch and the state "
            f"before it lie in {folder}; `jpeft replay {shlex.quote(str(folder))}` computes it once more. "
            "A lower optimizer.lr or model.dtype=float32 may help, or train.on_nan=skip"
        )

    def _finish(self, state: State, evaluation: Evaluation | None, standing: Standing) -> None:
        """The run's adapter: the last one, or a copy of the best where one is followed."""
        best = self._config.train.best
        if best is None:
            self._save(state, evaluation, self._folder.adapter)
        else:
            self._folder.adopt_best()
            say(f"the best {best}, {standing.best:.4f}, was that of update {standing.update}")
        self._folder.finish()
        say(f"adapter: {self._folder.adapter}")

    def _save(self, state: State, evaluation: Evaluation | None, folder: Path) -> None:
        """Writes an adapter into `folder`, in the place of what was there, whole or not at all."""
        roll.at("the adapter's saving")
        trainable = _mesh.gather(state.served)  # by all processes
        if not devices.is_main():
            return
        trainable = jax.tree.map(jnp.asarray, trainable)
        model = combine(self._parts.graphdef, trainable, self._parts.frozen)
        save_trained(model, self._config, self._dataset, evaluation.metrics if evaluation else {}, folder)


def save_trained(model: Any, config: Config, dataset: job.Dataset, metrics: Mapping[str, Any], folder: Path) -> None:
    """Writes the adapter of a trained model into `folder`, in the place of what was there, whole or not at all."""
    data = config.data
    files = {"trained on": configuration.paths(data.train), "evaluated on": configuration.paths(data.eval)}
    said = [f"{what.capitalize()} {', '.join(Path(f).name for f in names)}." for what, names in files.items() if names]
    info = Info(dataset.label_names, dataset.max_length, config.model.quantize)
    with replaced(folder, sum(leaf.nbytes for leaf in partition(model)[1].values())) as fresh:
        card = Card(" ".join(said), metrics)
        save_adapter(model, fresh, config.model.path, info, card, config.method, dataset.template)
