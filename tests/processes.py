# SPDX-License-Identifier: Apache-2.0
"""Real processes of one run on one machine, and one of them killed where a test wants it."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

#: Long enough for a slow machine to start and compile; a hanging collective ends here.
SECONDS = 300

#: The program, with a kill after the `{number}`-th update that this process gives to its device; 0 is none.
_PROGRAM = """
import os, signal
from jpeft.train import cli, watch
given, real = [0], watch.Watch.update
def update(self, *args):
    real(self, *args)
    given[0] += 1
    if given[0] == {number}:
        os.kill(os.getpid(), signal.{how})
watch.Watch.update = update
cli.main()
"""


def run_all(command: Callable[[str, int], Sequence[str]], count: int, devices: int = 1) -> list[tuple[int, str]]:
    """Exit code and words of processes that are started as `command(port, process)`, each with so many devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command(port, process), env=environment, **pipes) for process in range(count)]
    said = [""] * count
    try:
        for process, child in enumerate(running):
            said[process] = child.communicate(timeout=SECONDS)[0]
    finally:
        for process, child in enumerate(running):
            if child.poll() is None:
                child.kill()
                said[process] += child.communicate()[0]
    return [(child.returncode, text) for child, text in zip(running, said, strict=True)]


def train(
    config: Path, *options: str, count: int, killed: int | None = None, number: int = 0, how: str = "SIGKILL"
) -> list[tuple[int, str]]:
    """`jpeft train` in several processes of one device each; `killed` gets a signal after its `number`-th update."""

    def command(port: str, process: int) -> list[str]:
        code = _PROGRAM.format(number=number if process == killed else 0, how=how)
        where = ["--distributed", f"localhost:{port},{count},{process}"] if count > 1 else []
        return [sys.executable, "-c", code, "train", str(config), *options, *where]

    return run_all(command, count)
