# SPDX-License-Identifier: Apache-2.0
"""What a configuration's updates make small: the task's loss, with what training alone adds to it."""

from collections.abc import Callable
from typing import Any

import jax

from .._scope import scope
from ._head import Terms
from .config import Config
from .losses import SUMS, Batch, Measured, Sums


def training_sums(config: Config) -> Callable[..., Sums | Measured]:
    """(model, batch, key, groups) -> sums of the losses, as of `losses.SUMS`.

    Label smoothing and the z-loss are in it, and NEFTune's noise where there is a key; an evaluation has none of them.
    """
    sums, train = SUMS[config.model.task], config.train
    terms = Terms(train.label_smoothing, train.z_loss)

    def with_additions(model: Any, batch: Batch, key: jax.Array | None = None, groups: int = 1) -> Sums | Measured:
        with scope(noise=train.neftune):
            return sums(model, batch, key, groups, terms=terms)

    return with_additions
