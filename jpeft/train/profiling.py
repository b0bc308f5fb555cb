# SPDX-License-Identifier: Apache-2.0
"""A trace of a few steady updates: past the first ones, and none of them compiled anything."""

import shutil
from pathlib import Path
from typing import Any

import jax

#: Updates before the first that is traced: caches are warm, and buffers in their places.
WARM_UP = 3


class Profile:
    """Traces `updates` updates in a row into `folder`, once.

    Args:
      updates: how many; 0 traces none.
      folder: where jax.profiler writes.
    """

    def __init__(self, updates: int, folder: Path):
        self._updates, self._folder = updates, folder
        self._seen = self._first = 0
        self._compiled = 0.0
        self.done, self._tracing = updates == 0, False

    def update(self, last: Any, compile_seconds: float) -> None:
        """Called after every update was given to the device: starts and ends the trace where it is time.

        Args:
          last: an array of the update, waited for so that the trace begins and ends with whole updates.
          compile_seconds: spent on compiling so far.
        """
        if self.done:
            return
        self._seen += 1
        if self._tracing and compile_seconds > self._compiled:  # not steady: once more
            self._end(last)
            shutil.rmtree(self._folder, ignore_errors=True)
        elif self._tracing and self._seen - self._first == self._updates:
            self._end(last)
            self.done = True
        if not self.done and not self._tracing and self._seen >= WARM_UP:
            jax.block_until_ready(last)
            jax.profiler.start_trace(str(self._folder))
            self._tracing, self._first, self._compiled = True, self._seen, compile_seconds

    def close(self) -> str | None:
        """Ends a trace that the run was too short for; what to say of it, None where none was asked for."""
        if self._updates == 0:
            return None
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
        if not self.done:
            shutil.rmtree(self._folder, ignore_errors=True)
            return (
                f"no trace: there were no {self._updates} updates in a row after the first {WARM_UP} in which nothing "
                "was compiled; train longer, or lower logging.profile"
            )
        return (
            f"trace of {self._updates} updates: {self._folder}; open it by `xprof --port 8791 {self._folder}` (pip "
            "install xprof), or its trace.json.gz at https://ui.perfetto.dev"
        )

    def _end(self, last: Any) -> None:
        jax.block_until_ready(last)
        jax.profiler.stop_trace()
        self._tracing = False
