# SPDX-License-Identifier: Apache-2.0
"""The section `train`: how long, how much at a time, how often to look."""

import dataclasses
from typing import ClassVar, Literal

from ._checks import FORBID, at_least_one, shares


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how much at a time, and how often to look.

    Attributes:
      epochs: passes over the data.
      max_steps: updates, in the place of `epochs`.
      batch_size: rows at a time, over all devices.
      accumulation: batches per update.
      seed: of the order, the adapter's start and dropout; the same seed gives the same run.
      dropout: whether dropout, the model's own and the method's, is on in training.
      ema: decay of a moving average of what is trained, which is evaluated and saved in its place; None keeps none.
      label_smoothing: share of a target's probability that is spread over all classes, in training.
      z_loss: in training, times the square of log sum exp of the logits.
      neftune: alpha of NEFTune's noise on the embedded tokens, in training; 0 is none.
      log_every: updates between two lines of metrics.jsonl.
      eval_every: updates between two evaluations; None is once an epoch.
      save_every: updates between two checkpoints, from which `--resume` goes on exactly; None saves only when the run
        is interrupted.
      keep: checkpoints that are kept, the newest ones.
      best: figure of the evaluation whose best adapter is kept (in the run's best/ and, at the end, adapter/), such as
        `accuracy` or `loss`; None keeps the last.
      objective: `likelihood` of the labels, or `dpo`: preferences between two answers (see the section `preference`).
      samples: what the model writes after every evaluation: prompts, or how many examples of data.eval to begin.
      sample_tokens: how many tokens of each.
      on_nan: where a loss or gradient is not finite, `stop` before the update, or `skip` it and go on.
      max_skips: updates that `skip` leaves out at most; one more stops.
      patience: evaluations without a gain in `best` after which training ends early; None goes on to the end.
    """

    __pydantic_config__: ClassVar = FORBID
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 32
    accumulation: int = 1
    seed: int = 0
    dropout: bool = True
    ema: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    neftune: float = 0.0
    log_every: int = 10
    eval_every: int | None = None
    save_every: int | None = 500
    keep: int = 2
    on_nan: Literal["stop", "skip"] = "stop"
    max_skips: int = 10
    objective: Literal["likelihood", "dpo"] = "likelihood"
    samples: int | tuple[str, ...] = 0
    sample_tokens: int = 64
    best: str | None = None
    patience: int | None = None

    def wrong(self) -> list[str]:
        """What cannot be, a line each."""
        counts = at_least_one(
            {
                "train.epochs": self.epochs,
                "train.max_steps": self.max_steps,
                "train.batch_size": self.batch_size,
                "train.accumulation": self.accumulation,
                "train.log_every": self.log_every,
                "train.eval_every": self.eval_every,
                "train.save_every": self.save_every,
                "train.keep": self.keep,
                "train.max_skips": self.max_skips,
                "train.patience": self.patience,
                "train.sample_tokens": self.sample_tokens,
            }
        )
        if isinstance(self.samples, int) and self.samples < 0:
            counts.append(f"train.samples must not be negative, got {self.samples}")
        if not 0 <= self.seed < 2**32:
            counts.append(f"train.seed must be in [0, 2**32), got {self.seed}")
        if not self.samples and self.sample_tokens != Train.sample_tokens:
            counts.append("train.sample_tokens is for train.samples, which wants none")
        if self.on_nan != "skip" and self.max_skips != Train.max_skips:
            counts.append(f"train.max_skips is for train.on_nan=skip, got {self.on_nan}")
        part = shares({"train.ema": self.ema or 0.0, "train.label_smoothing": self.label_smoothing})
        least = {"train.z_loss": self.z_loss, "train.neftune": self.neftune}
        part += [f"{key} must not be negative, got {value}" for key, value in least.items() if not value >= 0]
        return counts + part
