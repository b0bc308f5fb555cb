# SPDX-License-Identifier: Apache-2.0
"""A process of a study: one run, or several in one compiled step, trained, tested, timed and weighed, a JSON each.

`python -m jpeft.train.compare.measure FOLDER ...` reads FOLDER/plan.json (see `runner`) and writes FOLDER/result.json:

  plan           what was done
  eval, test     figures of merit on data.eval and on the test split
  outcome        the answer to every test example, and `groups` what group it is of
  parameters, training, memory, latency_ms, adapter_kb, forgetting, calibration_error, collapsed, largest_gap
  curve          the evaluations on the way
  lanes          how many were trained in one step, where several were; what a run takes in time is then left out, and
                 latency is of the first alone
  failed         in the place of all these, where the loss was not finite

and, where texts are written, FOLDER/texts.json: the record of `jpeft eval`, with every prompt and text.
"""

import dataclasses
import importlib.metadata
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...models._files import read_json, write_text
from .. import config as configuration
from .. import data, devices, job, loop, saved, tasks, utilization
from ..config import Config
from ..feed import Feed
from ..sections import Data
from ..step import Cost
from ..tasks import running
from ..tasks.settings import Settings
from . import fewer, latency, together
from .judge import judge
from .outcomes import Outcome, Written

_VERSIONS = ("jpeft", "jax", "flax", "optax")


def main(*paths: Path) -> None:
    """Makes the runs that the plan.json of each folder describes, in one compiled step where they are several."""
    plans = [read_json(path / "plan.json") for path in paths]
    started = time.time()
    for path, plan, result in zip(paths, plans, results(plans, paths), strict=True):
        result |= {
            "plan": plan,
            "seconds": round(time.time() - started, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": devices.described(),
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        }
        write_text(path / "result.json", json.dumps(result, allow_nan=False) + "\n")


def results(plans: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """What each run comes to, one after another; `{"failed": why}` where a loss or an answer was not finite."""
    if len(plans) == 1:
        yield _or_failed(lambda: measured(plans[0], paths[0]))
        return
    configs = [_configured(plan, path) for plan, path in zip(plans, paths, strict=True)]
    for at, (plan, path, lane) in enumerate(zip(plans, paths, together.train(configs), strict=True)):
        if lane.failed:
            yield {"failed": lane.failed}
            continue

        def tested(plan: Any = plan, path: Path = path, lane: together.Lane = lane, first: bool = at == 0) -> Any:
            return _of_lane(lane) | _tested(plan, path, lane.config, lane.dataset, lane.adapter, timed=first)

        yield _or_failed(tested)


def _or_failed(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return make()
    except (loop.TrainingStopped, FloatingPointError) as error:
        return {"failed": str(error)}


def measured(plan: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a run comes to that is trained by itself.

    Raises:
      TrainingStopped, FloatingPointError: a loss or an answer is not finite.
    """
    config = _configured(plan, path)
    dataset = job.read_data(config)
    if not plan["trained"]:
        return _tested(plan, path, config, dataset, None)
    result = loop.train(config)
    found = _of_training(result, Path(config.out), dataset, plan["target"])
    return found | _tested(plan, path, config, dataset, result.adapter)


def _configured(plan: Mapping[str, Any], path: Path) -> Config:
    """A run's configuration; what an end in the middle left in its folder is removed."""
    out = path / "train"
    if out.exists():
        shutil.rmtree(out)
    config = configuration.parse({**plan["config"], "out": str(out)})
    return config if plan["size"] is None else fewer.fewer(config, plan["size"], path / "rows.jsonl")


def _tested(
    plan: Mapping[str, Any], path: Path, config: Config, dataset: job.Dataset, adapter: Path | None, *,
    timed: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """What the adapter, as it was saved, or the base, makes of the test split; nothing for a trial."""
    found: dict[str, Any] = {}
    if not plan["test"]:
        return found
    opened = saved.open_model(config.model.path, adapter)
    if "write" in plan:
        outcome = _written(opened, plan["write"], path)
    else:
        test = _batches(config, dataset, {"eval": tuple(plan["test"]), "on_bad_row": "stop"})
        outcome = judge(opened.model, test)
    found |= {
        "test": outcome.scores(),
        "outcome": outcome.saved(),
        "collapsed": outcome.collapsed,
        "calibration_error": outcome.calibration_error,
    }
    if timed:
        found["latency_ms"] = latency.latencies(opened.model, dataset.train.buckets.widths[-1])
    if plan["group"] is not None:
        found |= _by_group(outcome, _groups(config, plan["test"], plan["group"]))
    if dataset.label_names is not None:
        labels = np.array(dataset.train.examples.labels)
        found["train_labels"] = np.bincount(labels, minlength=len(dataset.label_names)).tolist()
        found["label_names"] = list(dataset.label_names)
    if plan["general"] is not None:
        found["forgetting"] = _forgetting(opened, config, dataset, plan["general"])
    return found


def _written(opened: saved.Opened, how: Mapping[str, Any], path: Path) -> Written:
    """What a model writes for the test rows, by a task of `jpeft eval`; its record is kept in texts.json."""
    found = running.measure(how["task"], tasks.find(how["task"]), opened, Settings(**how["settings"]))
    record = json.dumps(found.record, indent=1, ensure_ascii=False, default=str)
    write_text(path / "texts.json", record + "\n")
    return Written((*found.values,), np.array([*found.values.values()], float), how["main"])


def _of_training(result: loop.Result, out: Path, dataset: job.Dataset, target: float | None) -> dict[str, Any]:
    """Parameters, rates, memory, the adapter's size and the evaluations on the way."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    curve = [
        {"update": line["update"], "seconds": line["seconds"]}
        | {key.removeprefix("eval_"): value for key, value in line.items() if key.startswith("eval_")}
        for line in lines
        if "eval_loss" in line
    ]
    record, cost = json.loads((out / "run.json").read_text(encoding="utf-8")), result.cost
    mfus = [line["mfu"] for line in steps if line.get("mfu") is not None]
    sizes = [sum(two) for two in zip(*map(dataset.train.sizes, dataset.train.buckets.epoch(0, 0)), strict=True)]
    padded = sizes[1] / dataset.train.buckets.num_batches
    return {
        "eval": next((p for p in curve if p["update"] == result.standing.update), curve[-1] if curve else None),
        "curve": curve,
        "parameters": _parameters(record),
        "training": {
            "updates": dataset.num_updates,
            "tokens_per_s": result.real_rate,
            "padded_tokens_per_s": result.padded_rate,
            "step_ms": 1000 * padded / result.padded_rate,
            "gflop_step": None if cost is None else cost.flops / 1e9,
            "mfu_percent": 100 * float(np.median(mfus)) if mfus else None,
            "compile_s": result.clock.spent["compile"],
            "to_target_s": _reached(curve, target),
        },
        "memory": {
            "peak_mb": utilization.peak_bytes() / 2**20,
            **_program(cost),
        },
        "adapter_kb": _size_kb(result.adapter),
    }


def _of_lane(lane: together.Lane) -> dict[str, Any]:
    """Of a run that was trained with others, what is its own."""
    return {
        "lanes": lane.lanes,
        "eval": lane.curve[-1],
        "curve": lane.curve,
        "parameters": _parameters({key: getattr(lane.counts, key) for key in ("trainable", "changed", "base")}),
        "training": {
            "updates": lane.dataset.num_updates,
            "gflop_step": None if lane.cost is None else lane.cost.flops / 1e9,
        },
        "memory": _program(lane.cost),
        "adapter_kb": _size_kb(lane.adapter),
    }


def _parameters(counts: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: counts[key] for key in ("trainable", "changed", "base")}
    return shown | {"percent": 100 * counts["trainable"] / counts["base"]}


def _program(cost: Cost | None) -> dict[str, Any]:
    """Megabytes of a compiled step, whole and in parts."""
    return {
        "program_mb": None if cost is None else (cost.arguments + cost.temporaries) / 2**20,
        "parts_mb": None if cost is None else _parts(cost),
    }


def _size_kb(adapter: Path) -> float:
    return sum(file.stat().st_size for file in adapter.glob("*.safetensors")) / 2**10


def _parts(cost: Cost) -> dict[str, float]:
    return {
        "base and batch": (cost.arguments - cost.donated) / 2**20,
        "adapter and optimizer": cost.donated / 2**20,
        "on the way": cost.temporaries / 2**20,
    }


def _reached(curve: list[dict[str, Any]], target: float | None) -> float | None:
    """Seconds from the start until an evaluation reached `target`; None where none did, or none is set."""
    if target is None:
        return None
    for point in curve:
        reached = point["accuracy"] >= target if "accuracy" in point else point["perplexity"] <= target
        if reached:
            return point["seconds"]
    return None


def _batches(config: Config, dataset: job.Dataset, changes: Mapping[str, Any]) -> Feed:
    """Other rows, read as those of data.eval are."""
    options: Data = dataclasses.replace(config.data, **changes)
    rows = data.read_rows(options, config.model.task, "eval")
    return dataset.train.like(data.encode(rows, options, dataset.reader, dataset.label_names))


def _groups(config: Config, test: list[str], column: str) -> list[str]:
    """The group of every test example.

    Raises:
      ConfigError: a row without one.
    """
    rows = fewer.rows(config, dataclasses.replace(config.data, eval=tuple(test), on_bad_row="stop"), "eval")
    if any(column not in row.values for row in rows):
        raise configuration.ConfigError(f"group={column!r} is no column of every test row")
    return [str(row.values[column]) for row in rows]


def _by_group(outcome: Outcome, groups: list[str]) -> dict[str, Any]:
    """The scores of each group alone, and how far the best is from the worst."""
    names = np.array(groups)
    scores = {name: outcome.scores((names == name).astype(float)) for name in sorted(set(groups))}
    values = [found[outcome.main] for found in scores.values()]
    return {"by_group": scores, "groups": groups, "largest_gap": max(values) - min(values)}


def _forgetting(opened: saved.Opened, config: Config, dataset: job.Dataset, file: str) -> dict[str, float]:
    """Loss per token on general text: of the base as it was, and with the adapter."""
    general = _batches(config, dataset, {
        "eval": file, "format": "text", "columns": {}, "text": None, "longer": "split", "packing": "none",
    })  # fmt: skip
    before = judge(saved.open_model(config.model.path, None).model, general)
    return {"before": before.scores()["loss"], "after": judge(opened.model, general).scores()["loss"]}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
