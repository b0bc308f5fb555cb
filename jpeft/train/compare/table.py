# SPDX-License-Identifier: Apache-2.0
"""The runs of one method put together: a row of the report, with intervals over seeds and examples."""

import dataclasses
import math
import statistics as plain
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import outcomes
from .outcomes import Classes, Outcome
from .runner import Done
from .statistics import Difference, Interval, difference, holm, intervals
from .study import BASELINES, Study


@dataclasses.dataclass(frozen=True)
class Row:
    """A method on one task of one model, with one number of training rows.

    Attributes:
      method: its name in the study.
      seeds: runs that came to an end, and `diverged` those that did not.
      collapsed: of these runs, those that predict one class for everything.
      scores: interval by figure of merit; empty where every run diverged.
      apart: the main figure minus the reference's, with p-values adjusted for all methods of this table; None for the
        reference itself, for baselines that were not trained, and where a run diverged.
      costs: medians over the runs by name, in the order of `COSTS`; None where it was not measured.
      curve: (update, main figure on data.eval, by seed); empty where it was not evaluated on the way.
      chosen: what it got of the study's `tune`, by key; empty where nothing was tuned.
      classes: (share that is predicted, recall) of every class of a classifier, means over the runs.
      groups: the main figure on every group of the test examples alone, where they have groups.
      memory: MB of each part of the compiled training step.
    """

    method: str
    seeds: int
    diverged: int
    collapsed: int
    scores: Mapping[str, Interval]
    apart: Difference | None
    costs: Mapping[str, float | None]
    curve: Sequence[tuple[int, Sequence[float]]]
    chosen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    classes: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, Interval] = dataclasses.field(default_factory=dict)
    memory: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def is_baseline(self) -> bool:
        return self.method in BASELINES

    @property
    def all_collapsed(self) -> bool:
        """No run came to a score."""
        return 0 < self.collapsed == self.seeds


@dataclasses.dataclass(frozen=True)
class Table:
    """All methods on one task of one model.

    Attributes:
      model, task: names in the study.
      size: training rows; None for all.
      main: the figure that methods are ranked by, and whether more of it is better.
      examples: of the test set.
      rows: by method, baselines first.
      truth: share of every class of a classifier's test examples.
      train_rows: how many rows a classifier was trained on; None where it is not known.
    """

    model: str
    task: str
    size: int | None
    main: str
    more_is_better: bool
    examples: int
    rows: Sequence[Row]
    truth: Mapping[str, float] = dataclasses.field(default_factory=dict)
    train_rows: int | None = None


@dataclasses.dataclass(frozen=True)
class _Cell:
    """The runs of one method on one task, size and model, and what they answered.

    Attributes:
      runs: with their results; none of a baseline that is not trained.
      found: outcomes of those that came to an end.
    """

    runs: Sequence[Done]
    found: Sequence[Outcome]

    @property
    def ended(self) -> list[Done]:
        return [done for done in self.runs if "failed" not in done.result]


#: What a run cost: where it lies in its result, its name with a unit, and how it is printed.
COSTS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "trained": (("parameters", "trainable"), ",.0f"),
    "% of base": (("parameters", "percent"), ".3f"),
    "changed": (("parameters", "changed"), ",.0f"),
    "real tokens/s": (("training", "tokens_per_s"), ",.0f"),
    "padded tokens/s": (("training", "padded_tokens_per_s"), ",.0f"),
    "step ms": (("training", "step_ms"), ",.1f"),
    "GFLOP/step": (("training", "gflop_step"), ",.2f"),
    "MFU %": (("training", "mfu_percent"), ".1f"),
    "compile s": (("training", "compile_s"), ".1f"),
    "s to target": (("training", "to_target_s"), ",.1f"),
    "peak MB": (("memory", "peak_mb"), ",.0f"),
    "step's program MB": (("memory", "program_mb"), ",.0f"),
    "forward ms": (("latency_ms", "adapted"), ".2f"),
    "merged ms": (("latency_ms", "merged"), ".2f"),
    "decode ms/token": (("latency_ms", "decode"), ".2f"),
    "merged decode ms/token": (("latency_ms", "merged_decode"), ".2f"),
    "adapter KB": (("adapter_kb",), ",.1f"),
    "general loss before": (("forgetting", "before"), ".4f"),
    "general loss after": (("forgetting", "after"), ".4f"),
    "calibration error": (("calibration_error",), ".4f"),
    "largest gap of groups": (("largest_gap",), ".4f"),
}


def tables(study: Study, runs: Sequence[Done]) -> list[Table]:
    """One for every task, model and number of training rows of the final runs."""
    places = dict.fromkeys((d.run.task, d.run.model, d.run.size) for d in runs if d.run.method != "untuned")
    return [_table(study, runs, *place) for place in places]


def _table(study: Study, runs: Sequence[Done], task: str, model: str, size: int | None) -> Table:
    by_method: dict[str, list[Done]] = {}
    for done in runs:
        run = done.run
        if (run.task, run.model) == (task, model) and (run.size == size or run.method == "untuned"):
            by_method.setdefault(run.method, []).append(done)
    cells = {
        name: _Cell(group, [outcomes.read(d.result["outcome"]) for d in group if "outcome" in d.result])
        for name, group in by_method.items()
    }
    whole = next((cell.found[0] for cell in cells.values() if cell.found), None)
    if whole is None:
        raise ValueError(f"every run of {task} on {model} diverged, so there is nothing to report")
    results = [done.result for cell in cells.values() for done in cell.ended]
    names: Sequence[str] = next((r["label_names"] for r in results if "label_names" in r), ())
    groups: Sequence[str] = next((r["groups"] for r in results if "groups" in r), ())
    if isinstance(whole, Classes) and "majority" in study.baselines:
        counts = next(r["train_labels"] for r in results if "train_labels" in r)
        cells["majority"] = _Cell((), [outcomes.majority(whole, np.repeat(np.arange(len(counts)), counts))])
    order = sorted(cells, key=lambda name: BASELINES.index(name) if name in BASELINES else len(BASELINES))
    compared = _differences(cells, study.reference)
    rows = [_row(study, name, cells[name], compared.get(name), names, groups) for name in order]
    truth = dict(zip(names, whole.shares, strict=True)) if isinstance(whole, Classes) else {}
    seen = next((sum(r["train_labels"]) for r in results if "train_labels" in r), None)
    return Table(model, task, size, whole.main, whole.more_is_better, len(whole), rows, truth, seen)


def _differences(cells: Mapping[str, _Cell], reference: str) -> dict[str, Difference]:
    """Of every method against the reference, with p-values adjusted for their number."""
    theirs = cells[reference]
    if len(theirs.found) < len(theirs.runs):
        return {}
    out = {
        name: difference(cell.found, theirs.found)
        for name, cell in cells.items()
        if name != reference and len(cell.found) == len(theirs.found) == len(cell.runs)
    }
    adjusted = holm([d.p for d in out.values()])
    return {name: d._replace(p=p) for (name, d), p in zip(out.items(), adjusted, strict=True)}


def _row(
    study: Study, name: str, cell: _Cell, apart: Difference | None, names: Sequence[str], groups: Sequence[str]
) -> Row:
    ended = [done.result for done in cell.ended]
    costs = {cost: _median(ended, path) for cost, (path, _) in COSTS.items()}
    costs["s to target"] = _to_target(ended)
    if name == "majority":
        costs["calibration error"] = cell.found[0].calibration_error
    main = cell.found[0].main if cell.found else ""
    splits = (_at(result, ("memory", "parts_mb")) for result in ended)
    return Row(
        name,
        len(cell.found),
        len(cell.runs) - len(ended),
        sum(outcome.collapsed for outcome in cell.found) if name != "majority" else 0,
        intervals(cell.found) if cell.found else {},
        apart,
        costs,
        _curve(ended, main),
        chosen=_chosen(study, cell),
        classes=_classes(cell.found, names),
        groups=_groups(cell.found, groups, main),
        memory=next((split for split in splits if split), {}),
    )


def _chosen(study: Study, cell: _Cell) -> dict[str, Any]:
    """What a method that was trained got of the study's `tune`."""
    configs = [done.run.config for done in cell.runs if done.run.method != "untuned"]
    return {key: _at(configs[0], tuple(key.split("."))) for key in study.tune} if configs else {}


def _classes(found: Sequence[Outcome], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(share that is predicted, recall) of every class."""
    classifiers = [outcome for outcome in found if isinstance(outcome, Classes)]
    if not classifiers:
        return {}
    said = np.mean([outcome.predicted_shares for outcome in classifiers], 0)
    recalls = np.mean([outcome.recalls for outcome in classifiers], 0)
    return {name: (float(s), float(r)) for name, s, r in zip(names, said, recalls, strict=True)}


def _groups(found: Sequence[Outcome], groups: Sequence[str], main: str) -> dict[str, Interval]:
    """The main figure on the examples of every group."""
    if not found:
        return {}
    of = np.array(groups)
    return {name: intervals([outcomes.subset(o, of == name) for o in found])[main] for name in sorted(set(groups))}


def _median(results: Sequence[Mapping[str, Any]], path: tuple[str, ...]) -> float | None:
    found = [_at(result, path) for result in results]
    values = [float(value) for value in found if value is not None]
    return plain.median(values) if values else None


def _to_target(results: Sequence[Mapping[str, Any]]) -> float | None:
    """The median over all runs, those that never reached the target the slowest; None where half of them did not."""
    found = [_at(result, COSTS["s to target"][0]) for result in results]
    middle = plain.median(math.inf if value is None else value for value in found) if found else math.inf
    return middle if math.isfinite(middle) else None


def _at(value: Any, path: tuple[str, ...]) -> Any:
    """What lies at a path of keys; None where it ends before."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _curve(results: Sequence[Mapping[str, Any]], main: str) -> list[tuple[int, list[float]]]:
    """(update, figure of every seed) at the updates where all were evaluated."""
    curves = [{point["update"]: point[main] for point in r.get("curve", ()) if main in point} for r in results]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(update, [curve[update] for curve in curves]) for update in shared]
