# SPDX-License-Identifier: Apache-2.0
"""Makes the runs of a study that are not made yet, each in a process of its own.

A process of its own gives every run clean memory, so that its peak is its own, and lets nothing but the run fail. A
study that was killed is called again: runs with a result are not repeated, and one that was cut off begins anew. A run
that stopped because its loss was not finite has that for its result. With `lanes`, runs of one method share a process.

  STUDY/study.json                  what is compared, resolved
  STUDY/runs/TASK/MODEL/METHOD/.../ plan.json, result.json and the training's own folder
  STUDY/chosen.json                 what the trials chose for each method
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models._files import write_text
from .. import config as configuration
from . import study as studies
from . import writing
from .study import Run, Study

#: What a process is asked for; the folders of its runs follow.
COMMAND = (sys.executable, "-m", "jpeft.train.compare.measure")

Key = tuple[str, str, str]

#: Keys of a study that may change while it is made: what is compared stays the same.
_FREE = ("seeds", "methods", "sizes", "lanes")


class RunFailed(RuntimeError):
    """A run ended without a result; the study can be called again."""


@dataclasses.dataclass(frozen=True)
class Done:
    """A run and its result."""

    run: Run
    result: dict[str, Any]


def conduct(
    study: Study, say: Callable[[str], None] = print, command: Sequence[str] = COMMAND, *, only_made: bool = False
) -> list[Done]:
    """Makes all runs that are not made yet, and gives the final ones with their results.

    Args:
      study: what is compared.
      say: is told of every run that is made.
      command: a process, to which the folders of its runs are added.
      only_made: makes none.

    Raises:
      ConfigError: the folder holds another study.
      RunFailed: a run's process ended without a result; or a run is not made, and `only_made`.
    """
    out = Path(study.out)
    _begin(study, out)

    def made(runs: Sequence[Run]) -> list[Done]:
        return _made(study, runs, out, say, () if only_made else command)

    trials = made(studies.trials(study))
    chosen = choose(trials, study.tune_by)
    if chosen:
        lines = {" / ".join(key): values for key, values in chosen.items()}
        write_text(out / "chosen.json", json.dumps(lines, indent=2) + "\n")
    return made(studies.finals(study, chosen))


def choose(trials: Sequence[Done], by: str | None = None) -> dict[Key, Mapping[str, Any]]:
    """The values of the best trial for each (model, task, method); of equals the first.

    Args:
      trials: with their results.
      by: figure on data.eval; None is accuracy, or the loss where there is none.

    Raises:
      RunFailed: all trials of one diverged.
    """
    best: dict[Key, Done] = {}
    keys = dict.fromkeys((d.run.model, d.run.task, d.run.method) for d in trials)
    for done in trials:
        key = (done.run.model, done.run.task, done.run.method)
        if "failed" in done.result:
            continue
        if key not in best or _merit(done, by) > _merit(best[key], by):
            best[key] = done
    lost = [" / ".join(key) for key in keys if key not in best]
    if lost:
        raise RunFailed(f"all trials of {', '.join(lost)} diverged; give tune other values")
    return {key: best[key].run.trial or {} for key in keys}


def _merit(done: Done, by: str | None) -> float:
    metrics = done.result["eval"]
    by = by or ("accuracy" if "accuracy" in metrics else "loss")
    return -metrics[by] if by == "loss" else metrics[by]


def _begin(study: Study, out: Path) -> None:
    """Writes down what is compared, or checks that it is what the folder was begun with."""
    values, file = _values(study), out / "study.json"
    if file.exists():
        before = _begun(file)
        changed = [key for key in values if before.get(key) != values[key] and key not in _FREE]
        if changed:
            raise studies.ConfigError(
                f"{out} was begun with another {', '.join(changed)}; what is compared is the same for all its runs "
                "(methods, seeds and sizes may be added, and lanes be others); give another out="
            )
    elif out.exists() and any(out.iterdir()):
        raise studies.ConfigError(f"{out} holds something that is no study; give another out=")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(values, indent=2) + "\n")


def _values(study: Study) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(study)))


def _begun(file: Path) -> dict[str, Any]:
    """What a folder was begun with; keys that studies did not have then are at their defaults."""
    try:
        return _values(configuration.validated(Study, json.loads(file.read_text(encoding="utf-8"))))
    except studies.ConfigError as error:
        raise studies.ConfigError(f"{file} is no study: {error}; give another out=") from error


def _made(
    study: Study, runs: Sequence[Run], out: Path, say: Callable[[str], None], command: Sequence[str]
) -> list[Done]:
    """The runs with their results, which are made if they are not there."""
    plans = {run.folder: _plan(study, run) for run in runs}
    results = {
        where: known for where, plan in plans.items() if (known := _known(out / "runs" / where, plan)) is not None
    }
    for lot in lots([run for run in runs if run.folder not in results], study.lanes):
        results |= _make({run.folder: plans[run.folder] for run in lot}, out / "runs", say, command)
    return [Done(run, results[run.folder]) for run in runs]


def _make(
    plans: Mapping[Path, dict[str, Any]], out: Path, say: Callable[[str], None], command: Sequence[str]
) -> dict[Path, dict[str, Any]]:
    """The results of runs that share a process, by folder; its log.txt is in the first one's."""
    first = out / next(iter(plans))
    if not command:
        raise RunFailed(f"{first} is not made yet; without --report the study makes it")
    for where, plan in plans.items():
        say(f"run: {where}")
        (out / where).mkdir(parents=True, exist_ok=True)
        write_text(out / where / "plan.json", json.dumps(plan, indent=2) + "\n")
    with (first / "log.txt").open("wb") as log:
        asked = [*command, *(str(out / where) for where in plans)]
        code = subprocess.run(asked, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    results = {}
    for where, plan in plans.items():
        known = _known(out / where, plan)
        if known is None:
            tail = "\n".join((first / "log.txt").read_text(errors="replace").splitlines()[-5:])
            raise RunFailed(
                f"{out / where} ended with exit code {code} and no result; {first / 'log.txt'} ends with\n{tail}"
            )
        say(f"     {_said(known)}")
        results[where] = known
    return results


def lots(runs: Sequence[Run], limit: int) -> list[list[Run]]:
    """Runs that share a process: of one method, model, task and number of rows, at most `limit`; the base by itself."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        alone = run.seed if run.method == "untuned" else None
        groups.setdefault((run.task, run.model, run.method, run.size, alone), []).append(run)
    out = []
    for group in groups.values():
        size = -(-len(group) // -(-len(group) // limit))
        out += [group[at : at + size] for at in range(0, len(group), size)]
    return out


def _plan(study: Study, run: Run) -> dict[str, Any]:
    """What a run's process is to do, as plain values."""
    task, tested = study.tasks[run.task], run.trial is None
    plan = {
        "config": run.config,
        "trained": run.method != "untuned",
        "size": run.size,
        "target": task.target,
        "test": configuration.paths(task.test) if tested else (),
        "general": task.general if tested else None,
        "group": task.group if tested else None,
    }
    if task.write is not None and tested:
        (file,) = plan["test"]
        settings = dataclasses.replace(task.writing, data=file, seed=run.seed)
        main = writing.main_figure(task.write, task.metric, settings)
        plan["write"] = {"task": task.write, "main": main, "settings": dataclasses.asdict(settings)}
    return json.loads(json.dumps(plan))


def _known(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a run that was made by the same plan."""
    if not (folder / "result.json").is_file():
        return None
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["plan"] != plan:
        raise studies.ConfigError(f"{folder} was made by another plan (see plan.json); delete it, or give another out=")
    return result


def _said(result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return f"diverged: {result['failed']}"
    metrics = result.get("test") or result["eval"]
    figures = (
        f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float) and name != "seconds"
    )
    return ", ".join([*figures, f"{result['seconds']:.0f} s"])
