# SPDX-License-Identifier: Apache-2.0
"""The untrusted process: it holds the candidate, and answers calls of its function. It never sees a test."""

from typing import Any

from ._pipe import Broken, Pipe


def answer_calls(program: str, name: str, pipe: Pipe) -> None:
    """Runs the candidate's source, then answers each `[number, arguments, named]` with `[number, "value", value]`.

    An exception is `[number, "error", [type, text]]`. What is checked here is for honest candidates; the judge relies
    on none of it.
    """
    namespace: dict[str, Any] = {"__name__": "__candidate__"}
    try:
        exec(compile(program, "candidate.py", "exec"), namespace)
        function = namespace[name]
    except BaseException as error:
        if not isinstance(error, Exception):  # it leaves
            raise
        pipe.say(["broken", described(error)])
        return
    pipe.say(["ready"])
    while True:
        try:
            number, arguments, named = pipe.hear()
        except Broken:
            return
        try:
            answer = [number, "value", function(*arguments, **named)]
        except BaseException as error:
            if not isinstance(error, Exception):
                raise
            answer = [number, "error", [type(error).__name__, described(error)]]
        try:
            pipe.say(answer)
        except ValueError as error:
            pipe.say([number, "error", ["TypeError", f"what {name} gives cannot cross: {error}"]])


def described(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {error}"[:500]
