# SPDX-License-Identifier: Apache-2.0
"""The sandbox as the rest of the program sees it: problems in, verdicts out; nothing of theirs is run in here.

verdict = Sandbox().judge(Problem("def f(x):\\n    return x + 1", "f", "assert f(1) == 2"))
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import _jail
from ._confine import NEEDED, Layers, Unconfined, readable
from ._values import MOST_BYTES, ValueRefused, decode, encode

__all__ = ["NEEDED", "Layers", "Problem", "Sandbox", "Unconfined", "Verdict"]

#: Starts a process: the package's own files are in reach until it has imported them, and no longer.
_START = """
import sys
sys.path.insert(0, {root!r})
from jpeft.train.sandbox._process import main
sys.path.remove({root!r})
main()
"""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A program and what it must do.

    Attributes:
      program: source that a model wrote.
      entry_point: name of the function in it.
      tests: source that calls `entry_point`, or `candidate`, and raises where it is wrong.
      setup: source that the tests rely on; it is run beside the tests, not beside the program.
    """

    program: str
    entry_point: str
    tests: str
    setup: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
      passed: every test did.
      outcome: `passed`, `failed` (a test did not), `broken` (it ended, or gave what is no value), or `timeout`.
      detail: why, in a line; empty where it passed.
      calls: calls that were answered.
      seconds: of wall clock.
    """

    passed: bool
    outcome: str
    detail: str
    calls: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """Runs programs that a model wrote against tests, each in two confined processes.

    Attributes:
      seconds: wall clock of one problem, after which both processes are killed.
      memory: bytes of address space of each process.
      workers: problems at a time.
      python: interpreter of 3.11 or newer to run them with.
      jail: None takes `bwrap` or `nsjail` where one is installed and works here; False takes neither.
    """

    seconds: float = 10.0
    memory: int = 512 * 2**20
    workers: int = 4
    python: str = sys.executable
    jail: bool | None = None

    @functools.cached_property
    def _tool(self) -> tuple[str | None, Layers]:
        """The jail to use, and the layers that a process in it reports."""
        reasons = []
        for tool in () if self.jail is False else _jail.installed():
            try:
                return tool, {**self._report(tool), "jail": tool}
            except OSError as error:
                reasons.append(f"{tool} does not run here: {error}")
        return None, {**self._report(None), "jail": f"missing: {'; '.join(reasons) or 'not installed'}"}

    def layers(self) -> Layers:
        """What stands around a program on this machine, by name.

        Raises:
          Unconfined: a layer that is needed is missing; the message says which, and why.
        """
        return {"processes": "two, joined by values", **self._tool[1]}

    def judge(self, problem: Problem) -> Verdict:
        """Runs one problem.

        Raises:
          Unconfined: as `layers`.
        """
        tool, _ = self._tool
        started = time.monotonic()
        found = self._run(problem, tool, started + self.seconds)
        if found["outcome"] == "refused":
            raise Unconfined(found["detail"])
        seconds = time.monotonic() - started
        return Verdict(found["outcome"] == "passed", found["outcome"], found["detail"], found["calls"], seconds)

    def judge_all(self, problems: Sequence[Problem]) -> Iterator[Verdict]:
        """Runs many problems, `workers` at a time; verdicts come in their order.

        Raises:
          Unconfined: as `layers`, before any is run.
        """
        self.layers()
        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(self.judge, problems)

    def _report(self, tool: str | None) -> Layers:
        with _Pair(self, tool) as pair:
            pair.start({"role": "report"}, pair.reads, pair.writes, pair.verdict)
            found = pair.result(time.monotonic() + max(self.seconds, 20.0))
        if found["outcome"] != "report":
            raise Unconfined(found["detail"])
        return found["layers"]

    def _run(self, problem: Problem, tool: str | None, deadline: float) -> dict[str, Any]:
        candidate = {"role": "candidate", "program": problem.program, "entry_point": problem.entry_point}
        judge = {"role": "judge", "setup": problem.setup, "tests": problem.tests, "entry_point": problem.entry_point}
        with _Pair(self, tool) as pair:
            try:
                pair.start(candidate, pair.asked, pair.answers)
            except ValueRefused as error:
                return {"outcome": "broken", "detail": str(error), "calls": 0}
            pair.start(judge, pair.reads, pair.writes, pair.verdict)
            return pair.result(deadline)


class _Pair(contextlib.ExitStack):
    """Two processes, the pipes between them and to here, and an empty folder; all of it is gone at the end."""

    def __init__(self, box: Sandbox, tool: str | None):
        super().__init__()
        self._box, self._jail = box, tool
        self.folder = self.enter_context(tempfile.TemporaryDirectory(prefix="jpeft-sandbox-"))
        os.chmod(self.folder, 0o755)
        self.asked, self.writes = self._pipe()
        self.reads, self.answers = self._pipe()
        self._result, self.verdict = self._pipe()
        self._ours = [self.asked, self.writes, self.reads, self.answers, self.verdict]

    def start(self, job: dict[str, Any], *descriptors: int) -> None:
        """Starts a process with descriptors to hear on, to speak on and, but for the candidate, for the verdict.

        Raises:
          ValueRefused: the job is too long.
        """
        box = self._box
        root = str(Path(__file__).parents[3])
        program = [box.python, "-I", "-S", "-B", "-c", _START.format(root=root), *map(str, descriptors)]
        sees = [*readable(), root, str(Path(box.python).parent), sys.prefix, sys.base_prefix]
        front = _jail.front(self._jail, sees, self.folder, descriptors) if self._jail else []
        limits = {"seconds": box.seconds, "memory": box.memory, "jailed": self._jail is not None}
        with tempfile.TemporaryFile() as file:
            file.write(encode({**job, **limits}))
            file.seek(0)
            process = subprocess.Popen(
                [*front, *program],
                stdin=file,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=descriptors,
                env={},
                cwd=self.folder,
                start_new_session=True,
            )
        self.callback(_end, process)

    def result(self, deadline: float) -> dict[str, Any]:
        """What the process with the verdict's descriptor says, before the deadline."""
        for descriptor in self._ours:
            os.close(descriptor)
        self._ours.clear()
        said = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._result, selectors.EVENT_READ)
            while not said.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return {"outcome": "timeout", "detail": f"no verdict in {self._box.seconds:g} seconds", "calls": 0}
                piece = os.read(self._result, 2**16)
                if not piece or len(said) > MOST_BYTES:
                    return {"outcome": "broken", "detail": "the tests' own process ended", "calls": 0}
                said += piece
        return decode(said)

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        for end in ends:
            self.callback(self._close, end)
        return ends

    def _close(self, descriptor: int) -> None:
        if descriptor in self._ours or descriptor == self._result:
            os.close(descriptor)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process with its whole group, and waits for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
