# SPDX-License-Identifier: Apache-2.0
"""What a run says while it runs: a bar on a terminal, lines elsewhere, nothing from processes but the first."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from .devices import is_main


def say(text: str) -> None:
    """Prints, from the first process, without breaking a bar."""
    if is_main():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Meter:
    """Counts tokens and time, and shows them: real tokens, and padded ones that were computed as well.

    Args:
      total: updates of the run.
      done: those made before.
    """

    def __init__(self, total: int, done: int):
        from tqdm import tqdm

        shown = is_main() and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=" updates", disable=not shown, dynamic_ncols=True)
        self._real = self._padded = self._updates = 0
        self._sum = {"real": 0, "padded": 0, "seconds": 0.0}
        self._compiling = 0.0
        self._since = time.perf_counter()

    def add(self, real: int, padded: int) -> None:
        """Counts one update."""
        self._real, self._padded, self._updates = self._real + real, self._padded + padded, self._updates + 1

    def lap(self, compile_seconds: float) -> dict[str, float]:
        """Rates since the last lap, without the time that went into compilation, of which the sum so far is given."""
        now = time.perf_counter()
        seconds = max(now - self._since - (compile_seconds - self._compiling), 1e-9)
        rates = {
            "tokens_per_s": round(self._real / seconds, 1),
            "padded_tokens_per_s": round(self._padded / seconds, 1),
        }
        for name, value in (("real", self._real), ("padded", self._padded), ("seconds", seconds)):
            self._sum[name] += value
        self._bar.update(self._updates)
        self._real = self._padded = self._updates = 0
        self._since, self._compiling = now, compile_seconds
        return rates

    def restart(self) -> None:
        """Leaves out the time since the last lap (an evaluation's)."""
        self._since = time.perf_counter()

    def show(self, entry: Mapping[str, Any]) -> None:
        """Writes the figures of a lap beside the bar."""
        self._bar.set_postfix_str(
            f"loss {entry['loss']:.4f}, lr {entry['lr']:.2e}, {entry['tokens_per_s']:,.0f} tokens/s "
            f"({entry['padded_tokens_per_s']:,.0f} padded)"
        )

    def overall(self) -> tuple[float, float]:
        """Real and padded tokens/s over all laps."""
        seconds = max(self._sum["seconds"], 1e-9)
        return self._sum["real"] / seconds, self._sum["padded"] / seconds

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
