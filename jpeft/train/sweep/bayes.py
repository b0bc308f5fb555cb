# SPDX-License-Identifier: Apache-2.0
"""Points that optuna's TPE proposes (Bergstra et al. 2011), given the scores of earlier ones.

Nothing is kept in optuna: it is told all that is known each time, and draws from a seed and the number of known points,
so a sweep that was cut off proposes what it would have. Values of a list are categories to it.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .space import Range, Sweep


class Known(NamedTuple):
    """A point that was tried.

    Attributes:
      values: by key of the space.
      scores: (update, score) of its comparisons, the last one being that at the end.
      ended: whether it was trained to its end; None where it diverged.
    """

    values: Mapping[str, Any]
    scores: Sequence[tuple[int, float]]
    ended: bool | None


def check() -> None:
    """Looks for optuna before anything is trained.

    Raises:
      ImportError: it is not there.
    """
    _optuna()


def propose(sweep: Sweep, known: Sequence[Known], count: int) -> list[dict[str, Any]]:
    """The next points.

    Args:
      sweep: the space, the figure and the seed.
      known: all points so far; those that were dropped count with the scores that they had, those that diverged as
        failed.
      count: how many are proposed.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    over = {key: _distribution(optuna.distributions, part) for key, part in sweep.space.items()}
    sampler = optuna.samplers.TPESampler(seed=sweep.seed * 100_003 + len(known), n_startup_trials=min(10, sweep.batch))
    direction = "maximize" if sweep.better(1.0, 0.0) else "minimize"
    study = optuna.create_study(sampler=sampler, direction=direction)
    for point in known:
        values = {key: _told(sweep.space[key], value) for key, value in point.values.items()}
        scores = dict(point.scores)
        state, value = optuna.trial.TrialState.FAIL, None
        if point.ended:
            state, value = optuna.trial.TrialState.COMPLETE, point.scores[-1][1]
        elif point.ended is False:
            state = optuna.trial.TrialState.PRUNED
        study.add_trial(
            optuna.trial.create_trial(
                params=values, distributions=over, state=state, value=value, intermediate_values=scores
            )
        )
    asked = [study.ask(over) for _ in range(count)]
    return [{key: _meant(sweep.space[key], trial.params[key]) for key in sweep.space} for trial in asked]


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ImportError(
            "search=bayes needs optuna, which is not there (grid and random need nothing): pip install 'jpeft[sweep]'"
        ) from error


def _distribution(kinds: Any, part: Any) -> Any:
    if not isinstance(part, Range):
        return kinds.CategoricalDistribution([json.dumps(value) for value in part])
    if part.whole:
        return kinds.IntDistribution(int(part.low), int(part.high), log=part.log)
    return kinds.FloatDistribution(float(part.low), float(part.high), log=part.log)


def _told(part: Any, value: Any) -> Any:
    return value if isinstance(part, Range) else json.dumps(value)


def _meant(part: Any, value: Any) -> Any:
    """A value as the space has it; numbers of a range to six digits, as they stand in files."""
    if not isinstance(part, Range):
        return json.loads(value)
    return value if part.whole else min(max(float(f"{value:.6g}"), part.low), part.high)
