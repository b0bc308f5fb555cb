# SPDX-License-Identifier: Apache-2.0
"""math-verify in processes of its own, each killed where it takes too long.

sympy can take minutes and gigabytes over a short formula, and stops for no signal but the last. So each question has a
deadline by the wall clock, and a process that misses it is killed and replaced. The processes import math-verify alone,
no JAX; they are started anew, never forked.
"""

import concurrent.futures
import json
import os
import queue
import resource
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

#: Questions after which a process is replaced, for sympy keeps what it computed; and its bytes of address space.
_MOST_ASKED, _MEMORY = 100, 4 * 2**30


class Workers:
    """Processes that compare two formulas.

    Args:
      count: how many.
      seconds: for one question.
    """

    def __init__(self, count: int = 2, seconds: float = 10.0):
        self.seconds = seconds
        self._count = count
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(_Worker())

    def ask(self, solution: str, answer: str) -> bool | None:
        """Whether math-verify finds an answer equal to the solution; None where it took too long or broke."""
        worker = self._free.get()
        try:
            return worker.ask(solution, answer, self.seconds)
        finally:
            self._free.put(worker)

    def map(self, function: Callable[[In], Out], values: Iterable[In]) -> list[Out]:
        """A function of each value, as many at a time as there are processes to ask."""
        with concurrent.futures.ThreadPoolExecutor(self._count) as pool:
            return list(pool.map(function, values))

    def close(self) -> None:
        """Ends the processes."""
        for _ in range(self._count):
            self._free.get().end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One process; it starts with the first question."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0

    def ask(self, solution: str, answer: str, seconds: float) -> bool | None:
        process = self._started()
        self._asked += 1
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([solution, answer]).encode() + b"\n")
            process.stdin.flush()
            line = _line(process, seconds)
        except BrokenPipeError:
            line = None
        if line is None:
            self.end()
            return None
        return json.loads(line)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._asked >= _MOST_ASKED:
            self.end()
        if self._process is None:
            root = str(Path(__file__).parents[4])
            paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
            self._process, self._asked = (
                subprocess.Popen(
                    [sys.executable, "-m", "jpeft.train.scoring.maths.workers"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": paths},
                ),
                0,
            )
            if _line(self._process, 60.0) is None:
                self.end()
                raise ImportError("math-verify does not start: pip install 'jpeft[eval]'")
        return self._process


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The next line that a process says, or None where it says none in time."""
    assert process.stdout is not None
    deadline, said = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not said.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                return None
            said += piece
    return said


def _serve() -> None:
    """Answers questions until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    os.write(out, b"ready\n")
    none: Any = None  # of its own time limits, which are signals
    rules: Any = [LatexExtractionConfig(), ExprExtractionConfig()]
    for line in sys.stdin:
        solution, answer = (
            [_with_imaginary(found) for found in parse(f"${text}$", rules, "no_fallback", parsing_timeout=none)]
            for text in json.loads(line)
        )
        right = bool(solution and answer and verify(solution, answer, timeout_seconds=none))
        os.write(out, json.dumps(right).encode() + b"\n")


def _with_imaginary(found: Any) -> Any:
    """A formula whose one letter is i, which math-verify takes for a variable, with the imaginary unit there."""
    letters = getattr(found, "free_symbols", ())
    if {str(letter) for letter in letters} != {"i"}:
        return found
    from sympy import I

    return found.subs(dict.fromkeys(letters, I))


if __name__ == "__main__":
    _serve()
