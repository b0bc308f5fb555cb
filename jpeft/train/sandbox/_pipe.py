# SPDX-License-Identifier: Apache-2.0
"""Messages of the value grammar over a pair of pipes."""

import io
from typing import Any

from ._values import MOST_BYTES, ValueRefused, decode, encode


class Broken(Exception):
    """The other side ended, or said what is no value."""


class Pipe:
    """One side of a conversation.

    Args:
      reads, writes: file descriptors.
    """

    def __init__(self, reads: int, writes: int):
        self._in = io.BufferedReader(io.FileIO(reads, closefd=False))
        self._out = io.FileIO(writes, "w", closefd=False)

    def say(self, value: Any) -> None:
        """Writes one message whole.

        Raises:
          ValueRefused: the value is outside the grammar.
          Broken: nobody reads.
        """
        rest = memoryview(encode(value))
        try:
            while rest:
                rest = rest[self._out.write(rest) or 0 :]
        except OSError as error:
            raise Broken(f"hears nothing: {error.strerror}") from None

    def hear(self) -> Any:
        """The next message.

        Raises:
          Broken: there is none, it is too long, or it is no value.
        """
        line = self._in.readline(MOST_BYTES + 1)
        if len(line) > MOST_BYTES:
            raise Broken(f"answered with more than {MOST_BYTES:,} bytes")
        if not line.endswith(b"\n"):
            raise Broken("ended without an answer")
        try:
            return decode(line)
        except ValueRefused as error:
            raise Broken(f"answered with {error}") from None
