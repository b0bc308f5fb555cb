# SPDX-License-Identifier: Apache-2.0
"""One row as it was read, or why it could not be, with the file and line that it came from."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

#: Bytes of a row's longest value: what is longer is no row but a mistake.
MOST_BYTES = 8 * 2**20
#: Messages about bad rows that are kept for the report.
_SHOWN = 5


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file, and the line where it is one row's fault."""


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Record:
    """A row: values by column, and `where` it came from, such as `a.jsonl:3`."""

    values: Mapping[str, Any]
    where: str


@dataclasses.dataclass(frozen=True)
class Bad:
    """A row that cannot be read, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Refusals:
    """What happens to bad rows: the first one stops, or they are counted, up to `most` of them.

    Attributes:
      count: bad rows so far.
      shown: messages of the first of them.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", most: int = 100):
        self._policy, self._most = policy, most
        self.count, self.shown = 0, list[str]()

    def add(self, bad: Bad) -> None:
        """Takes note of a bad row.

        Raises:
          DataError: it is to stop, or there are too many.
        """
        if self._policy == "stop":
            raise DataError(f"{bad}; data.on_bad_row=skip leaves bad rows out and counts them")
        self.count += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(str(bad))
        if self.count > self._most:
            raise DataError(
                f"more than data.max_bad_rows={self._most} rows are bad, such as:\n  " + "\n  ".join(self.shown)
            )

    def passing(self, rows: Iterable[T | Bad]) -> Iterator[T]:
        """The rows that are not bad."""
        for row in rows:
            if isinstance(row, Bad):
                self.add(row)
            else:
                yield row


def brief(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
