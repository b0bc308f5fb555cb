# SPDX-License-Identifier: Apache-2.0
"""The data of a study, opened before its first run: the test split is read last of all."""

import dataclasses

from .. import config as configuration
from .. import data
from ..config import ConfigError
from ..records import DataError
from ..sections import Data
from ..sections.data import Source
from ..sources import open_source
from . import study as studies
from .study import Study, Task


def check(study: Study) -> None:
    """Opens what each task is trained, chosen and tested on, without reading the rows.

    Raises:
      ConfigError: what cannot be opened, one line each: no such file, no row, columns that do not fit, or no column of
        the groups.
    """
    configs = {run.task: studies.training(run, "out") for run in studies.finals(study, {})}
    wrong = [line for name, config in configs.items() for line in _faults(name, study.tasks[name], config.data)]
    if wrong:
        raise ConfigError("\n".join(wrong))


def _faults(name: str, task: Task, options: Data) -> list[str]:
    wrong = []
    places = {"data.train": options.train, "data.eval": options.eval, "general": task.general}
    if task.write is None:
        places["test"] = task.test
    for place, rows in places.items():
        if not rows:
            continue
        split = "train" if place == "data.train" else "eval"
        try:
            parts = data.read_rows(dataclasses.replace(options, **{split: rows}), task.task, split)
        except (OSError, DataError) as error:
            wrong.append(f"tasks.{name}.{place}: {error}")
            continue
        columns = [column for part in parts for column in part.opened.columns]
        if place == "test" and task.group is not None and columns.count(task.group) < len(parts):
            wrong.append(
                f"tasks.{name}.group={task.group!r} is no column of the test rows; there are {', '.join(columns)}"
            )
    if task.write is not None:
        try:
            for file in configuration.paths(task.test):
                open_source(Source(file))
        except (OSError, DataError) as error:
            wrong.append(f"tasks.{name}.test: {error}")
    return wrong
