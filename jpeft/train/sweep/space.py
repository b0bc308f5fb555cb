# SPDX-License-Identifier: Apache-2.0
"""What a sweep tries, from one YAML: a training configuration, the keys of it that vary, and how points are chosen.

  out: runs/rank_rate
  base: sst2.yaml                          a training configuration: a file, or the mapping itself
  space:
    optimizer.lr: [1e-4, 1e-3]             values, or {low: 1e-5, high: 1e-2, log: true}
    method.rank, method.alpha: [[4, 8], [8, 16]]      keys that vary together
  seeds: [0, 1, 2]                         `train.seed`: every point is trained with each, and judged by the mean

A point is one choice of values, a trial a point with one seed. This file imports no JAX.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from .. import config as configuration
from ..config import ConfigError
from ..sections._checks import FORBID, at_least_one
from ..standing import LOWER_IS_BETTER, METRICS

#: Keys that cannot vary, and why; a section stands for all its keys.
FIXED: Mapping[str, str] = {
    "out": "the sweep has a folder of its own",
    "train.seed": "give the seeds of every point as `seeds`",
    "data.eval": "all trials are judged on the same rows",
    "data.label_names": "all trials are judged on the same classes",
    "model.task": "all trials are judged by the same figure",
    "train.objective": "all trials are judged by the same figure",
    "logging": "it changes nothing of a trial",
    **dict.fromkeys(
        ("train.log_every", "train.eval_every", "train.save_every", "train.keep"), "it changes nothing of a trial"
    ),
}
#: Values that trainings in one step have no use for, and why.
_REFUSED: Mapping[str, tuple[Any, str]] = {
    "mesh": (None, "lanes of one step lie on one device"),
    "data.streaming": (False, "lanes of one step start from rows that are all held"),
    "preference.precompute": (False, "lanes of one step have no base of their own to compute it with"),
    "train.best": (None, "lanes of one step are judged by their evaluation at the end"),
    "train.samples": (0, "lanes of one step write no texts"),
}
#: Points that `bayes` proposes at a time, where nothing else is said.
_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them; whole ones where both are.

    Attributes:
      low, high: the ends.
      log: whether their logarithms are drawn evenly.
    """

    __pydantic_config__: ClassVar = FORBID
    low: int | float
    high: int | float
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def drawn(self, rng: np.random.Generator) -> int | float:
        """One of its numbers."""
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)
        ends = (math.log(low), math.log(high)) if self.log else (low, high)
        value = float(rng.uniform(*ends))
        value = math.exp(value) if self.log else value
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else float(f"{value:.6g}")


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving: after a share of their updates, points are compared, and one in `eta` goes on.

    Attributes:
      eta: one in so many goes on; the shares are `eta ** -rungs`, ..., `eta ** -1`.
      rungs: how often they are compared before the end.
      brackets: Hyperband: the points are dealt into so many parts, and the i-th of them (from 0) passes i comparisons
        over, for points that start slowly.
    """

    __pydantic_config__: ClassVar = FORBID
    eta: int = 3
    rungs: int = 2
    brackets: int = 1

    @property
    def shares(self) -> tuple[float, ...]:
        """After which shares of the updates points are compared."""
        return tuple(float(self.eta) ** -k for k in range(self.rungs, 0, -1))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is tried.

    Attributes:
      out: folder of the sweep.
      base: a training configuration, as plain values.
      space: by dotted key, values or a range. Keys that vary together stand in one, with commas, and each of their
        values is a list.
      search: `grid`, all combinations; `random`; or `bayes`, what optuna's TPE proposes.
      trials: points of `random` and `bayes`.
      batch: points that `bayes` proposes at a time.
      seed: of what is drawn.
      seeds: `train.seed`; every point is trained with each.
      metric: figure of the evaluation that points are judged by; None is the accuracy, of a language model the loss.
      halving: None trains every trial to its end.
      lanes: trials that are trained in one step at most.
    """

    __pydantic_config__: ClassVar = FORBID
    out: str
    base: dict[str, Any]
    space: dict[str, tuple[Any, ...] | Range]
    search: Literal["grid", "random", "bayes"] = "grid"
    trials: int | None = None
    batch: int = _BATCH
    seed: int = 0
    seeds: tuple[int, ...] = (0,)
    metric: str | None = None
    halving: Halving | None = None
    lanes: int = 16

    @property
    def figure(self) -> str:
        """The figure that points are judged by."""
        return self.metric or ("accuracy" if "accuracy" in _figures(self.base) else "loss")

    def better(self, a: float, b: float) -> bool:
        """Whether a score is better than another."""
        return a < b if self.figure in LOWER_IS_BETTER else a > b


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
      point: number of its choice of values.
      values: by key of the space.
      seed: `train.seed`.
      config: its configuration.
    """

    point: int
    values: Mapping[str, Any]
    seed: int
    config: configuration.Config

    @property
    def name(self) -> str:
        """As in files."""
        return f"{self.point:04d}-seed{self.seed}"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in a YAML file, with `key.key=value` overrides, such as `base.train.epochs=1`.

    Raises:
      FileNotFoundError: no such file, or no base of that name.
      ConfigError: what is wrong, one line each.
    """
    tree = configuration.read(path)
    try:
        if isinstance(tree.get("base"), str):
            tree["base"] = configuration.read(configuration.expanded_path(tree["base"]))
        return parse(configuration.overridden(tree, overrides))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(tree: Mapping[str, Any]) -> Sweep:
    """A sweep from plain values, checked with the configurations that it comes to.

    Raises:
      ConfigError: what is wrong, one line each.
    """
    tree = dict(tree)
    if "out" in tree:
        tree["out"] = configuration.expanded_path(tree["out"])
    if isinstance(tree.get("space"), Mapping):
        tree["space"] = _flat(tree["space"])
    sweep = configuration.validated(Sweep, tree)
    base = configuration.parse({"out": f"{sweep.out}/best", **sweep.base})
    sweep = dataclasses.replace(sweep, base=configuration.plain(base))
    wrong = _wrong(sweep)
    if wrong:
        raise ConfigError("\n".join(wrong))
    for values in points(sweep) if sweep.search != "bayes" else _corners(sweep):
        trials(sweep, 0, values)
    return sweep


def refused(config: configuration.Config) -> list[tuple[str, str]]:
    """Of what trainings in one step have no use for, what is asked for: `key=value`, and why."""
    found = []
    for key, (none, why) in _REFUSED.items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value != none:
            found.append((f"{key}={value!r}", why))
    return found


def points(sweep: Sweep) -> list[dict[str, Any]]:
    """The choices of values of a grid, or those that `random` draws: the same in every call.

    Raises:
      ConfigError: there are fewer than `trials` of them.
    """
    if sweep.search == "grid":
        return [dict(zip(sweep.space, chosen, strict=True)) for chosen in itertools.product(*sweep.space.values())]  # type: ignore[arg-type]
    rng, found = np.random.default_rng(sweep.seed), {}
    for _ in range(100 * (sweep.trials or 0)):
        values = {key: _drawn(part, rng) for key, part in sweep.space.items()}
        found.setdefault(repr(values), values)
        if len(found) == sweep.trials:
            return list(found.values())
    raise ConfigError(f"trials={sweep.trials}, and the space has about {len(found)} points; take search=grid")


def trials(sweep: Sweep, point: int, values: Mapping[str, Any]) -> list[Trial]:
    """The trials of a point, one a seed.

    Raises:
      ConfigError: values of the space make a configuration that cannot be run; it names the point.
    """
    said = ", ".join(f"{key}={value}" for key, value in values.items())
    tree = sweep.base
    try:
        for key, value in values.items():
            keys = _parts(key)
            for name, one in [(key, value)] if len(keys) == 1 else zip(keys, value, strict=True):
                tree = _with(tree, name.split("."), one, name)
        out = []
        for seed in sweep.seeds:
            config = configuration.parse(_with(tree, ["train", "seed"], seed, "train.seed"))
            out.append(Trial(point, values, seed, config))
        configuration.method(out[0].config.method)
    except ConfigError as error:
        raise ConfigError(f"{said}: {error}") from error
    return out


def _with(tree: Any, keys: Sequence[str], value: Any, whole: str) -> Any:
    """A copy of plain values with one of them set; a part of a hybrid's method is named by its number."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(tree, list) and key.isdecimal() and int(key) < len(tree):
        at = int(key)
        return [*tree[:at], _with(tree[at], rest, value, whole), *tree[at + 1 :]]
    if not isinstance(tree, Mapping):
        raise ConfigError(f"unknown key {whole}: {key} is looked for in {tree!r}, which has no keys")
    return {**tree, key: _with(tree.get(key, {} if rest else None), rest, value, whole)}


def _drawn(part: Any, rng: np.random.Generator) -> Any:
    return part.drawn(rng) if isinstance(part, Range) else part[int(rng.integers(len(part)))]


def _corners(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Both ends of every key, where all of a space is not known beforehand."""
    for end in (0, -1):
        yield {
            key: ((part.low, part.high)[end] if isinstance(part, Range) else part[end])
            for key, part in sweep.space.items()
        }


def _parts(key: str) -> list[str]:
    return [part.strip() for part in key.split(",")]


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """With dotted keys in the place of nested ones."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and not {"low", "high"} & {*value}
        out |= _flat(value, f"{above}{key}.") if inner and value else {f"{above}{key}": value}
    return out


def _figures(base: Mapping[str, Any]) -> tuple[str, ...]:
    dpo = base.get("train", {}).get("objective") == "dpo"
    return METRICS["dpo" if dpo else base["model"]["task"]]


def _wrong(sweep: Sweep) -> list[str]:
    """What cannot be."""
    lines = at_least_one({"trials": sweep.trials, "batch": sweep.batch, "lanes": sweep.lanes})
    lines += _wrong_space(sweep)
    base = configuration.parse(sweep.base)
    lines += [f"base.{what} is not for a sweep: {why}" for what, why in refused(base)]
    rules = {
        "seeds must be different from each other, and at least one": not sweep.seeds
        or len({*sweep.seeds}) < len(sweep.seeds),
        "base.data.eval names no file; points are judged on it": not configuration.paths(base.data.eval),
        f"search={sweep.search} needs trials, the number of points": sweep.search != "grid" and sweep.trials is None,
        "trials is for search=random and bayes; a grid has all its points": sweep.search == "grid"
        and sweep.trials is not None,
        f"seed must be 0 or more, got {sweep.seed}": sweep.seed < 0,
        f"batch={sweep.batch} is for search=bayes, which proposes so many points at a time": sweep.search != "bayes"
        and sweep.batch != _BATCH,
        f"metric is one of {', '.join(_figures(sweep.base))}, got {sweep.metric!r}": sweep.figure
        not in _figures(sweep.base),
    }
    return lines + [message for message, broken in rules.items() if broken] + _wrong_halving(sweep)


def _wrong_space(sweep: Sweep) -> list[str]:
    lines = [] if sweep.space else ["space is empty; name the keys that vary"]
    named = [part for key in sweep.space for part in _parts(key)]
    lines += [f"space.{key} is there twice" for key in dict.fromkeys(named) if named.count(key) > 1]
    for key in dict.fromkeys(named):
        why = FIXED.get(key) or FIXED.get(key.split(".")[0])
        if why:
            lines.append(f"space.{key} cannot vary: {why}")
    for key, part in sweep.space.items():
        several = len(_parts(key))
        if isinstance(part, Range):
            lines += [f"space.{key}: a range is of one key"] if several > 1 else []
            lines += [f"space.{key} is a range; search=grid takes values"] if sweep.search == "grid" else []
            lines += [f"space.{key}: low={part.low} is not below high={part.high}"] if part.low >= part.high else []
            lines += [f"space.{key}: a range by logarithm begins above 0"] if part.log and part.low <= 0 else []
        elif not part:
            lines.append(f"space.{key} has no value")
        elif several > 1 and not all(isinstance(v, (list, tuple)) and len(v) == several for v in part):
            lines.append(f"space.{key}: each of its values is a list of {several}")
        elif len({repr(value) for value in part}) < len(part):
            lines.append(f"space.{key} has a value twice")
    return lines


def _wrong_halving(sweep: Sweep) -> list[str]:
    halving = sweep.halving
    if halving is None:
        return []
    lines = at_least_one({"halving.rungs": halving.rungs, "halving.brackets": halving.brackets})
    if halving.eta < 2:
        lines.append(f"halving.eta is 2 or more, got {halving.eta}")
    if halving.brackets > halving.rungs + 1:
        lines.append(f"halving.brackets is at most rungs + 1 = {halving.rungs + 1}, got {halving.brackets}")
    return lines
