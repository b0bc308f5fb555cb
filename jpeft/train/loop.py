# SPDX-License-Identifier: Apache-2.0
"""The training loop: what `jpeft train` runs.

The device runs ahead of the host: nothing is read back between two log lines. What training is made of at any moment
is one `step.State`, from which the next batch and dropout key follow; so whatever saves a state can go on from it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _mesh
from .._masks import optimizer
from .._partition import combine
from ..io.card import Card
from . import config as configuration
from . import devices, job
from .batches import Fed
from .config import Config
from .evaluate import Evaluation, Evaluator
from .folder import RunFolder, replaced
from .objective import training_sums
from .optim import make_optimizer
from .prefetch import Prefetch
from .progress import say
from .saved import Info, save_adapter
from .standing import Standing
from .step import State, begin, make_step
from .watch import Watch


class TrainingStopped(FloatingPointError):
    """A loss or gradient was not finite; the update was not made."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
      state: after the last update.
      evaluation: the last one, or None without evaluation data.
      losses: of every update.
      real_rate, padded_rate: tokens/s over the whole run, compilation and evaluation left out.
      adapter: folder of the saved adapter.
      standing: of the evaluations, where the configuration follows a figure of theirs.
    """

    state: State
    evaluation: Evaluation | None
    losses: list[float]
    real_rate: float
    padded_rate: float
    adapter: Path
    standing: Standing


def train(config: Config) -> Result:
    """Trains as configured, and saves the adapter.

    Raises:
      ConfigError, DataError, FileNotFoundError, FileExistsError, CheckpointError: before anything is trained.
      TrainingStopped: the loss was not finite.

    Example:
      >>> result = train(config.load("sst2.yaml", ["train.seed=1"]))
    """
    method = configuration.method(config.method)  # wrong options before minutes of reading
    folder = RunFolder(config.out, devices.is_main())
    dataset = job.read_data(config)
    _check_plan(method, dataset.num_updates)
    mesh = job.make_mesh(config)
    say(job.describe(config, dataset))
    parts = job.build(config, dataset.label_names, mesh)
    say(str(parts.summary))
    if parts.own_format is not None:
        say(f"the adapter will be saved in jpeft's own format, for PEFT's cannot hold it: {parts.own_format}")
    folder.begin(config, dataset, parts)
    return Loop(config, dataset, parts, mesh, folder).run()


def _check_plan(method: Any, num_updates: int) -> None:
    """Refuses a method that plans for a training of another length."""
    parts = getattr(method, "methods", (method,))
    planned = next((p.total_steps for p in parts if getattr(p, "total_steps", num_updates) != num_updates), None)
    if planned is not None:
        raise configuration.ConfigError(
            f"method.total_steps is {planned}, and this run makes {num_updates} updates; make the two equal, for the "
            "method plans its whole course by it"
        )


class Loop:
    """One run, from a state to its end."""

    def __init__(self, config: Config, dataset: job.Dataset, parts: job.Parts, mesh: Any, folder: RunFolder):
        self._config, self._dataset, self._parts, self._mesh, self._folder = config, dataset, parts, mesh, folder
        self._tx = optimizer(make_optimizer(config.optimizer, dataset.num_updates), model=parts.graphdef)
        sums, groups = training_sums(config), devices.num_groups(mesh)
        self._update = make_step(parts.graphdef, sums, self._tx, groups=groups, ema=config.train.ema)
        self._evaluate = Evaluator(parts.graphdef, config.model.task, mesh)
        self._key = job.dropout_key(config)

    def run(self, state: State | None = None, standing: Standing | None = None) -> Result:
        """Trains from `state`, by default from the beginning, and saves the adapter."""
        state = (
            begin(self._tx, self._parts.trainable, average=self._config.train.ema is not None)
            if state is None
            else state
        )
        done, seed = int(state.updates), self._config.train.seed
        watch = Watch(self._config, self._dataset, self._parts, self._folder, self._update, done, standing)
        losses: list[float] = []
        evaluation = None
        walk = self._dataset.train.walk(seed, self._dataset.train.position(seed, done))
        with Prefetch(walk, then=self._placed) as feed:
            for number, fed in zip(range(done + 1, self._dataset.num_updates + 1), watch.waiting(feed), strict=False):
                state, metrics = self._update(state, self._parts.frozen, fed.arrays, self._key)
                watch.update(metrics, fed.real, fed.padded)
                evaluates = self._evaluates_at(number)
                if watch.due(number) or evaluates:
                    if bool(state.failed):
                        self._stop(state, watch.pending_figures())
                    losses += watch.log(number)
                if evaluates:
                    evaluation = self._evaluation(number, state, watch)
                    if watch.exhausted:
                        break
        rates = watch.end()
        with watch.clock.on("save"):
            self._finish(state, evaluation, watch.standing)
        return Result(state, evaluation, losses, *rates, self._folder.adapter, watch.standing)

    def _evaluation(self, number: int, state: State, watch: Watch) -> Evaluation:
        """Evaluates, and keeps a copy of the adapter where it is the best so far."""
        assert self._dataset.eval is not None
        with watch.clock.on("evaluation"):
            evaluation = self._evaluate(state.served, self._parts.frozen, self._dataset.eval)
        watch.evaluated(number, evaluation)
        if watch.improved:
            with watch.clock.on("save"):
                self._save(state, evaluation, self._folder.best)
        return evaluation

    def _placed(self, fed: Fed) -> Fed:
        return dataclasses.replace(fed, arrays=devices.place(fed.arrays, self._mesh))

    def _evaluates_at(self, number: int) -> bool:
        every = self._config.train.eval_every or self._dataset.train.buckets.num_batches
        return self._dataset.eval is not None and (number % every == 0 or number == self._dataset.num_updates)

    def _stop(self, state: State, figures: np.ndarray) -> None:
        done, seed = int(state.updates), self._config.train.seed
        batch = next(self._dataset.train.walk(seed, self._dataset.train.position(seed, done))).arrays
        loss, _, norm = figures[~np.isfinite(figures).all(axis=1)][0]
        folder = self._folder.save_failure(_mesh.gather(state), batch)
        raise TrainingStopped(
            f"update {done + 1}: loss {loss}, gradient norm {norm}. The update was not made; its batch and the state "
            f"before it lie in {folder}. A lower optimizer.lr or model.dtype=float32 may help"
        )

    def _finish(self, state: State, evaluation: Evaluation | None, standing: Standing) -> None:
        """The run's adapter: the last one, or a copy of the best where one is followed."""
        best = self._config.train.best
        if best is None:
            self._save(state, evaluation, self._folder.adapter)
        else:
            self._folder.adopt_best()
            say(f"the best {best}, {standing.best:.4f}, was that of update {standing.update}")
        say(f"adapter: {self._folder.adapter}")

    def _save(self, state: State, evaluation: Evaluation | None, folder: Path) -> None:
        """Writes an adapter into `folder`, in the place of what was there, whole or not at all."""
        trainable = _mesh.gather(state.served)  # by all processes
        if not devices.is_main():
            return
        trainable = jax.tree.map(jnp.asarray, trainable)
        config, data = self._config, self._config.data
        files = {"trained on": configuration.paths(data.train), "evaluated on": configuration.paths(data.eval)}
        said = [
            f"{what.capitalize()} {', '.join(Path(f).name for f in names)}." for what, names in files.items() if names
        ]
        card = Card(" ".join(said), evaluation.metrics if evaluation else {})
        model = combine(self._parts.graphdef, trainable, self._parts.frozen)
        info = Info(self._dataset.label_names, data.max_length, config.model.quantize)
        with replaced(folder) as fresh:
            save_adapter(model, fresh, config.model.path, info, card, config.method)


def dry_run(config: Config) -> str:
    """What a run would be, without loading weights: data, shapes, counts. Raises what `train` would before training."""
    dataset = job.read_data(config)
    job.make_mesh(config)
    return "\n".join([job.describe(config, dataset), str(job.count(config, dataset.label_names))])
