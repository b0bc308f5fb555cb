# SPDX-License-Identifier: Apache-2.0
"""Attacks on the sandbox, and running them: each is a program that would pass its tests, or leave a trace, if it could.

`python sandbox_attacks.py FOLDER` runs all of them as whoever calls and prints what became of each as JSON. In
`Attack.program`, `CANARY` is a folder that anyone may write, `PORT` a port that listens, `PARENT` the process that
judges. FOOLED says that a plain grader, which runs program and tests in one process, is taken in: so the attack works.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

#: What a test asks of an attack that tells by its answer whether it came through.
DONE = "assert f(2) == 'done'"
#: What a test asks of one that gives a wrong answer and wants it to count.
FOUR = "assert f(2) == 4"
FOOLED = True


@dataclasses.dataclass(frozen=True)
class Attack:
    name: str
    program: str
    tests: str = DONE
    fools: bool = False


def body(text: str) -> str:
    """A program whose `f` is these lines."""
    return "def f(x):\n" + "\n".join(f"    {line}" for line in text.strip("\n").splitlines())


def load() -> list[Attack]:
    """All of them."""
    from sandbox_attacks_table import FORGING, REACHING

    return [*FORGING, *REACHING]


def program(attack: Attack, canary: Path, port: int) -> str:
    """The source, with the places of this run."""
    text = attack.program.replace("CANARY", str(canary)).replace("PORT", str(port))
    return text.replace("PARENT", str(os.getpid()))


def make_canary(folder: Path) -> dict[str, str]:
    """A folder with a secret and a victim, open to all; returns its state."""
    folder.mkdir(parents=True)
    (folder / "victim").write_text("whole")
    (folder / "secret").write_text("the secret")
    for path in (folder, folder / "victim", folder / "secret"):
        path.chmod(0o777)
    return state(folder)


def state(folder: Path) -> dict[str, str]:
    """Names, kinds, modes and contents below a folder."""
    return {
        path.name: f"{path.lstat().st_mode:o} {path.read_text() if path.is_file() and not path.is_symlink() else ''}"
        for path in folder.iterdir()
    }


def fooled(attack: Attack, folder: Path, port: int) -> bool:
    """Whether a plain grader, one process that runs program and tests, takes it for right."""
    canary = folder / "plain"
    make_canary(canary)
    source = f"{program(attack, canary, port)}\n{attack.tests}"
    environment = {**os.environ, "JPEFT_SECRET": "the secret"}
    command = [sys.executable, "-c", source]
    return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode == 0


def run(folder: Path, attacks: list[Attack]) -> dict[str, dict]:
    """What became of each attack: its outcome, whether it passed, and what is not as it was."""
    from jpeft.train.sandbox.box import Problem, Sandbox

    os.environ["JPEFT_SECRET"] = "the secret"
    box = Sandbox(seconds=3.0)
    found = {"layers": box.layers()}
    before = {attack.name: make_canary(folder / f"c{i}") for i, attack in enumerate(attacks)}
    own, shared = folder / "temporary", tempfile.tempdir
    own.mkdir()
    tempfile.tempdir = str(own)  # where no other sandbox on this machine works
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        problems = [
            Problem(program(attack, folder / f"c{i}", port), "f", attack.tests) for i, attack in enumerate(attacks)
        ]
        for attack, verdict in zip(attacks, box.judge_all(problems), strict=True):
            found[attack.name] = {"passed": verdict.passed, "outcome": verdict.outcome, "detail": verdict.detail}
        for i, attack in enumerate(attacks):
            found[attack.name]["touched"] = state(folder / f"c{i}") != before[attack.name]
        found["connected"] = _accepted(server)
    tempfile.tempdir = shared
    found["left"] = [str(path) for path in own.iterdir()]
    found["processes"] = _running()
    return found


def _accepted(server: socket.socket) -> bool:
    try:
        server.accept()
    except BlockingIOError:
        return False
    return True


def _running() -> list[str]:
    """Sandboxed processes of this user that are still there."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"sandbox._process" in line and parent in (1, os.getpid()):
            lines.append(line.decode())
    return lines


if __name__ == "__main__":
    where = Path(sys.argv[1])
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from sandbox_attacks import load as load_  # the classes of the table's own import

    try:
        print(json.dumps(run(where, load_())))
    finally:
        shutil.rmtree(where, ignore_errors=True)
