# SPDX-License-Identifier: Apache-2.0
"""Figures told to TensorBoard, Weights & Biases and MLflow as well, each imported only where a run names it.

metrics.jsonl is the truth; these mirror it. A figure is called `train/loss` or `eval/loss`, and its step is the number
of updates. A run that is resumed goes on with the same run of theirs, whose name stands in the run folder's
loggers.json; figures behind the checkpoint, which are computed again, are told again.
"""

import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..models._files import is_file, read_json, write_text
from .config import ConfigError
from .sections import Logging

#: The module that each needs.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


@runtime_checkable
class Logger(Protocol):
    """One that is told."""

    def log(self, update: int, figures: Mapping[str, float]) -> None:
        """Takes in what was measured after `update`."""
        ...

    def close(self) -> None:
        """Ends the run."""
        ...


class TensorBoard:
    """Event files in the run's tensorboard/: `tensorboard --logdir RUN`."""

    def __init__(self, package: Any, options: Logging, folder: Path, settings: Mapping[str, Any]):
        del options, settings
        self._writer = package.SummaryWriter(logdir=str(folder / "tensorboard"))

    def log(self, update: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, update)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of W&B, which takes its account and mode from its own environment variables."""

    def __init__(self, package: Any, options: Logging, folder: Path, settings: Mapping[str, Any]):
        name, known = options.name or folder.name, kept(folder)
        self._run = package.init(
            project=options.project or "jpeft", name=name, config=dict(settings), dir=str(folder), reinit="create_new",
            id=known.get("wandb"), resume="allow",
        )  # fmt: skip
        _keep(folder, known | {"wandb": self._run.id})

    def log(self, update: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=update)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or where MLflow puts it without one."""

    def __init__(self, package: Any, options: Logging, folder: Path, settings: Mapping[str, Any]):
        experiment = package.set_experiment(options.project or "jpeft")
        self._client, known = package.MlflowClient(), kept(folder)
        if "mlflow" in known:
            self._run = known["mlflow"]
            self._go_on(package.exceptions.MlflowException)
            return
        run = self._client.create_run(experiment.experiment_id, run_name=options.name or folder.name)
        self._run = run.info.run_id
        _keep(folder, known | {"mlflow": self._run})
        for key, value in flat(settings).items():
            self._client.log_param(self._run, key, str(value)[:500])

    def _go_on(self, error: type[Exception]) -> None:
        try:
            self._client.update_run(self._run, status="RUNNING")
        except error as reason:
            raise ConfigError(
                f"the run {self._run}, which {KEPT} names, is none of this MLflow's ({reason}); set "
                f"MLFLOW_TRACKING_URI as it was, or delete {KEPT} to begin another one"
            ) from reason

    def log(self, update: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._run, name, value, step=update)

    def close(self) -> None:
        self._client.set_terminated(self._run)


#: In a run's folder: what W&B and MLflow call the run, for the next process to go on with it.
KEPT = "loggers.json"


def kept(folder: Path) -> dict[str, str]:
    """What the loggers call the run in a folder, by logger."""
    file = folder / KEPT
    return read_json(file) if is_file(file) else {}


def _keep(folder: Path, names: Mapping[str, str]) -> None:
    write_text(folder / KEPT, json.dumps(names, indent=2) + "\n")


_LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def check(options: Logging) -> None:
    """Refuses what is not installed, before anything is read.

    Raises:
      ConfigError: a package is missing.
    """
    missing = [name for name in options.to if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        raise ConfigError(
            f"logging.to names {', '.join(missing)}, which is not installed; "
            f"pip install 'jpeft[{','.join(missing)}]', or leave it out"
        )


def opened(options: Logging, folder: Path, settings: Mapping[str, Any]) -> list[Logger]:
    """Those that a run names, each with a run begun, or gone on with where the folder's run has one already.

    Args:
      options: which.
      folder: the run's.
      settings: its configuration as plain values, shown beside the figures.

    Raises:
      ConfigError: MLflow has no such run any more.
    """
    return [_LOGGERS[name](importlib.import_module(PACKAGES[name]), options, folder, settings) for name in options.to]


def figures(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by the names that loggers show them under."""
    named = {}
    for name, value in entry.items():
        if name != "update" and isinstance(value, int | float):
            kind, rest = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
            named[f"{kind}/{rest}"] = float(value)
    return named


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
