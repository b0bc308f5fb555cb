# SPDX-License-Identifier: Apache-2.0
"""The processes of one run watch each other: whoever does not come, goes away or stands still is named, and all end.

JAX waits minutes for a process that is gone, for ever for one that stands still, and then aborts without a name. So
every process keeps a connection to process 0, opened before JAX's own on the same port, and says every second how far
it is. Process 0 compares, and tells all the others what it finds; they watch process 0.

  with Roll("first-host:1234", count=2, own=1):     # raises Lost if one does not come
      jax.distributed.initialize(...)
      for ...:
          at("update 12")                           # by all processes in the same order

A process that ends by an error says so, and the others end too. One that is killed has its connection closed by its
system, which the others see at once; one whose machine is gone is silent.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any

from .exits import LOST, Lost, line, report

#: Seconds between two signs, and without any until a process counts as gone.
PULSE, SILENCE = 1.0, 60.0
#: How much longer than one process behind the others all of them may stand still: they compile, or read data.
ALL_STALL = 4
#: Seconds in which a process may end by its own error before it ends because of another's.
GRACE = 5.0

#: How errors of JAX's runtime begin that may be another process's fault.
_FROM_JAX = re.compile("UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION")

#: What to do, once all have ended.
ADVICE = "; once the cause is mended, start all again with --resume"

_here: "Roll | None" = None


def at(where: str) -> None:
    """Says where this process is; all processes of a run say the same, in the same order. Alone it does nothing."""
    if _here is not None:
        _here.at(where)


class Roll:
    """The processes of a run, from the first sign of each to the end; a context.

    Args:
      address: `host:port` of process 0, which listens there until all have come.
      count: of processes.
      own: the number of this one.
      arrival: seconds in which all have to come.
      stall: seconds for which a process may stand still where another has gone on.
      traced: whether an error of this process is shown with its stack.

    Raises:
      Lost: on entering, with the numbers of those that did not come.
    """

    def __init__(
        self, address: str, count: int, own: int, *, arrival: float = 300.0, stall: float = 1800.0, traced: bool = False
    ):
        self._address, self._count, self._own = address, count, own
        self._arrival, self._stall, self._silence, self._traced = arrival, stall, min(SILENCE, stall), traced
        self._peers: dict[int, _Peer] = {}
        self._me = _Peer(None, f"{socket.gethostname()}, pid {os.getpid()}")
        self._decided, self._closing = threading.Event(), threading.Event()
        self._deciding, self._ending = threading.Lock(), threading.Lock()
        self._verdict, self._grace = "", 0.0

    def __enter__(self) -> "Roll":
        global _here
        self._gather() if self._own == 0 else self._report_in()
        now = time.monotonic()
        for number, peer in self._peers.items():
            peer.heard = peer.moved = now
            threading.Thread(target=self._listen, args=(number, peer), daemon=True).start()
        self._me.moved = now
        threading.Thread(target=self._pulse, daemon=True).start()
        _here = self
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        global _here
        _here = None
        if error is None or isinstance(error, SystemExit):
            self._closing.set()
            self._tell({"bye": True})
            for peer in self._peers.values():
                peer.close()
            return
        broken = _FROM_JAX.match(str(error))  # a collective, and by whom?
        if broken:
            self._decided.wait(self._silence + GRACE)
        if self._decided.is_set() and (broken or not self._grace):
            self._end()
        self._closing.set()
        self._tell({"ended": f"{type(error).__name__}: {line(error)}"[:2000]})
        code = report(error, traced=self._traced)
        _flush()
        os._exit(code)

    def at(self, where: str) -> None:
        """See the function `at`."""
        self._me.move(self._me.beats + 1, where)

    def aborted(self) -> None:
        """Called where JAX aborts this process: ends it by its own message instead, if it is another's fault."""
        if self._decided.wait(GRACE):
            time.sleep(self._grace)
            self._end()

    def _gather(self) -> None:
        """Process 0: waits for all the others."""
        port, deadline = int(self._address.rpartition(":")[2]), time.monotonic() + self._arrival
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=self._count) as door:
            while len(self._peers) < self._count - 1:
                door.settimeout(max(deadline - time.monotonic(), 1e-3))
                try:
                    self._admit(door.accept()[0], deadline)
                except TimeoutError:
                    absent = [number for number in range(1, self._count) if number not in self._peers]
                    self._refuse(f"{self._named(absent)} did not arrive within {self._arrival:g} s at {self._address}")
        self._tell({"all": self._count})

    def _admit(self, connection: socket.socket, deadline: float) -> None:
        """Takes in one process; what is none of this run's is sent away."""
        peer = _Peer(connection, "")
        connection.settimeout(min(max(deadline - time.monotonic(), 1e-3), GRACE))
        try:
            said = peer.read()
            number, count, peer.whence = int(said["process"]), int(said["of"]), str(said["whence"])
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            return
        if count != self._count or not 0 < number < self._count or number in self._peers:
            text = f"process {number} of {count} ({peer.whence}) came to a run of {self._count}"
            if number in self._peers:
                text = f"process {number} of {count} came twice: {self._peers[number].whence}, and {peer.whence}"
            peer.send({"lost": text})
            self._refuse(text)
        connection.settimeout(None)
        self._peers[number] = peer

    def _refuse(self, text: str) -> None:
        self._tell({"lost": text})
        raise Lost(text)

    def _report_in(self) -> None:
        """Any other process: goes to process 0, and waits until all are there."""
        host, _, port = self._address.rpartition(":")
        start = time.monotonic()
        missing = f"process 0 of {self._count} did not arrive within {self._arrival:g} s: nobody answers at "
        while True:
            try:
                connection = socket.create_connection((host.strip("[]"), int(port)), timeout=GRACE)
                break
            except OSError as error:
                if time.monotonic() - start > self._arrival:
                    raise Lost(f"{missing}{self._address} ({error})") from None
                time.sleep(0.2)
        peer = _Peer(connection, f"at {self._address}")
        peer.send({"process": self._own, "of": self._count, "whence": self._me.whence})
        connection.settimeout(max(self._arrival - (time.monotonic() - start), 0) + GRACE)
        try:
            said = peer.read()
        except (OSError, ValueError):
            text = f"process 0 of {self._count} is gone, or the run at {self._address} has begun without this process"
            raise Lost(text) from None
        if "lost" in said:
            raise Lost(said["lost"])
        connection.settimeout(None)
        self._peers[0] = peer

    def _listen(self, number: int, peer: "_Peer") -> None:
        """A thread for each connection: takes in what a process says until it ends."""
        while True:
            try:
                said = peer.read()
            except (OSError, ValueError):
                if not peer.left:
                    self._decide(
                        f"{self._named([number])} is gone: its connection ended; its last sign came from {peer.where}"
                    )
                return
            peer.heard = time.monotonic()
            if "lost" in said:
                self._decide(said["lost"])
            elif "ended" in said:
                peer.left = True
                self._decide(f"{self._named([number])} ended by an error: {said['ended']}", GRACE)
            elif "bye" in said:
                peer.left = True
            else:
                peer.move(said["beats"], said["where"])

    def _pulse(self) -> None:
        """A thread: gives signs, and looks for those who give none or stand still."""
        while not self._closing.wait(min(PULSE, self._silence / 4)):
            now = time.monotonic()
            self._tell({"beats": self._me.beats, "where": self._me.where})
            for number, peer in self._peers.items():
                if not peer.left and now - peer.heard > self._silence:
                    text = f"gives no sign for {self._silence:g} s; its last came from {peer.where}"
                    self._decide(f"{self._named([number])} {text}")
            if self._own == 0 and (text := self._standing_still(now)):
                self._decide(text)

    def _standing_still(self, now: float) -> str:
        """Who is behind the others for too long, or that nobody has moved; nothing if all is well."""
        everyone = {0: self._me, **self._peers}
        front = max(peer.beats for peer in everyone.values())
        for peer in everyone.values():
            peer.passed = None if peer.beats == front else peer.passed or now
        last = min(peer.beats for peer in everyone.values())
        behind = [number for number, peer in everyone.items() if peer.beats == last]
        places = ", ".join(f"process {number} at {peer.where}" for number, peer in sorted(everyone.items()))
        if any(now - (everyone[number].passed or now) > self._stall for number in behind):
            return f"{self._named(behind)} does not go on for {self._stall:g} s where others have: {places}"
        if all(now - peer.moved > ALL_STALL * self._stall for peer in everyone.values()):
            return f"no process has gone on for {ALL_STALL * self._stall:g} s: {places}"
        return ""

    def _decide(self, text: str, grace: float = 0.0) -> None:
        """The end of the run: said to the others, then to the user."""
        with self._deciding:
            if self._decided.is_set() or self._closing.is_set():
                return
            self._verdict, self._grace = text, grace
            self._decided.set()
        self._tell({"lost": text})
        time.sleep(grace)
        self._end()

    def _end(self) -> None:
        if not self._ending.acquire(blocking=False):
            return
        report(Lost(f"{self._verdict}. Process {self._own} was at {self._me.where}{ADVICE}"))
        _flush()
        os._exit(LOST)

    def _tell(self, what: dict[str, Any]) -> None:
        for peer in self._peers.values():
            peer.send(what)

    def _named(self, numbers: list[int]) -> str:
        told = {0: self._me} if self._own == 0 else {}
        whence = {number: f" ({peer.whence})" for number, peer in {**self._peers, **told}.items()}
        listed = ", ".join(f"{number}{whence.get(number, '')}" for number in numbers)
        return f"process{'es' if len(numbers) > 1 else ''} {listed} of {self._count}"


class _Peer:
    """A process as another one sees it: its connection, and how far it is."""

    def __init__(self, connection: socket.socket | None, whence: str):
        self._connection, self.whence = connection, whence
        self._lines = connection.makefile("rb") if connection else None
        self._sending = threading.Lock()
        self.beats, self.where, self.left = 0, "the start", False
        self.heard, self.moved = 0.0, 0.0
        self.passed: float | None = None

    def move(self, beats: int, where: str) -> None:
        if beats != self.beats:
            self.moved, self.passed = time.monotonic(), None
        self.beats, self.where = beats, where

    def read(self) -> dict[str, Any]:
        """The next thing said.

        Raises:
          OSError, ValueError: the connection ended, or somebody else is at its other end.
        """
        assert self._lines is not None
        text = self._lines.readline(65536)
        if not text.endswith(b"\n"):
            raise ConnectionError("the connection ended")
        said = json.loads(text)
        if not isinstance(said, dict):
            raise ValueError(f"not what a process of a run says: {said!r}")
        return said

    def send(self, what: dict[str, Any]) -> None:
        """Says something; that nobody hears it is found by who listens."""
        assert self._connection is not None
        try:
            with self._sending:
                self._connection.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            pass

    def close(self) -> None:
        assert self._connection is not None
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)


def name_on_abort(roll: Roll) -> Any:
    """Has `roll` speak before JAX's abort ends the process; what is given back has to be kept.

    Where process 0 is gone, JAX's client calls abort() in a thread of its own, within a millisecond, and offers no
    other way: only a handler of that signal, in C, comes before the end.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: roll.aborted())
    install = ctypes.CDLL(None).signal
    install.restype = ctypes.c_void_p
    install(int(signal.SIGABRT), handler)
    return handler


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
