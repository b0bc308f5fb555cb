# SPDX-License-Identifier: Apache-2.0
"""What a run measures of itself and shows: the loop calls this, and it changes nothing that is trained.

  watch = Watch(config, dataset, parts, folder, update, done, standing)
  for number, fed in watch.waiting(feed):
      state, metrics = update(...)
      watch.update(metrics, fed.real, fed.padded)
      if watch.due(number):
          losses += watch.log(number)
      if evaluates:
          watch.evaluated(number, evaluation, model)     # then watch.improved, watch.exhausted
  watch.end()

Nothing is read back from the device but in `pending_figures`, `log` and what follows an evaluation.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .._partition import combine
from ..models._hub import model_folder
from . import loggers, tokenizer, utilization
from .clock import Clock
from .config import Config
from .devices import is_main
from .evaluate import Evaluation
from .folder import RunFolder
from .job import Dataset, Parts
from .optim import schedule
from .plots import curves
from .profiling import Profile
from .progress import Bar, say
from .samples import Sampler
from .standing import Standing
from .step import Compiled, Metrics

T = TypeVar("T")


class Watch:
    """One run's eyes.

    Args:
      config, dataset, parts, folder: of the run.
      update: its compiled step, asked for the time that went into compiling.
      done: updates made before.
      standing: of the evaluations before.
      carried: what `carry` gave, of updates made before that have no line yet.

    Attributes:
      standing: of all evaluations so far; part of what an exact resume restores.
      clock: where the time went; `with watch.clock.on("save"): ...` counts a checkpoint's.
    """

    def __init__(
        self, config: Config, dataset: Dataset, parts: Parts, folder: RunFolder, update: Compiled,
        done: int = 0, standing: Standing | None = None, carried: Iterable[Any] = (),
    ):  # fmt: skip
        self.standing, self.clock = standing or Standing(), Clock()
        self._config, self._dataset, self._folder, self._compiled = config, dataset, folder, update
        self._rate = schedule(config.optimizer, dataset.num_updates)
        model = combine(parts.graphdef, parts.trainable, parts.frozen)
        self._flops = utilization.flops_per_token(model, config.model.task)
        self._peak = utilization.peak_flops(jax.devices() if config.mesh else jax.devices()[:1])
        if self._peak:
            share = self._flops / max(1, utilization.matmul_weights(model, config.model.task))
            say(
                f"MFU: {self._flops / 1e6:,.1f} MFLOP a token, {share:.2g} x weights (4N PEFT, 6N full, 2N below the "
                f"lowest layer that is trained), of {self._peak / 1e9:,.0f} GFLOP/s"
            )
        self._loggers = loggers.opened(config.logging, folder.path, dataclasses.asdict(config)) if is_main() else []
        self._profile = Profile(config.logging.profile, folder.path / "profile")
        self._unit = dataset.train.unit
        self._sampler = _sampler(config, dataset)
        self._pending = [Metrics(*jax.tree.map(jnp.float32, tuple(metrics))) for metrics in carried]
        self._lap = _Lap(self.clock, 0, 0)
        self._sum = [0, 0, 0.0]
        self._bar = Bar(dataset.num_updates, done)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, with the time counted in which the device had nothing to do and waited for one."""
        source, nothing = iter(batches), object()
        while True:
            before = self.clock.elapsed
            item: Any = next(source, nothing)
            if item is nothing:
                return
            last: Any = self._pending[-1].loss if self._pending else None
            if last is None or last.is_ready():
                self.clock.spent["data"] += self.clock.elapsed - before
            yield item

    def update(self, metrics: Metrics, real: int, padded: int) -> None:
        """Takes in one update: what it measured, still on the device, and its tokens, real and with padding."""
        self._pending.append(metrics)
        self._lap.real, self._lap.padded = self._lap.real + real, self._lap.padded + padded
        self._profile.update(metrics.loss, self._compiled.compile_seconds)

    def due(self, number: int) -> bool:
        """Whether a line is written after update `number`."""
        return number % self._config.train.log_every == 0 or number == self._dataset.num_updates

    def pending_figures(self) -> np.ndarray:
        """`[updates, 3]` loss, labels and gradient norm since the last line, once the device has computed them."""
        read = jax.device_get([tuple(metrics)[:3] for metrics in self._pending])
        return np.array(read, np.float64).reshape(-1, 3)

    def carry(self) -> list[list[Any]]:
        """What was measured since the last line, as JSON holds it without loss."""
        return jax.tree.map(float, [list(metrics) for metrics in jax.device_get(self._pending)])

    def log(self, number: int) -> list[float]:
        """Waits for the device, writes and shows a line, and gives the losses since the last one."""
        if not self._pending:
            return []
        losses, labels, norms = self.pending_figures().T
        others = jax.device_get([metrics.figures for metrics in self._pending])
        with self.clock.on("log"):
            self.clock.spent["compile"] = self._compiled.compile_seconds
            entry = {
                "update": number,
                "epoch": self._dataset.epochs(number),
                "loss": _mean(losses, labels),
                "losses": [_finite(loss) for loss in losses],
                **{name: _mean(np.array([figures[name] for figures in others]), labels) for name in others[0]},
                "grad_norm": _finite(norms[-1]),
                "lr": float(np.asarray(self._rate(number - 1))),
                **self._lap_figures(),
            }
            self._write(entry)
            self._bar.show(number, entry)
        self._pending, self._lap = [], _Lap(self.clock, 0, 0)
        return losses.tolist()

    def evaluated(self, number: int, evaluation: Evaluation, model: Callable[[], Any]) -> None:
        """Writes and says an evaluation, follows the configured figure, and shows what the model writes.

        Args:
          number: updates made.
          evaluation: of the model after them.
          model: makes it, where samples are wanted.
        """
        followed = self._config.train.best
        if followed is not None:
            self.standing = self.standing.after(followed, evaluation.metrics[followed], number)
        figures = {f"eval_{name}": value for name, value in evaluation.metrics.items()}
        self._write({"update": number, "epoch": self._dataset.epochs(number), **figures})
        said = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
        epoch = self._dataset.epochs(number)
        when = f"update {number}" if epoch is None else f"update {number}, epoch {epoch:.2f}"
        say(f"{when}: {said}{' (the best)' if self.improved else ''}")
        if self._sampler is not None:
            with self.clock.on("samples"):
                samples = self._sampler(model())
            self._folder.log_samples(number, samples)
            for sample in samples:
                say(f"  {sample.prompt!r} -> {sample.text!r}")

    def _write(self, entry: dict[str, Any]) -> None:
        whole = self._folder.log(entry)
        for logger in self._loggers:
            logger.log(entry["update"], loggers.figures(whole))

    @property
    def improved(self) -> bool:
        """Whether the last evaluation is the best so far."""
        return self.standing.best is not None and not self.standing.since

    @property
    def exhausted(self) -> bool:
        """Whether training ends early: as many evaluations without a gain as there is patience."""
        patience = self._config.train.patience
        return patience is not None and self.standing.since >= patience

    def end(self) -> tuple[float, float]:
        """Ends the bar and the loggers, draws the figures, says where the time went.

        Returns:
          real and padded tokens/s, or images/s, over all updates.
        """
        self._bar.close()
        self.clock.spent["compile"] = self._compiled.compile_seconds
        for logger in self._loggers:
            logger.close()
        if is_main():
            self._draw()
        said = self._profile.close()
        say("\n".join([f"time: {self.clock}", *([said] if said else [])]))
        real, padded, seconds = self._sum
        counted = max(seconds, 1e-9) * self._unit.tokens
        return real / counted, padded / counted

    def _draw(self) -> None:
        """Draws the figures; a disk without room for them takes nothing from the run, whose adapter comes next."""
        try:
            curves(self._folder.path / "metrics.jsonl", self._folder.path / "plots")
        except OSError as error:
            say(f"WARNING: {self._folder.path / 'plots'} could not be drawn: {error}")

    def _lap_figures(self) -> dict[str, Any]:
        """Rates since the last line, without the time of compilation, evaluation and saving."""
        lap, seconds = self._lap, max(self._lap.seconds(), 1e-9)
        for index, value in enumerate((lap.real, lap.padded, seconds)):
            self._sum[index] += value
        return {
            f"{self._unit.name}_per_s": round(lap.real / self._unit.tokens / seconds, 1),
            f"padded_{self._unit.name}_per_s": round(lap.padded / self._unit.tokens / seconds, 1),
            "mfu": None if not self._peak else _rounded(self._flops * lap.real / seconds / self._peak),
            "data_wait": _rounded(lap.waited() / seconds),
            "peak_memory_mb": round(utilization.peak_bytes() / 2**20, 1),
        }


def _sampler(config: Config, dataset: Dataset) -> Sampler | None:
    """What writes samples, where the configuration wants any."""
    wanted = config.train.samples
    if not wanted or dataset.eval is None:
        return None
    ends = tokenizer.ends(model_folder(config.model.path), dataset.tokenizer)
    return Sampler(wanted, config.train.sample_tokens, dataset.tokenizer, ends, dataset.eval.examples)


class _Lap:
    """Tokens and time between two lines."""

    def __init__(self, clock: Clock, real: int, padded: int):
        self._clock, self.real, self.padded = clock, real, padded
        self._start, self._apart, self._data = clock.elapsed, clock.apart, clock.spent["data"]

    def seconds(self) -> float:
        return self._clock.elapsed - self._start - (self._clock.apart - self._apart)

    def waited(self) -> float:
        return self._clock.spent["data"] - self._data


def _finite(value: float) -> float | None:
    """A number as JSON has it; None for that of an update that was skipped."""
    return float(value) if math.isfinite(value) else None


def _mean(values: np.ndarray, weights: np.ndarray) -> float | None:
    """Over the updates that were made; None if all were skipped."""
    if np.isfinite(values).all():
        return float(values @ weights / weights.sum())
    made = np.isfinite(values)
    return float(values[made] @ weights[made] / weights[made].sum()) if made.any() else None


def _rounded(share: float) -> float:
    """Three significant digits."""
    return share if share == 0 else round(share, 2 - math.floor(math.log10(abs(share))))
