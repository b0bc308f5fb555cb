# SPDX-License-Identifier: Apache-2.0
"""What a configuration's updates make small, and what its evaluations measure."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from .._scope import scope
from ._head import Terms
from .config import Config
from .losses import SUMS, Batch, Measured, Sums
from .measures import MEASURES, Measure, measured_by
from .preference import PreferenceSums


def objective(config: Config) -> tuple[Callable[..., Any], Measure]:
    """What is trained, as `make_step` takes it, and what is measured.

    Label smoothing, the z-loss and NEFTune's noise (where there is a key) are in the first alone.
    """
    train, task = config.train, config.model.task
    if train.objective == "likelihood":
        sums = functools.partial(SUMS[task], terms=Terms(train.label_smoothing, train.z_loss))
        return _with_noise(sums, train.neftune), MEASURES[task]
    preference = PreferenceSums(config.preference)
    return _with_noise(preference, train.neftune), measured_by(preference)


def _with_noise(sums: Callable[..., Sums | Measured], alpha: float) -> Callable[..., Sums | Measured]:
    def noisy(model: Any, batch: Batch, key: jax.Array | None = None, groups: int = 1) -> Sums | Measured:
        with scope(noise=alpha):
            return sums(model, batch, key, groups)

    return noisy
