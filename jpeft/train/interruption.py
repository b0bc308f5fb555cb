# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run: the first asks for a checkpoint, the second ends the process at once.

A run of several processes has to stop after the same update in all of them. There SIGTERM is left to JAX, whose
coordination service agrees on that update, and tells of a TPU's maintenance in the same way; SIGINT is passed on as
SIGTERM.
"""

import os
import signal
import sys
from types import FrameType
from typing import Any

import jax


class Interrupted(Exception):
    """A run was asked to stop, and has; its checkpoint is written."""


class Interruption:
    """Whether the run was asked to stop; takes the signals over inside a `with`.

    Example:
      >>> with Interruption() as interruption:
      ...     for number in range(updates):
      ...         ...
      ...         if interruption.after(number): ...  # save and leave
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}
        self._several = jax.process_count() > 1

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._take)
            except ValueError:  # only a program's main thread may: elsewhere signals stay whose they are
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def after(self, update: int) -> bool:
        """Whether to stop after this update; asked after each, by every process."""
        if not self._several:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(update)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True
        name = signal.Signals(number).name
        print(f"jpeft: {name}: saving a checkpoint, then ending; once more ends at once", file=sys.stderr, flush=True)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
