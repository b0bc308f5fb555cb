# SPDX-License-Identifier: Apache-2.0
"""Real processes that watch each other: each way to be lost is named, by all the others, in bounded time.

python tests/train/test_roll.py PORT COUNT OWN ARRIVAL STALL ACTION     # is one of them
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from jpeft.train.exits import LOST, WRONG, report
from jpeft.train.roll import Roll, at, name_on_abort

#: In which everything has to be over; far more than a slow machine takes, far less than JAX's own minutes.
BOUND = 45


def act(action: str) -> None:
    """What a process does of itself, once all are there."""
    at("one")
    match action:
        case "waits":
            time.sleep(BOUND)
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "fails":
            raise ValueError("a bad row")
        case "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "breaks":  # as a collective does where another process is gone
            time.sleep(0.5)
            raise RuntimeError("INTERNAL: connection closed by peer")
        case "aborts":  # as JAX's client does then
            time.sleep(0.5)
            os.abort()
        case "stands still":
            time.sleep(BOUND)
    at("two")
    if action == "goes on":
        time.sleep(BOUND)


def main(port: str, count: str, own: str, arrival: str, stall: str, action: str) -> None:
    """A process that watches the others and is watched."""
    try:
        with Roll(f"localhost:{port}", int(count), int(own), arrival=float(arrival), stall=float(stall)) as roll:
            kept = name_on_abort(roll)
            act(action)
            del kept
    except RuntimeError as error:
        sys.exit(report(error))


def run(*actions: tuple[int, str] | str, arrival: float = 30, stall: float = 60) -> list[tuple[int, str]]:
    """Exit code and words of processes that do these actions; `(own, action)` is another number than the place."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    pairs = [pair if isinstance(pair, tuple) else (own, pair) for own, pair in enumerate(actions)]
    count = str(max(own for own, _ in pairs) + 1)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, __file__, port, count]
    here = [(own, action) for own, action in pairs if action != "absent"]
    running = [
        subprocess.Popen([*command, str(own), str(arrival), str(stall), action], **pipes) for own, action in here
    ]
    deadline, said = time.monotonic() + BOUND, []
    try:
        for child, (_, action) in zip(running, here, strict=True):
            if action != "stops":  # which only the end of this ends
                child.wait(max(deadline - time.monotonic(), 0.1))
    finally:
        for child in running:
            if child.poll() is None:
                child.kill()
            said.append((child.wait(), child.communicate()[0]))
    return said


@pytest.mark.parametrize(
    "actions, text",
    [
        (["waits", "absent", "absent"], r"processes 1, 2 of 3 did not arrive within 1.5 s at localhost:\d+"),
        (["waits", "waits", "absent"], r"process 2 of 3 did not arrive within 1.5 s at localhost:\d+"),
        (["absent", "waits"], r"process 0 of 2 did not arrive within 1.5 s: nobody answers at localhost:\d+"),
    ],
    ids=["both", "one", "first"],
)
def test_who_does_not_arrive_is_named(actions, text):
    for code, said in run(*actions, arrival=1.5):
        assert code == LOST
        assert re.search(f"jpeft: lost: {text}", said), said


def test_two_with_one_number_are_refused():
    said = run("waits", (1, "waits"), (1, "waits"), (2, "absent"))
    assert [code for code, _ in said] == [LOST] * 3
    assert re.search(r"process 1 of 3 came twice: \S+, pid \d+, and \S+, pid \d+", said[0][1])


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_who_is_killed_is_named_by_all_others(gone):
    said = run(*["is killed" if own == gone else "waits" for own in range(3)])
    assert [code for code, _ in said] == [-signal.SIGKILL if own == gone else LOST for own in range(3)]
    for own in {0, 1, 2} - {gone}:
        assert re.search(
            rf"process {gone} \(.*\) of 3 is gone: its connection ended; its last sign came from ", said[own][1]
        )
        advice = f"Process {own} was at .*; once the cause is mended, start all again with --resume"
        assert re.search(advice, said[own][1])


@pytest.mark.parametrize("action, code", [("breaks", LOST), ("aborts", LOST)])
def test_what_breaks_because_another_is_gone_names_the_other(action, code):
    said = run("is killed", action)
    assert said[1][0] == code
    assert re.search(r"process 0 \(.*\) of 2 is gone", said[1][1])


@pytest.mark.slow
def test_an_abort_of_its_own_stays_one():
    said = run("waits", "aborts")
    assert said[1][0] == -signal.SIGABRT
    assert re.search(r"process 1 \(.*\) of 2 is gone", said[0][1])


def test_an_error_of_one_ends_all_and_the_error_of_all_is_each_ones_own():
    said = run("waits", "fails", "waits")
    assert [code for code, _ in said] == [LOST, WRONG, LOST]
    for own in (0, 2):
        assert re.search(r"process 1 \(.*\) of 3 ended by an error: ValueError: a bad row", said[own][1])
    assert "jpeft: error: a bad row" in said[1][1]
    assert [code for code, _ in run("fails", "fails")] == [WRONG, WRONG]


def test_who_stands_still_or_is_silent_is_named():
    said = run("goes on", "stands still", "goes on", stall=3)
    assert [code for code, _ in said] == [LOST] * 3
    for _, text in said:
        assert re.search(r"process 1 \(.*\) of 3 does not go on for 3 s where others have: process 0 at two", text)
    silent = run("goes on", "stops", stall=3)
    assert silent[0][0] == LOST
    assert re.search(r"process 1 \(.*\) of 2 gives no sign for 3 s; its last came from ", silent[0][1])


def test_the_environment_says_who_takes_part():
    """As Slurm does, which names the hosts, and takes a port of the job's number."""
    script = (
        "import jax; from jpeft.train import devices\nwith devices.together('auto', 60.0): print(jax.process_count())"
    )
    names = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **names, "SLURM_PROCID": own, "SLURM_LOCALID": own},
            stdout=subprocess.PIPE,
            text=True,
        )
        for own in "01"
    ]
    assert [child.communicate(timeout=BOUND)[0].strip() for child in running] == ["2", "2"]


def test_an_environment_that_does_not_say_is_refused():
    from jpeft.train import devices  # here, for the processes of this file start without JAX

    with pytest.raises(ValueError, match="--distributed auto: this environment"):
        devices.together("auto").__enter__()


def test_an_end_together_is_none():
    assert [code for code, _ in run("ends", "ends", "ends")] == [0, 0, 0]


if __name__ == "__main__":
    main(*sys.argv[1:])
