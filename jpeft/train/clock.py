# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run goes: what is not spent on updates is measured by name. This file imports no JAX."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, get_args

#: What takes time beside updates. `data`: the loop waited for a batch while the device had nothing to do.
Part = Literal["compile", "data", "evaluation", "samples", "save", "log"]


class Clock:
    """Seconds by part, and since the start.

    Attributes:
      spent: seconds of every part so far.
    """

    def __init__(self) -> None:
        self.spent: dict[Part, float] = dict.fromkeys(get_args(Part), 0.0)
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def on(self, part: Part) -> Iterator[None]:
        """Counts what runs inside as time spent on `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] += time.perf_counter() - start

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def apart(self) -> float:
        """Seconds that went into something else than updates and what belongs to them: data and log lines."""
        spent = self.spent
        return spent["compile"] + spent["evaluation"] + spent["samples"] + spent["save"]

    def shares(self) -> dict[str, float]:
        """Every part's share of all time; what is left is `updates`."""
        total = max(self.elapsed, 1e-9)
        shares: dict[str, float] = {part: seconds / total for part, seconds in self.spent.items()}
        return {"updates": max(1.0 - sum(shares.values()), 0.0), **shares}

    def __str__(self) -> str:
        parts = [f"{name} {100 * share:.1f} %" for name, share in self.shares().items() if share >= 0.0005]
        return f"{self.elapsed:.1f} s: {', '.join(parts)}"
