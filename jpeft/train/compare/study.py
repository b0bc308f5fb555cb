# SPDX-License-Identifier: Apache-2.0
"""What a study compares, from one YAML, and the training runs that this comes to.

  out: runs/pubmedqa
  run:                                     what every run shares: keys of a training configuration
    train: {epochs: 3, batch_size: 16}
  models: {minilm: {path: minilm}}         each a section `model`, but for the task
  tasks:
    pubmedqa: {task: SEQ_CLS, data: {train: train.jsonl, eval: dev.jsonl}, test: test.jsonl}
  methods:                                 each a part of a training configuration
    lora: {method: {kind: lora, rank: 8}}
    prefix: {method: {kind: prefix_tuning, num_tokens: 20}, optimizer: {lr: 1e-2}}
  tune: {optimizer.lr: [1e-4, 1e-3]}       chosen for each method on data.eval, before anything is tested
  seeds: [0, 1, 2]

What a method says goes over what its task says, and that over `run`. The test split is read by the final runs alone.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from .. import _yaml
from .. import config as configuration
from ..config import ConfigError
from ..sections._checks import FORBID
from ..sections.model import NAMING
from ..sweep import space
from ..tasks.settings import Settings
from . import writing

#: What stands beside the methods: the most frequent class, the base model as it is (language models), a head trained on
#: frozen features (classifiers), and full fine-tuning.
BASELINES = ("majority", "untuned", "head", "full")

#: The baselines that are trained, as parts of a training configuration.
TRAINED_BASELINES: Mapping[str, dict[str, Any]] = {
    "head": {"method": {"kind": "last_layers", "n": 0, "final": ()}},
    "full": {"method": {"kind": "full"}},
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of a study.

    Attributes:
      task: `SEQ_CLS`, `IMAGE_CLS` or `CAUSAL_LM`.
      data: the section `data` of a training configuration; `eval` is what rates are chosen on.
      test: a file or several; read by final runs alone.
      general: a file of general text whose loss before and after tells what was forgotten; for language models.
      group: a column of the test files; scores are also given for each of its values.
      target: score on `data.eval` of which the time to reach it is reported.
      train: keys of the section `train` that are the task's own.
      write: a task of `jpeft eval` that writes, such as `gsm8k`, by which the test rows are scored, and not by their
        perplexity; for language models.
      writing: how: options of `jpeft eval`, as `{max_new_tokens: 64, samples: 5, temperature: 0.8}`.
      metric: the figure of `write` that methods are compared by; None is its first.
    """

    __pydantic_config__: ClassVar = FORBID
    task: Literal["SEQ_CLS", "IMAGE_CLS", "CAUSAL_LM"]
    data: dict[str, Any]
    test: str | tuple[str, ...]
    general: str | None = None
    group: str | None = None
    target: float | None = None
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    write: str | None = None
    writing: Settings = dataclasses.field(default_factory=Settings)
    metric: str | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
      out: folder of the runs and the report.
      models: sections `model` by name, without the task.
      tasks, methods: by name.
      run: what all runs share; keys of a training configuration.
      seeds: `train.seed` of the final runs.
      baselines: of `BASELINES`.
      compare_with: the method that the others are tested against; None is the first.
      tune: values by dotted key, all combinations of which are tried for each method; the best on `data.eval` is kept.
      tune_by: the figure that says which is the best; None is accuracy, of language models the loss. Where one class is
        most of the examples, predicting it alone may have the best accuracy, and macro_f1 chooses something else.
      tune_seed: `train.seed` of these trials, none of the final ones.
      sizes: numbers of training rows, for curves of few examples; all rows are always among them.
      lanes: runs of one method, which differ in their seed or in what is tried of `tune`, that are trained in one
        compiled step at most, each as it would be alone; 1 gives each a step and a process of its own, and only then
        is it known what a run takes in time.
    """

    __pydantic_config__: ClassVar = FORBID
    out: str
    models: dict[str, dict[str, Any]]
    tasks: dict[str, Task]
    methods: dict[str, dict[str, Any]]
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    baselines: tuple[Literal["majority", "untuned", "head", "full"], ...] = ("majority", "head", "full")
    compare_with: str | None = None
    tune: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    tune_by: Literal["accuracy", "macro_f1", "loss"] | None = None
    tune_seed: int = 1000
    sizes: tuple[int, ...] = ()
    lanes: int = 1

    @property
    def reference(self) -> str:
        """The method that the others are tested against."""
        return self.compare_with or next(iter(self.methods))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, with what is measured of it.

    Attributes:
      model, task, method: names in the study.
      seed: `train.seed`.
      size: training rows; None for all.
      trial: what is tried of `tune`; None for a final run, which alone sees the test split.
      config: a training configuration as plain values, `out` left out; without a method for the base as it is.
    """

    model: str
    task: str
    method: str
    seed: int
    size: int | None
    trial: Mapping[str, Any] | None
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where it lies in the study's folder."""
        what = f"seed {self.seed}"
        if self.size is not None:
            what += f", {self.size} rows"
        if self.trial is not None:
            what = "trial " + ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.trial.items())
        return Path(*map(_plain, (self.task, self.model, self.method, what)))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, with `key.key=value` overrides.

    Raises:
      FileNotFoundError: no such file.
      ConfigError: what is wrong, one line each, of the study and of every run that it comes to.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no study {file}")
    try:
        tree = _yaml.read(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not YAML that can be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} holds a {type(tree).__name__}; a study is a mapping of keys to values")
    try:
        return parse(configuration.overridden(tree, overrides))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def parse(tree: Mapping[str, Any]) -> Study:
    """A study from plain values, checked; and so is each configuration that it comes to.

    Raises:
      ConfigError: what is wrong, one line each.
    """
    study = configuration.validated(Study, _expanded(tree))
    wrong = _conflicts(study)
    for run in () if wrong else itertools.chain(trials(study), finals(study, {})):
        try:
            config = training(run, "out")
        except ConfigError as error:
            wrong.append(f"{run.folder}: {error}")
            continue
        if study.lanes > 1:
            said = f"is not for lanes={study.lanes}"
            wrong += [f"{run.folder}: {what} {said}: {why}" for what, why in space.refused(config)]
    if wrong:
        raise ConfigError("\n".join(dict.fromkeys(wrong)))
    return study


def training(run: Run, out: str | Path) -> configuration.Config:
    """The training configuration of a run.

    Raises:
      ConfigError: it is not right.
    """
    config = configuration.parse({**run.config, "out": str(out)})
    configuration.method(config.method)
    return config


def trials(study: Study) -> list[Run]:
    """The runs by which each method's rate, and whatever else `tune` names, is chosen; none where it is empty."""
    if not study.tune:
        return []
    grid = [dict(zip(study.tune, values, strict=True)) for values in itertools.product(*study.tune.values())]
    return [
        Run(
            model,
            task,
            name,
            study.tune_seed,
            None,
            trial,
            _configured(study, model, task, part, study.tune_seed, trial),
        )
        for model, task, name, part in _trained(study)
        for trial in grid
    ]


def finals(study: Study, chosen: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> list[Run]:
    """The runs that are tested, with what was chosen for (model, task, method)."""
    out = [
        Run(
            model,
            task,
            name,
            seed,
            size,
            None,
            _configured(study, model, task, part, seed, chosen.get((model, task, name), {})),
        )
        for model, task, name, part in _trained(study)
        for seed in study.seeds
        for size in (None, *study.sizes)
    ]
    if "untuned" in study.baselines:
        out += [
            Run(model, task, "untuned", seed, None, None, _shared(study, model, task))
            for model, task in itertools.product(study.models, study.tasks)
            for seed in (study.seeds if study.tasks[task].writing.temperature else (0,))  # what is drawn has a seed
        ]
    return out


def _trained(study: Study) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    baselines = {name: TRAINED_BASELINES[name] for name in study.baselines if name in TRAINED_BASELINES}
    for model, (name, task) in itertools.product(study.models, study.tasks.items()):
        for method, part in (baselines | study.methods).items():
            if not (method == "head" and task.task not in NAMING):  # a language model has no new head
                yield model, name, method, part


def _configured(
    study: Study, model: str, task: str, part: Mapping[str, Any], seed: int, values: Mapping[str, Any]
) -> dict[str, Any]:
    tree = _merged(_shared(study, model, task), part)
    for key, value in values.items():
        tree = _merged(tree, _nested(key.split("."), value))
    return _merged(tree, {"train": {"seed": seed}})


def _shared(study: Study, model: str, name: str) -> dict[str, Any]:
    task = study.tasks[name]
    own = {"model": {**study.models[model], "task": task.task}, "data": task.data, "train": task.train}
    return _merged(study.run, own)


def _merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """`b` over `a`, section by section; a method is taken whole."""
    out = dict(a)
    for key, value in b.items():
        inner = key != "method" and isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if inner else value
    return out


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _expanded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """With `$NAME` and `~` replaced in what a study itself reads and writes; training configurations do their own."""
    expand, tasks = configuration.expanded_path, tree.get("tasks")
    out = dict(tree) | ({"out": expand(tree["out"])} if "out" in tree else {})
    if isinstance(tasks, Mapping):
        out["tasks"] = {name: _with_paths(task, "test", "general") for name, task in tasks.items()}
        for task in out["tasks"].values():
            if isinstance(task, dict) and "writing" in task:
                task["writing"] = _with_paths(task["writing"], "shots_from")
    return out


def _with_paths(values: Any, *keys: str) -> Any:
    """A copy with `$NAME` and `~` replaced in what these keys name; what is no mapping as it is."""
    if not isinstance(values, Mapping):
        return values
    return {key: configuration.expanded_path(value) if key in keys else value for key, value in values.items()}


def _conflicts(study: Study) -> list[str]:
    """What is wrong with values together."""
    classify = any(task.task in NAMING for task in study.tasks.values())
    empty = [name for name in ("models", "tasks", "methods", "seeds") if not getattr(study, name)]
    taken = [name for name in study.methods if name in BASELINES]
    folders = [run.folder for run in finals(study, {})]
    rules = {
        f"{', '.join(empty)} must not be empty": bool(empty),
        f"methods.{taken and taken[0]} has the name of a baseline": bool(taken),
        f"compare_with={study.compare_with!r} is none of the methods {', '.join(study.methods)}": (
            study.compare_with is not None and study.compare_with not in study.methods
        ),
        "seeds must be different from each other": len({*study.seeds}) < len(study.seeds),
        f"tune_seed={study.tune_seed} is one of the seeds; trials need one of their own": (
            bool(study.tune) and study.tune_seed in study.seeds
        ),
        "every key of tune has one or more values, each once": any(
            not values or len({repr(value) for value in values}) < len(values) for values in study.tune.values()
        ),
        "tune needs data.eval in every task: the test split is not for choosing": bool(study.tune)
        and not all(task.data.get("eval") for task in study.tasks.values()),
        f"tune_by={study.tune_by} is for {' and '.join(NAMING)}; language models are chosen by their loss": (
            study.tune_by not in (None, "loss") and any(task.task not in NAMING for task in study.tasks.values())
        ),
        "sizes must be 1 or more, and different": any(n < 1 for n in study.sizes)
        or len({*study.sizes}) < len(study.sizes),
        f"lanes must be 1 or more, got {study.lanes}": study.lanes < 1,
        f"lanes={study.lanes} needs data.eval in every task: by it trainings in one step are judged": study.lanes > 1
        and not all(task.data.get("eval") for task in study.tasks.values()),
        f"target asks when a run reaches it, and with lanes={study.lanes} no run has a time of its own": study.lanes > 1
        and any(task.target is not None for task in study.tasks.values()),
        f"the baseline majority is for {' and '.join(NAMING)}": not classify and "majority" in study.baselines,
        "the baseline untuned is for CAUSAL_LM: a new head knows nothing": classify and "untuned" in study.baselines,
        "tasks.*.general is for CAUSAL_LM": any(t.general and t.task != "CAUSAL_LM" for t in study.tasks.values()),
        "tasks.*.write is for CAUSAL_LM": any(t.write and t.task != "CAUSAL_LM" for t in study.tasks.values()),
        "names of models, tasks and methods must differ in more than case and signs": (
            len({str(f).lower() for f in folders}) < len(folders)
        ),
    }
    wrong = [message for message, broken in rules.items() if broken]
    for name, t in study.tasks.items():
        wrong += writing.faults(name, t.write, t.metric, t.writing, configuration.paths(t.test), t.group)
    return wrong


def _plain(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.,=+ -]+", "_", name).strip(" .") or "_"
