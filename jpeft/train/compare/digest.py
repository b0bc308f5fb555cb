# SPDX-License-Identifier: Apache-2.0
"""All that a report shows, in one small file of plain values; a report can be written from it without the runs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from . import writing
from .runner import Done
from .study import Study
from .table import Table, tables


@dataclasses.dataclass(frozen=True)
class Digest:
    """All that a report shows.

    Attributes:
      protocol: what was done, in lines.
      reference: the method that the others are tested against.
      tables: one for every task, model and number of training rows.
    """

    protocol: tuple[str, ...]
    reference: str
    tables: tuple[Table, ...]


def digested(study: Study, runs: Sequence[Done]) -> Digest:
    """What the final runs of a study come to.

    Raises:
      ValueError: there is nothing to report.
    """
    return Digest(tuple(protocol(study, runs)), study.reference, tuple(tables(study, runs)))


def dumped(digest: Digest) -> str:
    """As JSON, numbers to nine digits; `read` gives it back."""
    values = dataclasses.asdict(digest)
    tables = [{**table, "rows": [_short(row) for row in table["rows"]]} for table in values["tables"]]
    return json.dumps({**values, "tables": tables}, indent=1, allow_nan=False) + "\n"


def read(text: str) -> Digest:
    """A digest from what `dumped` gave.

    Raises:
      pydantic.ValidationError: it is none.
    """
    import pydantic

    return pydantic.TypeAdapter(Digest).validate_json(text)


def _short(value: Any) -> Any:
    """With nine significant digits of every float that is no whole number: counts stay exact."""
    if isinstance(value, float):
        return value if value.is_integer() else float(f"{value:.9g}")
    if isinstance(value, Mapping):
        return {key: _short(inner) for key, inner in value.items()}
    return [_short(inner) for inner in value] if isinstance(value, list | tuple) else value


def _processes(runs: Sequence[Done]) -> str:
    """How the runs were shared out."""
    lanes = [done.result["lanes"] for done in runs if "lanes" in done.result]
    if not lanes:
        return "each run trained in a process of its own"
    return (
        f"{len(lanes)} of them trained with others of their method in one compiled step, up to {max(lanes)} at once, "
        "each as it would be alone: what these take in time is not known"
    )


def protocol(study: Study, runs: Sequence[Done]) -> list[str]:
    """What was done, in lines."""
    seeds = ", ".join(map(str, study.seeds))
    lines = [f"{len(runs)} runs; seeds {seeds}; {_processes(runs)}."]
    if study.tune:
        by = "" if study.tune_by is None else f" by its {study.tune_by}"
        tried = "; ".join(f"{key} from {', '.join(map(str, values))}" for key, values in study.tune.items())
        lines.append(
            f"Chosen for each method on the validation split{by}, with seed {study.tune_seed}, before any test: "
            f"{tried}."
        )
    else:
        lines.append("Nothing was tuned: every method has the values that the study gives it.")
    lines += [
        f"{name}: {writing.described(task.write, task.metric, task.writing)}."
        for name, task in study.tasks.items()
        if task.write is not None
    ]
    lines += [
        "The test split is read by the final runs alone, once each.",
        "Intervals: 95 %, by a bootstrap over seeds and test examples, both drawn by themselves"
        + ("; with one seed, over the examples alone." if len(study.seeds) == 1 else "."),
        f"Differences: against {study.reference}, paired by seed and example; p by a permutation test over the "
        "examples, adjusted for all methods of a table (Holm).",
        "Costs are medians over seeds. Tokens/s leave compilation and evaluation out. FLOPs are those of the compiled "
        "step; MFU is 4 N tokens/s over the peak rate, 6 N for full fine-tuning, N the base's parameters without "
        "embeddings.",
    ]
    devices = sorted({done.result["device"] for done in runs if "device" in done.result})
    versions = sorted(
        {", ".join(f"{k} {v}" for k, v in d.result["versions"].items()) for d in runs if "versions" in d.result}
    )
    return [*lines, *(f"Device: {device}." for device in devices), *(f"Versions: {line}." for line in versions)]
