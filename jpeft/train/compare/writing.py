# SPDX-License-Identifier: Apache-2.0
"""Test rows behind which a model writes texts that are scored, by a task of `jpeft eval`: by which one, and how."""

from collections.abc import Sequence

from .. import tasks
from ..tasks.kinds import Write
from ..tasks.settings import Settings

#: Options of `jpeft eval` that a study has a place of its own for: `test`, the run's seed, and no texts that are read.
_ELSEWHERE = ("data", "seed", "max_length")


def faults(
    name: str, write: str | None, metric: str | None, settings: Settings, test: Sequence[str], group: str | None
) -> list[str]:
    """What of a study's task does not fit together, a line each.

    Args:
      name: of the task in the study.
      write, metric, settings: its `write`, `metric` and `writing`.
      test: its files.
      group: its column of groups.
    """
    at, unlike = f"tasks.{name}", Settings()
    if write is None:
        given = [key for key, there in {"metric": metric, "writing": settings != unlike}.items() if there]
        return [f"{at}.{key} is for tasks that write; name one by {at}.write" for key in given]
    task = tasks.find(write) if write in tasks.TASKS else None
    if not isinstance(task, Write) or not task.compared:
        return [f"{at}.write={write} is no task that methods can be compared by; there are {', '.join(_writers())}"]
    known = task.figures(settings.samples)
    taken = [key for key in _ELSEWHERE if getattr(settings, key) != getattr(unlike, key)]
    rules = {
        f"{at}.metric={metric} is none of {', '.join(known)}, which {write} has with writing.samples="
        f"{settings.samples}": metric is not None and metric not in known,
        f"{at}.writing has {', '.join(taken)}; rows are those of {at}.test, seeds are the study's": bool(taken),
        f"{at}.test is one file where texts are written, got {len(test)}": len(test) != 1,
        f"{at}.group is not for a task that writes": group is not None,
        f"{at}.writing.shots: the rows of {write} have no answer to show": settings.shots > 0 and task.answer is None,
    }
    return [message for message, broken in rules.items() if broken]


def main_figure(write: str, metric: str | None, settings: Settings) -> str:
    """The figure that methods are compared by."""
    return metric or tasks.find(write).figures(settings.samples)[0]


def described(write: str, metric: str | None, settings: Settings) -> str:
    """How texts are written, in words."""
    drawn = "each token the likeliest"
    if settings.temperature:
        top = "" if settings.top_p is None else f", top_p {settings.top_p:g}"
        heat = f"{settings.temperature:g}{top}"
        drawn = f"{settings.samples} of each prompt, drawn at temperature {heat} by the run's seed"
    longest = settings.max_new_tokens or tasks.find(write).max_new_tokens
    rows = "all rows" if settings.limit is None else f"the first {settings.limit:,} rows"
    main = main_figure(write, metric, settings)
    return (
        f"texts of at most {longest:,} tokens, {drawn}; {rows}; scored as `jpeft eval --task {write}` does, "
        f"compared by {main}"
    )


def _writers() -> list[str]:
    found = ((name, tasks.find(name)) for name in tasks.TASKS)
    return [name for name, task in found if isinstance(task, Write) and task.compared]
