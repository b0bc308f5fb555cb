# SPDX-License-Identifier: Apache-2.0
"""Makes what of a sweep is not made yet.

  OUT/sweep.json              what is tried, resolved
  OUT/legs/ROUND-RUNG-CHUNK/  lanes between two comparisons: leg.json when they are through, checkpoints before
  OUT/trials/NAME.json        a trial: its values, losses, evaluations, and how it ended
  OUT/table.csv, report.json, report.md, best.yaml, plots/

A sweep that was cut off is called again: legs that are through are not repeated, and one that was cut off goes on from
its last checkpoint.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...models._files import read_json, write_text
from .. import config as configuration
from .. import devices
from ..config import ConfigError
from ..step import State
from . import bayes, groups, halving, lanes, space
from .lanes import Programs
from .material import Material
from .space import Sweep, Trial


@dataclasses.dataclass
class Made:
    """A trial and what became of it.

    Attributes:
      trial: what was trained.
      losses: of every update.
      evaluations: `{"update": ..., "loss": ..., ...}`.
      status: `finished`, `dropped` by a comparison, or `diverged`.
      updates: of its whole training.
    """

    trial: Trial
    losses: list[float] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    status: str = "training"
    updates: int = 0

    def score(self, figure: str) -> float | None:
        """Its last one; None where it diverged."""
        return None if self.status == "diverged" else self.evaluations[-1][figure]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a sweep took: seconds of its legs, programs compiled, lanes of every leg, and what it ran on."""

    seconds: float
    compiled: int
    lanes: tuple[int, ...]
    devices: tuple[str, ...]


class Conduct:
    """A sweep being made.

    Args:
      sweep: what is tried.
      say: is told of every leg.

    Raises:
      ConfigError: the folder holds another sweep, or something else.
    """

    def __init__(self, sweep: Sweep, say: Callable[[str], None] = print):
        self._sweep, self._say = sweep, say
        self._out = Path(sweep.out)
        self._material, self._programs = Material(), Programs()
        self._states: dict[str, State] = {}
        self._held: dict[str, tuple[list[Trial], Path, int]] = {}  # where a trial's state lies on the disk
        self._legs: list[dict[str, Any]] = []
        if sweep.search == "bayes":
            bayes.check()
        _begin(sweep, self._out)

    def run(self) -> list[Made]:
        """All trials, trained as far as they were to be.

        Raises:
          ConfigError: the budget is too small to be halved.
          Interrupted: by a signal; called again, the sweep goes on.
        """
        made: list[Made] = []
        for number, points in enumerate(self._rounds(made)):
            first = len({m.trial.point for m in made})
            trials = [
                trial for at, values in enumerate(points, first) for trial in space.trials(self._sweep, at, values)
            ]
            made += self._round(number, trials)
        for leg in (self._out / "legs").glob("*/checkpoints"):
            shutil.rmtree(leg)
        return made

    @property
    def cost(self) -> Cost:
        """Of what was made, now and before."""
        seconds, compiled = (sum(leg[key] for leg in self._legs) for key in ("seconds", "compiled"))
        ran_on = tuple(sorted({leg["device"] for leg in self._legs}))
        return Cost(seconds, compiled, tuple(len(leg["trials"]) for leg in self._legs), ran_on)

    def _rounds(self, made: Sequence[Made]) -> Any:
        sweep = self._sweep
        if sweep.search != "bayes":
            yield space.points(sweep)
            return
        left = sweep.trials or 0
        while left:
            count = min(sweep.batch, left)
            yield bayes.propose(sweep, _known(sweep, made), count)
            left -= count

    def _round(self, number: int, trials: Sequence[Trial]) -> list[Made]:
        """Trials from their beginning to their ends, with the comparisons between."""
        sweep, found = self._sweep, {trial.name: Made(trial) for trial in trials}
        dealt = halving.brackets(sweep.halving, list(dict.fromkeys(trial.point for trial in trials)))
        stops = {}
        for trial in trials:
            updates = self._material.dataset(trial.config).num_updates
            stops[trial.name], found[trial.name].updates = halving.stops(sweep.halving, updates), updates
        rungs = 0 if sweep.halving is None else sweep.halving.rungs
        for rung in range(rungs + 1):
            alive = [m.trial for m in found.values() if m.status == "training"]
            for at, chunk in enumerate(groups.chunks(alive, sweep.lanes, self._material.dataset)):
                span = (stops[chunk[0].name][rung - 1] if rung else 0), stops[chunk[0].name][rung]
                self._leg(f"{number:03d}-{rung}-{at:03d}", chunk, span, found, last=rung == rungs)
            if rung < rungs:
                assert sweep.halving is not None
                self._compare(halving.survivors(sweep.halving, rung, dealt, _scores(sweep, found.values())), found)
            for m in found.values():
                if m.status == "training" and rung == rungs:
                    m.status = "finished"
                self._write(m)
        return [*found.values()]

    def _leg(self, name: str, chunk: list[Trial], span: tuple[int, int], found: dict[str, Made], *, last: bool) -> None:
        """Lanes between two comparisons: trained, or read where they are through."""
        folder, names = self._out / "legs" / name, [trial.name for trial in chunk]
        plan = {"trials": names, "start": span[0], "stop": span[1]}
        told = self._through(folder, plan)
        if told is None:
            self._say(f"{len(chunk)} trials, updates {span[0] + 1} to {span[1]}: {', '.join(names[:4])}"
                      + (" ..." if len(names) > 4 else ""))  # fmt: skip
            states = [self._state(trial) for trial in chunk] if span[0] else None
            folder.mkdir(parents=True, exist_ok=True)
            leg = lanes.train(chunk, self._material, self._programs, states, span, folder, last=last)
            told = plan | {
                "lanes": [
                    {"losses": [x if math.isfinite(x) else None for x in losses], "evaluations": evaluations,
                     "failed": failed}
                    for losses, evaluations, failed in zip(leg.losses, leg.evaluations, leg.failed, strict=True)
                ],
                "seconds": round(leg.seconds, 3), "compiled": leg.compiled,
                "compile_seconds": round(leg.compile_seconds, 3),
                "device": devices.described(),
            }  # fmt: skip
            write_text(folder / "leg.json", json.dumps(told) + "\n")
            self._states |= {} if last else dict(zip(names, leg.states, strict=True))
        self._held |= {} if last else dict.fromkeys(names, (chunk, folder, span[1]))
        self._legs.append(told)
        for trial_name, lane in zip(names, told["lanes"], strict=True):
            made = found[trial_name]
            made.losses += lane["losses"]
            made.evaluations += lane["evaluations"]
            if lane["failed"]:
                made.status = "diverged"

    def _through(self, folder: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
        """What a leg came to, if it is through."""
        if not (folder / "leg.json").is_file():
            return None
        told = read_json(folder / "leg.json")
        if any(told[key] != value for key, value in plan.items()):
            raise ConfigError(f"{folder} is of other trials; give another out=")
        return told

    def _state(self, trial: Trial) -> State:
        """Where a trial stands; taken, for it is put into its next leg."""
        if trial.name not in self._states:
            chunk, folder, stop = self._held[trial.name]
            states = lanes.restored(chunk, self._material, folder, stop)
            self._states |= {own.name: state for own, state in zip(chunk, states, strict=True)}
        return self._states.pop(trial.name)

    def _compare(self, kept: Sequence[int], found: dict[str, Made]) -> None:
        """Drops the trials of points that do not go on."""
        for made in found.values():
            if made.status == "training" and made.trial.point not in kept:
                made.status = "dropped"
                self._states.pop(made.trial.name, None)
        self._say(f"{len(kept)} points go on")

    def _write(self, made: Made) -> None:
        """One JSON a trial."""
        trial = made.trial
        told = {
            "name": trial.name, "point": trial.point, "seed": trial.seed, "values": trial.values,
            "status": made.status, "updates": len(made.losses), "of": made.updates,
            "evaluations": made.evaluations, "losses": made.losses, "config": configuration.plain(trial.config),
        }  # fmt: skip
        (self._out / "trials").mkdir(exist_ok=True)
        write_text(self._out / "trials" / f"{trial.name}.json", json.dumps(told, indent=1) + "\n")


def _scores(sweep: Sweep, made: Any) -> dict[int, float | None]:
    """Of every point that is still trained: the mean over its seeds, more being better; None where one diverged."""
    points: dict[int, list[Made]] = {}
    for one in made:
        points.setdefault(one.trial.point, []).append(one)
    sign = 1 if sweep.better(1.0, 0.0) else -1
    out: dict[int, float | None] = {}
    for point, ones in points.items():
        if any(one.status == "dropped" for one in ones):
            continue
        scores = [one.score(sweep.figure) for one in ones]
        out[point] = None if None in scores else sign * float(np.mean([s for s in scores if s is not None]))
    return out


def _known(sweep: Sweep, made: Sequence[Made]) -> list[bayes.Known]:
    """What optuna is told."""
    points: dict[int, list[Made]] = {}
    for one in made:
        points.setdefault(one.trial.point, []).append(one)
    out = []
    for ones in points.values():
        sound = all(one.status != "diverged" for one in ones)
        at = zip(*(one.evaluations for one in ones), strict=False) if sound else ()
        scores = [(now[0]["update"], float(np.mean([e[sweep.figure] for e in now]))) for now in at]
        ended = None if not sound else all(one.status == "finished" for one in ones)
        out.append(bayes.Known(ones[0].trial.values, scores, ended))
    return out


def _begin(sweep: Sweep, out: Path) -> None:
    """Writes down what is tried, or checks that it is what the folder was begun with."""
    values, file = json.loads(json.dumps(dataclasses.asdict(sweep))), out / "sweep.json"
    if file.exists():
        before = read_json(file)
        changed = [key for key in values if before.get(key) != values[key]]
        if changed:
            raise ConfigError(f"{out} was begun with another {', '.join(changed)}; give another out=")
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds something that is no sweep; give another out=")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(values, indent=2) + "\n")
