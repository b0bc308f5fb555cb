# SPDX-License-Identifier: Apache-2.0
"""A training configuration with some of its rows, for curves of few examples."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ...models._files import write_text
from .. import data
from ..config import CLASSIFYING, Config, ConfigError
from ..items import Pictured
from ..records import Record, Refusals
from ..sections import Data
from ..sections.data import Source
from ..sections.model import SEEING


def fewer(config: Config, size: int, file: Path) -> Config:
    """With `size` training rows, drawn by the run's seed and written to `file`; the classes are those of all rows.

    Images that are no files of their own are written beside it.

    Raises:
      ConfigError: there are not so many.
    """
    options, task = config.data, config.model.task
    parts = data.read_rows(options, task, "train")
    found = _good(parts, options)
    if len(found) < size:
        raise ConfigError(f"sizes asks for {size} training rows, and there are {len(found)}")
    chosen = sorted(np.random.default_rng((config.train.seed, size)).permutation(len(found))[:size])
    rows, train = [found[i][1].values for i in chosen], str(file)
    if task in SEEING:
        folder = file.with_suffix(".images")
        rows = [_by_itself(found[i][0], found[i][1], folder / str(i)) for i in chosen]
        train = Source(str(file), format="image", columns={"image": "image", "label": "label"})
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    names = data.label_names(parts) if task in CLASSIFYING and options.label_names is None else options.label_names
    return dataclasses.replace(config, data=dataclasses.replace(options, train=train, label_names=names))


def rows(config: Config, options: Data, split: str) -> list[Record]:
    """The rows of a split as they are written; bad ones are met as `data.on_bad_row` says."""
    return [row for _, row in _good(data.read_rows(options, config.model.task, split), options)]


def _good(parts: list[data.Part], options: Data) -> list[tuple[data.Part, Record]]:
    refusals = Refusals(options.on_bad_row, options.max_bad_rows)
    return [(part, row) for part in parts for row in refusals.passing(part.opened.rows())]


def _by_itself(part: data.Part, row: Record, file: Path) -> dict[str, Any]:
    """An image's row that says the same wherever it stands; `file` takes the image where the row holds its bytes."""
    item = part.reader(row.values)
    assert isinstance(item, Pictured)
    if isinstance(item.image, bytes):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(item.image)
        return {"image": str(file.resolve()), "label": item.label}
    return {"image": str((part.opened.folder / item.image).resolve()), "label": item.label}
