# SPDX-License-Identifier: Apache-2.0
"""The trusted process: it holds the tests and the verdict, and calls the candidate through a proxy.

Tests run as published, with the entry point's name bound to the proxy. What a call gives is a plain value of an exact
type, so comparing it runs no code of the candidate's.
"""

from typing import Any

from ._candidate import described
from ._pipe import Broken, Pipe

#: Exceptions of a candidate that tests may look for. StopIteration is not among them: raised inside `map`, it would
#: end the tests' own loop, and what is left of it would pass.
_CROSSING = {
    kind.__name__: kind
    for kind in (
        ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, LookupError, NameError,
        NotImplementedError, OverflowError, RecursionError, RuntimeError, TypeError, ValueError, ZeroDivisionError,
    )
}  # fmt: skip


class CandidateError(Exception):
    """The candidate raised an exception of another type."""


class Proxy:
    """Stands for the candidate's function.

    Attributes:
      calls: how many were answered.
    """

    def __init__(self, pipe: Pipe):
        self._pipe = pipe
        self.calls = 0
        self.broken: str | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.broken:
            raise Broken(self.broken)
        try:
            self._pipe.say([self.calls, list(arguments), named])
            answer = self._pipe.hear()
            kind, value = self._checked(answer)
        except Broken as error:
            self.broken = str(error)
            raise
        self.calls += 1
        if kind == "value":
            return value
        raise _CROSSING.get(value[0], CandidateError)(value[1])

    def _checked(self, answer: Any) -> tuple[str, Any]:
        """(kind, value) of the answer to this call; a stray one breaks the conversation."""
        match answer:
            case [int() as number, "value", value] if number == self.calls:
                return "value", value
            case [int() as number, "error", [str(), str()] as value] if number == self.calls:
                return "error", value
        raise Broken("answered another call than the one made")


def judge(setup: str, tests: str, entry_point: str, pipe: Pipe) -> dict[str, Any]:
    """Runs the tests against the candidate at the other end; the verdict as plain values."""
    proxy = Proxy(pipe)
    namespace: dict[str, Any] = {"__name__": "__judge__"}
    try:
        match pipe.hear():
            case ["ready"]:
                pass
            case ["broken" | "refused" as outcome, str() as detail]:
                return _verdict(outcome, detail, 0)
            case _:
                return _verdict("broken", "answered before it was asked", 0)
        exec(compile(setup, "setup.py", "exec"), namespace)
        namespace |= {entry_point: proxy, "candidate": proxy}
        exec(compile(tests, "tests.py", "exec"), namespace)
    except Broken as error:
        return _verdict("broken", f"the candidate {error}", proxy.calls)
    except BaseException as error:
        if not isinstance(error, Exception):
            raise
        return _verdict("failed", described(error), proxy.calls)
    if proxy.broken:  # the tests caught it
        return _verdict("broken", f"the candidate {proxy.broken}", proxy.calls)
    if not proxy.calls:
        return _verdict("failed", f"the tests never called {entry_point}", 0)
    return _verdict("passed", "", proxy.calls)


def _verdict(outcome: str, detail: str, calls: int) -> dict[str, Any]:
    return {"outcome": outcome, "detail": detail[:500], "calls": calls}
