# SPDX-License-Identifier: Apache-2.0
"""The rank x rate study trained together and one by one: seconds, compilations, and whether the losses are the same.

    export JPEFT_DATA=path/to/data MINILM=path/to/all-MiniLM-L6-v2
    taskset -c 0,1 python benchmarks/sweep.py [--alone 3] [--out runs/sweep_benchmark] [STUDY.yaml]

Whole processes: `jpeft sweep STUDY.yaml` from its start to its table, against `jpeft train` on `--alone` of its trials,
spread evenly over them, with the same updates and one evaluation at the end; all trials are taken to need the mean of
these. The losses of every update are compared. A process whose time is known (OUT/*.json) is not run again.

Of processes both the time and the seconds of computing are given: on a machine that others use, the latter say more.

Steps alone (`--steps` makes nothing else): the lanes of one seed in their one compiled step, against `jpeft train`'s
step of one trial of each method among them, in this process, in turns, compiled beforehand; medians.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jpeft import partition
from jpeft.train import config, devices, job
from jpeft.train.many import fix, join, make_step_many
from jpeft.train.objective import objective
from jpeft.train.step import make_step
from jpeft.train.sweep import lanes, space
from jpeft.train.sweep.groups import numbers
from jpeft.train.sweep.material import Material, stack


def main(study: str, alone: int, out: Path, turns: int) -> None:
    """Makes what is not made yet, and prints and writes the figures."""
    out.mkdir(parents=True, exist_ok=True)
    sweep = space.load(study, [f"out={out / 'together'}"])
    trials = [trial for at, point in enumerate(space.points(sweep)) for trial in space.trials(sweep, at, point)]
    together = timed(["sweep", study, f"out={sweep.out}"], out / "together.json")
    legs = [json.loads(file.read_text()) for file in sorted(Path(sweep.out).glob("legs/*/leg.json"))]
    found = [one_by_one(trials[at], sweep, out) for at in np.linspace(0, len(trials) - 1, alone).round().astype(int)]
    mean = {key: float(np.mean([run[key] for run in found])) for key in ("seconds", "cpu_seconds")}
    result = {
        "trials": len(trials),
        "updates": legs[0]["stop"],
        "together": together
        | {
            "lanes": [len(leg["trials"]) for leg in legs],
            "compiled_steps": sum(leg["compiled"] for leg in legs),
            "compile_seconds": round(sum(leg["compile_seconds"] for leg in legs), 1),
        },
        "alone": found,
        "speed_up": {key: round(mean[key] * len(trials) / together[key], 2) for key in mean},
        "steps": steps([trial for trial in trials if trial.seed == sweep.seeds[0]][: sweep.lanes], turns),
        "largest_relative_error_of_losses": max(run["error"] for run in found),
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "date": time.strftime("%Y-%m-%d"),
    }
    (out / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def one_by_one(trial: space.Trial, sweep: space.Sweep, out: Path) -> dict[str, Any]:
    """A trial by `jpeft train`, and how far its losses are from those in the sweep."""
    folder, file = out / "alone" / trial.name, out / "alone" / f"{trial.name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(config.dump(trial.config))
    last = [f"out={folder}", "train.log_every=1", f"train.eval_every={trial.config.train.max_steps}"]
    run = timed(["train", str(file), *last], file.with_suffix(".json"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    theirs = json.loads((Path(sweep.out) / "trials" / f"{trial.name}.json").read_text())["losses"]
    apart = np.abs(np.subtract(theirs, losses)).max() / np.abs(losses).max()
    return {"name": trial.name, **run, "error": float(apart)}


def timed(arguments: list[str], file: Path) -> dict[str, Any]:
    """Seconds of `jpeft ...` in a process of its own, and the machine's load before and after, kept in `file`."""
    if not file.exists():
        start, load, before = time.perf_counter(), os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "jpeft.train.program", *arguments], check=True)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        told = {"seconds": round(seconds, 1), "cpu_seconds": round(computed, 1)}
        told["load"] = [round(x, 1) for x in (load, os.getloadavg()[0])]
        file.write_text(json.dumps(told) + "\n")
    return json.loads(file.read_text())


def steps(trials: list[space.Trial], turns: int) -> dict[str, Any]:
    """Milliseconds of one update of all lanes together, and of one of each method alone, at the widest rows."""
    material, options = Material(), trials[0].config
    dataset = material.dataset(options)
    widest = max(dataset.train.buckets.epoch(0, 0), key=lambda batch: batch.width)
    batch, key = devices.place(dataset.train.collate(widest), None), job.dropout_key(options)
    models = [material.model(trial.config) for trial in trials]
    bank, states = (
        stack(models),
        [lanes.first_state(t.config, material, m) for t, m in zip(trials, models, strict=True)],
    )
    given = {name: [numbers(trial.config)[name] for trial in trials] for name in numbers(options)}
    tx, (sums, _) = lanes.optimizer_of(options, dataset.num_updates, bank.graphdef), objective(options)
    start = time.perf_counter()
    runs = [stepping(make_step_many(bank, sums, tx), join(states), fix(bank, given), batch, key)]
    compiling = [time.perf_counter() - start]
    kinds = {str(trial.config.method): at for at, trial in enumerate(trials)}
    for at in kinds.values():
        graphdef, _, frozen = partition(models[at])
        own = lanes.optimizer_of(trials[at].config, dataset.num_updates, graphdef)(**numbers(trials[at].config))
        start = time.perf_counter()
        runs.append(stepping(make_step(graphdef, sums, as_lane(own)), states[at], frozen, batch, key))
        compiling.append(time.perf_counter() - start)
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(turns):
        for run, times in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
    middle, least = [statistics.median(times) for times in taken], [min(times) for times in taken]
    return {
        "lanes": len(trials),
        "rows": [int(n) for n in batch["input_ids"].shape[1:]],
        "together_ms": round(middle[0], 1),
        "alone_ms": [round(x, 1) for x in middle[1:]],
        "speed_up": round(statistics.mean(middle[1:]) * len(trials) / middle[0], 2),
        "speed_up_of_fastest_turns": round(statistics.mean(least[1:]) * len(trials) / least[0], 2),
        "compile_s": [round(x, 1) for x in compiling],
        "load": round(os.getloadavg()[0], 1),
    }


def as_lane(tx: Any) -> Any:
    """With the empty state that a lane's optimizer has at its end."""
    return optax.chain(tx, optax.stateless(lambda updates, _: updates))


def stepping(update: Any, state: Any, frozen: Any, batch: Any, key: Any) -> Callable[[], None]:
    """Makes one update on, and waits for it; compiled here."""
    held = [jax.tree.map(jax.numpy.array, state)]

    def run() -> None:
        held[0], metrics = update(held[0], frozen, batch, key)
        jax.block_until_ready((held[0], metrics))

    run()
    return run


def processor() -> str:
    """The processor's name."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", default="benchmarks/studies/rank_rate.yaml")
    parser.add_argument("--alone", type=int, default=3)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep_benchmark"))
    parser.add_argument("--steps", action="store_true")
    given = parser.parse_args()
    if given.steps:
        study = space.load(given.study)
        points = space.points(study)[: study.lanes]
        print(json.dumps(steps([space.trials(study, i, p)[0] for i, p in enumerate(points)], given.turns), indent=1))
    else:
        main(given.study, given.alone, given.out, given.turns)
