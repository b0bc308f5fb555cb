# SPDX-License-Identifier: Apache-2.0
"""What a sweep can be told to lack before its first trial: rows, and points and updates to be halved."""

from .. import data
from ..config import ConfigError, parse
from ..records import DataError
from . import halving, space
from .space import Sweep


def check(sweep: Sweep) -> None:
    """Opens what trials are trained and judged on, without reading the rows, and deals out the points.

    Raises:
      ConfigError: what cannot be opened, one line each: no such file, no row, or columns that do not fit; or there are
        fewer points, or in `train.max_steps` fewer updates, than `halving` compares.
    """
    base, wrong = parse(sweep.base), []
    task = "PREFERENCE" if base.train.objective == "dpo" else base.model.task
    for split in ("train", "eval"):
        try:
            data.read_rows(base.data, task, split)
        except (OSError, DataError) as error:
            wrong.append(f"base.data.{split}: {error}")
    count = min(sweep.batch, sweep.trials or 0) if sweep.search == "bayes" else len(space.points(sweep))
    try:
        halving.brackets(sweep.halving, range(count))
        if base.train.max_steps is not None and "train.max_steps" not in str([*sweep.space]):
            halving.stops(sweep.halving, base.train.max_steps)
    except ConfigError as error:
        wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
