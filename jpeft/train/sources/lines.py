# SPDX-License-Identifier: Apache-2.0
"""Rows of files that people write: JSON, CSV and text; a bad row is named by its line and does not end the reading."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..records import MOST_BYTES, Bad, DataError, Record, brief

Rows = Iterator[Record | Bad]

#: What some programs write in front of UTF-8.
_MARK = b"\xef\xbb\xbf"
#: Halves of a character, which JSON's escapes can name and no text can hold.
_HALF = re.compile("[\ud800-\udfff]")


def jsonl(file: Path) -> Rows:
    """One object a line."""
    with file.open("rb") as stream:
        for number, line in _lines(stream):
            where = f"{file}:{number}"
            text = _decoded(line, where)
            if isinstance(text, Bad):
                yield text
            elif text.strip():
                yield _object(text, where)


def json_list(file: Path) -> Rows:
    """One list of objects, or objects line by line under the same ending."""
    with file.open("rb") as stream:
        start = stream.read(64).removeprefix(_MARK).lstrip()
    if not start.startswith(b"["):
        yield from jsonl(file)
        return
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: it is no JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        yield checked(row, f"{file}, row {number}")


def table(file: Path, delimiter: str) -> Rows:
    """CSV with a header; a row is named by the line on which it ends."""
    csv.field_size_limit(MOST_BYTES)
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            begun = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                bad = Bad(f"{file}:{reader.line_num}", f"it is no CSV: {error}; the row begins at line {begun}")
                yield _not_header(bad, header)
                continue
            where = f"{file}:{reader.line_num}"
            if not cells:
                continue
            if any(_HALF.search(cell) for cell in cells):
                yield _not_header(Bad(where, "it is not UTF-8"), header)
            elif header is None:
                header = _header(cells, where)
            elif len(cells) != len(header):
                yield Bad(where, f"it has {len(cells)} fields, and the header {len(header)}")
            else:
                yield Record(dict(zip(header, cells, strict=True)), where)


def text(file: Path, unit: str) -> Rows:
    """A text file by `line`, `paragraph` (between blank lines) or as one `document`; blank ones are left out."""
    if unit == "document":
        content = _decoded(file.read_bytes().removeprefix(_MARK), str(file))
        yield content if isinstance(content, Bad) else Record({"text": content}, f"{file}:1")
        return
    held: list[str] = []
    begun = 1
    with file.open("rb") as stream:
        for number, line in _lines(stream):
            where = f"{file}:{number}"
            content = _decoded(line, where)
            if isinstance(content, Bad):
                yield content
            elif unit == "line":
                if content.strip():
                    yield Record({"text": content.rstrip("\r\n")}, where)
            elif content.strip():
                begun = begun if held else number
                held.append(content)
            elif held:
                yield Record({"text": "".join(held).rstrip("\r\n")}, f"{file}:{begun}")
                held = []
    if held:
        yield Record({"text": "".join(held).rstrip("\r\n")}, f"{file}:{begun}")


def checked(row: Any, where: str) -> Record | Bad:
    """A value as a row, which must be an object whose texts are of sane size and whole characters, however deep."""
    if not isinstance(row, dict):
        return Bad(where, f"a row is an object with columns, got {brief(row)}")
    for name, column in row.items():
        left = [name, column]
        while left:
            value = left.pop()
            if isinstance(value, str):
                if len(value) > MOST_BYTES:
                    return Bad(where, _too_long(len(value), f"column {name!r}"))
                if not value.isascii() and (half := _HALF.search(value)):
                    return Bad(where, f"column {name!r} holds half a character, {half[0]!r}")
            elif isinstance(value, dict):
                left += value.values()
            elif isinstance(value, list):
                left += value
    return Record(row, where)


def _object(text: str, where: str) -> Record | Bad:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Bad(where, f"it is no JSON: {error}")
    return checked(row, where)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | int]]:
    """(line from 1, its bytes, or how many they are where it is too long to be held)."""
    number = 0
    while line := stream.readline(MOST_BYTES + 1):
        number += 1
        line = line.removeprefix(_MARK) if number == 1 else line
        size = len(line)
        if size > MOST_BYTES and not line.endswith(b"\n"):
            while not line.endswith(b"\n") and (line := stream.readline(MOST_BYTES)):
                size += len(line)
        yield number, size if size > MOST_BYTES else line


def _decoded(line: bytes | int, where: str) -> str | Bad:
    if isinstance(line, int):
        return Bad(where, _too_long(line, "the line"))
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(where, f"it is not UTF-8: {error.reason} at byte {error.start + 1}")


def _too_long(size: int, what: str) -> str:
    return f"{what} has {size:,} bytes; a row may have {MOST_BYTES:,}"


def _not_header(bad: Bad, header: list[str] | None) -> Bad:
    """A bad row, which is no row of its own where the header should stand."""
    if header is None:
        raise DataError(f"{bad}; it has to be the header, without which no row can be read")
    return bad


def _header(cells: list[str], where: str) -> list[str]:
    twice = {cell for cell in cells if cells.count(cell) > 1}
    if twice:
        raise DataError(f"{where}: the header names {sorted(twice)[0]!r} twice")
    return cells
