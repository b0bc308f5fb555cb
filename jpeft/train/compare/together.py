# SPDX-License-Identifier: Apache-2.0
"""Runs of a study that are trained in one compiled step, a lane each; each leaves what its training alone would leave.

The lanes are those of `jpeft sweep` (`sweep.lanes`): the base is read and held once and one step is compiled for all,
while every run has its own start, batches, dropout, rate and optimizer. What a run takes in time or memory when it is
by itself cannot be seen so; the FLOPs and the memory of its step are those of the step that would train it alone, which
is compiled and not run.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._partition import combine, partition
from ..._summary import Summary, summary
from .. import job, loop, plan
from ..config import Config
from ..step import Cost, State
from ..sweep import groups, lanes
from ..sweep.lanes import Programs
from ..sweep.material import Material
from ..sweep.space import Trial


@dataclasses.dataclass(frozen=True)
class Lane:
    """A run that was trained with others.

    Attributes:
      config, dataset: what it was trained by, and on.
      lanes: how many were trained in its step.
      adapter: folder of the saved adapter.
      curve: its evaluations, `{"update": ..., "loss": ..., ...}`; the last one is at the end.
      counts: of its adapter.
      cost: of the step that would train it alone; None where the backend does not tell.
      failed: what was not finite; None where all was, and else no adapter is saved.
    """

    config: Config
    dataset: job.Dataset
    lanes: int
    adapter: Path
    curve: list[dict[str, Any]]
    counts: Summary
    cost: Cost | None
    failed: str | None


def train(configs: Sequence[Config]) -> list[Lane]:
    """Trains all, those in one step that one step takes, and saves each one's adapter in its folder `out`.

    Rows of several widths have another order for every seed, so that seeds then have steps of their own; what else
    keeps two apart stands in `sweep.groups`.

    Raises:
      ConfigError, DataError, FileNotFoundError: before anything is trained.
      Interrupted: by a signal; nothing is kept.
    """
    material, programs = Material(), Programs()
    trials = [Trial(at, {}, config.train.seed, config) for at, config in enumerate(configs)]
    found: dict[int, Lane] = {}
    for chunk in groups.chunks(trials, len(trials), material.dataset):
        found |= _trained(chunk, material, programs)
    return [found[at] for at in range(len(configs))]


def _trained(chunk: list[Trial], material: Material, programs: Programs) -> dict[int, Lane]:
    """One lot of lanes, by the number of the run."""
    first = chunk[0].config
    dataset, folder = material.dataset(first), Path(first.out) / "lanes"
    leg = lanes.train(chunk, material, programs, None, (0, dataset.num_updates), folder, last=False)
    shutil.rmtree(folder)
    cost, found = plan.cost(first, dataset), {}
    for trial, state, losses, curve, failed in zip(
        chunk, leg.states, leg.losses, leg.evaluations, leg.failed, strict=True
    ):
        config, adapter = trial.config, Path(trial.config.out) / "adapter"
        model = _filled(material.model(config), state)
        why = _why(losses) if failed else None
        if why is None:
            loop.save_trained(model, config, material.dataset(config), curve[-1], adapter)
        found[trial.point] = Lane(
            config, material.dataset(config), len(chunk), adapter, curve, summary(model), cost, why
        )
    return found


def _filled(model: Any, state: State) -> Any:
    """A model at its start with what was trained in its place."""
    graphdef, _, frozen = partition(model)
    return combine(graphdef, jax.tree.map(jnp.asarray, state.served), frozen)


def _why(losses: Sequence[float]) -> str:
    """What was not finite, of a run that failed."""
    lost = np.flatnonzero(~np.isfinite(losses))
    if not lost.size:
        return f"a gradient in {len(losses)} updates or an evaluation was not finite"
    return f"update {lost[0] + 1}: loss {losses[lost[0]]}. The update was not made, and none after it"
