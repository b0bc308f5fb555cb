# SPDX-License-Identifier: Apache-2.0
"""Two processes measured in turns: what every side-by-side benchmark stands on.

Each side is a child process that builds its case once and then runs steps on demand, so that both are alive in one
run, take turns on the same cores, and have memory of their own to be measured.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from jpeft.train.program import HUGE_PAGES, VARIABLE


class Side:
    """A child process running `worker(side, case)` of a benchmark script."""

    def __init__(self, script: str, name: str, case: str, cores: list[int]):
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "JAX_PLATFORMS": "cpu"}
        environment["JPEFT_BENCH_CORES"] = ",".join(map(str, cores))
        environment.setdefault(VARIABLE, HUGE_PAGES)  # as the program `jpeft` does, and for both sides
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, script, "--worker", name, case],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.start = self._read()

    def run(self, steps: int) -> dict[str, Any]:
        """Runs `steps` steps; the child's report: seconds per step, and what it adds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the child."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the {self.name} side ended with code {self.process.wait()}")


def serve(prepare: Callable[[], tuple[dict[str, Any], Callable[[int], list[float]]]]) -> None:
    """The child's side: prepares, reports, then answers each line `N` with N timed steps and its peak memory."""
    started, run = prepare()
    print(json.dumps(started), flush=True)
    for line in sys.stdin:
        reset_peak()
        seconds = run(int(line))
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}), flush=True)


def pin() -> int:
    """Binds this process to the cores that its parent chose; call before importing a numerical library."""
    cores = [int(core) for core in os.environ["JPEFT_BENCH_CORES"].split(",")]
    os.sched_setaffinity(0, cores)
    return len(cores)


def reset_peak() -> None:
    """Sets the kernel's high-water mark of this process's memory to what it holds now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_mb() -> float:
    """Highest resident memory since `reset_peak`, in MB."""
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s+(\d+)", file.read()).group(1)) / 1024  # type: ignore[union-attr]


def take_turns(sides: list[Side], steps: int, repeats: int) -> dict[str, dict[str, float]]:
    """Runs the sides alternately; per side the median seconds a step over all repeats and the highest memory."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    peaks = {side.name: 0.0 for side in sides}
    for repeat in range(repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            report = side.run(steps)
            seconds[side.name] += report["seconds"]
            peaks[side.name] = max(peaks[side.name], report["peak_mb"])
    return {name: {"seconds": statistics.median(times), "peak_mb": peaks[name]} for name, times in seconds.items()}
