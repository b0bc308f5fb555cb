# SPDX-License-Identifier: Apache-2.0
"""The beginning of a confined process: it reads its job, confines itself, and only then runs source of others."""

import os
import sys

from ._candidate import answer_calls
from ._confine import Unconfined, confine
from ._judge import judge
from ._pipe import Pipe
from ._values import decode


def main() -> None:
    """Arguments are file descriptors: to hear on, to speak on, and one for the verdict, which the candidate has not."""
    reads, writes, *verdict = (int(argument) for argument in sys.argv[1:])
    job = decode(sys.stdin.buffer.read())
    other, result = Pipe(reads, writes), Pipe(reads, *verdict or [writes])
    _silence()
    try:
        layers = confine(job["seconds"], job["memory"], job["jailed"])
    except Unconfined as error:
        refused = {"outcome": "refused", "detail": str(error), "calls": 0}
        result.say(["refused", str(error)] if job["role"] == "candidate" else refused)
        return
    match job["role"]:
        case "report":
            result.say({"outcome": "report", "layers": layers})
        case "candidate":
            answer_calls(job["program"], job["entry_point"], other)
        case "judge":
            result.say(judge(job["setup"], job["tests"], job["entry_point"], other))


def _silence() -> None:
    """What code prints, nobody reads; what it reads, is empty."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if null > 2:
        os.close(null)
