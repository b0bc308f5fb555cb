# SPDX-License-Identifier: Apache-2.0
"""What is read from files that others made: they are found, they are of a sane size, and they say each thing once.

Every JSON file that jpeft reads goes through `read_json`. A link in a folder was made on this machine (a cache of
downloads is made of them) and is followed to any regular file; a name that stands in a file is never followed out of
the file's folder.
"""

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

#: The most bytes of JSON that are read; safetensors sets the same bound to its headers.
MOST_BYTES = 100 * 10**6
#: How deep JSON may be nested.
MOST_LEVELS = 64


class CheckpointError(ValueError):
    """A checkpoint that does not hold what the model needs; the message names the file, and every offending key."""


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      FileNotFoundError: there is no regular file of that name.
      PermissionError: it may not be read.
      CheckpointError: it is no JSON object, says one key twice, or is larger or deeper than any honest one.
    """
    if not is_file(file):
        raise FileNotFoundError(f"no file {file}")
    with open(file, "rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise CheckpointError(f"{file} is not JSON that is read here: it has more than {MOST_BYTES:,} bytes")
    return parse_json(content, str(file))


def parse_json(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `content`, which messages call `what`.

    Raises:
      CheckpointError: as `read_json`.
    """
    try:
        found = json.loads(
            content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_number, parse_float=_number
        )
    except RecursionError as error:
        raise CheckpointError(f"{what} is not JSON that is read here: it is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} must hold a JSON object, holds a {type(found).__name__}")
    _check_depth(found, what)
    return found


@contextlib.contextmanager
def about(file: Path) -> Iterator[None]:
    """Puts the file in front of the message of a ValueError in the block, where it is not there already."""
    try:
        yield
    except ValueError as error:
        if str(file) in str(error):
            raise
        kind = CheckpointError if isinstance(error, CheckpointError) else ValueError
        raise kind(f"{file}: {error}") from error


def is_file(file: Path) -> bool:
    """Whether there is a regular file, or a link to one; a name that no file can have is none."""
    return os.path.isfile(file)


def write_text(file: Path, text: str) -> None:
    """Puts a text file in place by one rename; a link of that name is replaced, not written through."""
    with _placing(file) as new:
        new.write_text(text, encoding="utf-8")


def copy_file(source: Path, target: Path) -> None:
    """Puts a copy of a file in place, in the same manner."""
    with _placing(target) as new:
        shutil.copy2(source, new)


@contextlib.contextmanager
def _placing(file: Path) -> Iterator[Path]:
    new = file.with_name(f".{file.name}.new-{uuid.uuid4().hex}")
    try:
        yield new
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def names(items: Iterable[str], most: int = 12) -> str:
    """`items` for a message: sorted, the first `most` of them, none longer than a line or two."""
    items = sorted(items)
    shown = (item if len(item) <= 200 else f"{item[:200]}..." for item in items[:most])
    return ", ".join(shown) + (f" and {len(items) - most} more" if len(items) > most else "")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"it says {names({k for k, _ in pairs if k in seen or seen.add(k)})} twice")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{names([text])} is no finite number")
    return value


def _check_depth(value: dict[str, Any], what: str) -> None:
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
        if not level:
            return
    raise CheckpointError(f"{what} is not JSON that is read here: it is nested more than {MOST_LEVELS} levels deep")
