# SPDX-License-Identifier: Apache-2.0
"""The section `logging`: who else is told what metrics.jsonl holds, and whether updates are traced."""

import dataclasses
from typing import ClassVar, Literal

from ._checks import FORBID


@dataclasses.dataclass(frozen=True)
class Logging:
    """Where figures go beside metrics.jsonl, which always has them all.

    Attributes:
      to: any of `tensorboard`, `wandb` and `mlflow`, whose packages have to be installed.
      project: what W&B calls a project and MLflow an experiment; None is `jpeft`.
      name: of the run; None is that of its folder.
      profile: steady updates that jax.profiler traces into the run's profile/; 0 traces none.
    """

    __pydantic_config__: ClassVar = FORBID
    to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    project: str | None = None
    name: str | None = None
    profile: int = 0

    def wrong(self) -> list[str]:
        """What cannot be, a line each."""
        lines = [] if len({*self.to}) == len(self.to) else [f"logging.to names one twice: {', '.join(self.to)}"]
        if not {*self.to} & {"wandb", "mlflow"} and (self.project is not None or self.name is not None):
            lines.append("logging.project and logging.name are for wandb and mlflow, which logging.to does not name")
        if self.profile < 0:
            lines.append(f"logging.profile must not be negative, got {self.profile}")
        return lines
