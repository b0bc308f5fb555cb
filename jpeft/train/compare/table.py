# SPDX-License-Identifier: Apache-2.0
"""The runs of one method put together: a row of the report, with intervals over seeds and examples."""

import dataclasses
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
      results: of its runs, as they were saved.
    """

    method: str
    seeds: int
    diverged: int
    collapsed: int
    scores: Mapping[str, Interval]
    apart: Difference | None
    costs: Mapping[str, float | None]
    curve: Sequence[tuple[int, Sequence[float]]]
    results: Sequence[Mapping[str, Any]]

    @property
    def is_baseline(self) -> bool:
        return self.method in BASELINES


@dataclasses.dataclass(frozen=True)
class Table:
    """All methods on one task of one model.

    Attributes:
      model, task: names in the study.
      size: training rows; None for all.
      main: the figure that methods are ranked by, and whether more of it is better.
      examples: of the test set.
      rows: by method, baselines first.
    """

    model: str
    task: str
    size: int | None
    main: str
    more_is_better: bool
    examples: int
    rows: Sequence[Row]


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
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for done in runs:
        run = done.run
        if (run.task, run.model) == (task, model) and (run.size == size or run.method == "untuned"):
            by_method.setdefault(run.method, []).append(done.result)
    found = {name: [outcomes.read(r["outcome"]) for r in rs if "outcome" in r] for name, rs in by_method.items()}
    whole = next((group[0] for group in found.values() if group), None)
    if whole is None:
        raise ValueError(f"every run of {task} on {model} diverged, so there is nothing to report")
    if isinstance(whole, Classes) and "majority" in study.baselines:
        counts = next(r["train_labels"] for rs in by_method.values() for r in rs if "train_labels" in r)
        by_method = {"majority": [], **by_method}
        found["majority"] = [outcomes.majority(whole, np.repeat(np.arange(len(counts)), counts))]
    order = sorted(by_method, key=lambda name: BASELINES.index(name) if name in BASELINES else len(BASELINES))
    compared = _differences(found, by_method, study.reference)
    rows = [_row(name, by_method[name], found[name], compared.get(name), whole.main) for name in order]
    return Table(model, task, size, whole.main, whole.more_is_better, len(whole), rows)


def _differences(
    found: Mapping[str, Sequence[Outcome]], results: Mapping[str, Sequence[Any]], reference: str
) -> dict[str, Difference]:
    """Of every method against the reference, with p-values adjusted for their number."""
    theirs = found[reference]
    if len(theirs) < len(results[reference]):
        return {}
    out = {
        name: difference(ours, theirs)
        for name, ours in found.items()
        if name != reference and len(ours) == len(theirs) == len(results[name])
    }
    adjusted = holm([d.p for d in out.values()])
    return {name: d._replace(p=p) for (name, d), p in zip(out.items(), adjusted, strict=True)}


def _row(
    name: str, results: Sequence[Mapping[str, Any]], found: Sequence[Outcome], apart: Difference | None, main: str
) -> Row:
    ended = [r for r in results if "failed" not in r]
    costs = {cost: _median(ended, path) for cost, (path, _) in COSTS.items()}
    if name == "majority":
        costs["calibration error"] = found[0].calibration_error
    collapsed = sum(outcome.collapsed for outcome in found) if name != "majority" else 0
    scores = intervals(found) if found else {}
    return Row(
        name,
        len(found),
        len(results) - len(ended),
        collapsed,
        scores,
        apart,
        costs,
        _curve(ended, main),
        tuple(results),
    )


def _median(results: Sequence[Mapping[str, Any]], path: tuple[str, ...]) -> float | None:
    found = [_at(result, path) for result in results]
    values = [float(value) for value in found if value is not None]
    return plain.median(values) if values else None


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
