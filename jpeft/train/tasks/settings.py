# SPDX-License-Identifier: Apache-2.0
"""How a task is run: which rows, and how texts are written."""

import dataclasses
import math
from typing import ClassVar

from ..sections._checks import FORBID

#: The least that a number may be.
_LEAST = {"limit": 1, "batch_size": 1, "max_length": 1, "shots": 0, "samples": 1, "max_new_tokens": 1}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a task is run.

    Attributes:
      data: a file in the place of the task's source on the hub.
      limit: rows that are taken, the first ones; None takes all.
      seed: of what is drawn, and of the intervals.
      batch_size: prompts or texts at a time.
      max_length: longest text in tokens, where texts are read; None as in training, else 128.
      shots: rows shown with their answers in front of a prompt, the first ones of `shots_from`.
      shots_from: a file in the place of the task's.
      samples: texts for each prompt.
      temperature, top_p: of what is drawn; temperature 0 takes the likeliest token.
      max_new_tokens: of a text; None as the task says.
      chat: whether a prompt is a user's message in the chat template of the adapter's training, or the model's own.
    """

    __pydantic_config__: ClassVar = FORBID
    data: str | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    max_length: int | None = None
    shots: int = 0
    shots_from: str | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    max_new_tokens: int | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {least} or more, got {value}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature is 0 or a number above it, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is a share of what may be drawn, in (0, 1]; got {self.top_p}")
        if self.top_p is not None and not self.temperature:
            raise ValueError(f"--top-p {self.top_p} is of what is drawn; temperature 0 draws nothing, so give one")
        if self.shots_from is not None and not self.shots:
            raise ValueError(f"--shots-from {self.shots_from} is where shots are from, and shots is 0; say how many")
        if self.samples > 1 and not self.temperature:
            raise ValueError("several samples of temperature 0 are all the same; give --temperature")

    def changed(self, *names: str) -> list[str]:
        """Those of some options that are not at their default, as options of `jpeft eval`."""
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != _DEFAULTS[name]]


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Settings)}
