# SPDX-License-Identifier: Apache-2.0
"""The command `jpeft eval --task`. Nothing heavy is imported before it runs."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from . import tasks
from .config import ConfigError

#: Classes that have a line each.
_SHOWN = 40


def add_options(parser: argparse.ArgumentParser) -> None:
    """Puts the options of a task under `jpeft eval`."""
    group = parser.add_argument_group("tasks", "with prompts, metrics and data of their own; --data names another file")
    known = "; ".join(f"{name}: {said}" for name, (_, _, said) in tasks.TASKS.items())
    group.add_argument("--task", choices=tuple(tasks.TASKS), metavar="TASK", help=known)
    group.add_argument("--limit", type=int, metavar="N", help="the first N rows (all)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn, and of intervals (0)")
    group.add_argument("--shots", type=int, default=0, metavar="N", help="rows shown with their answers (0)")
    group.add_argument("--shots-from", metavar="FILE", help="where they are from, if not from the task's own source")
    group.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (1)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    group.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that sum to P")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="of a text (as the task says)")
    group.add_argument(
        "--chat", action="store_true", help="a prompt is a message in the adapter's or model's chat template"
    )
    group.add_argument("--out", metavar="FILE", help="the record, in JSON (TASK.json)")


def refuse_unused(options: argparse.Namespace) -> None:
    """Refuses what would change nothing: a task's options without a task, and columns with one.

    Raises:
      ConfigError: one of them is given.
    """
    defaults = argparse.ArgumentParser()
    add_options(defaults)
    without = vars(defaults.parse_args([]))
    if options.task is None:
        given = [name for name, value in without.items() if getattr(options, name) != value]
        why = "of a task (--task)"
    else:
        given = [name for name in ("text", "label") if getattr(options, name) is not None]
        why = "not of a task: its columns are its own"
    if given:
        verb = "is" if len(given) == 1 else "are"
        raise ConfigError(f"{', '.join('--' + name.replace('_', '-') for name in given)} {verb} {why}")


def run(options: argparse.Namespace) -> None:
    """Measures a model by a task, prints the figures, and writes the record."""
    if options.data is not None and len(options.data) > 1:
        raise ConfigError(f"a task reads one file, got {' '.join(options.data)}")
    task = tasks.find(options.task)
    from . import saved
    from .tasks import running

    named = {field.name for field in dataclasses.fields(running.Settings)} - {"data"}
    given = {name: getattr(options, name) for name in named}
    settings = running.Settings(data=options.data[0] if options.data else None, **given)
    found = running.measure(options.task, task, saved.open_model(options.model, options.adapter), settings)
    for name, value in found.metrics.items():
        print(f"{name} {value.value:.6f} [{value.low:.6f}, {value.high:.6f}]")
    record = {"adapter": options.adapter, **found.record}
    if "majority" in record:
        print("always the largest class: " + ", ".join(f"{k} {v:.6f}" for k, v in record["majority"].items()))
    if record.get("collapsed"):
        print(f"collapsed: every row is said to be {record['collapsed']}, so these figures tell nothing of the model")
    for line in _by_class(record.get("by_class", {})):
        print(line)
    out = Path(options.out or f"{options.task}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    print(f"record: {out}")


def _by_class(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each class, where they are not too many; the record has all."""
    if not 0 < len(found) <= _SHOWN:
        return []
    width = max(map(len, ("class", *found)))
    rows = [
        f"{name:<{width}} {one['precision']:10.6f} {one['recall']:10.6f} {one['f1']:10.6f} {int(one['examples']):9,}"
        for name, one in found.items()
    ]
    return [f"{'class':<{width}}  precision     recall         f1  examples", *rows]
