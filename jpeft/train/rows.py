# SPDX-License-Identifier: Apache-2.0
"""Rows of a data file, through `datasets`, with the file and line that each came from."""

import contextlib
import csv
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .records import DataError

#: What `datasets` calls the kind of a file, by its ending.
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Columns of one file.

    Attributes:
      file: where they came from.
      columns: values by column; all are equally long.
    """

    file: Path
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def where(self, index: int) -> str:
        """`file:line` of a row, or `file, row n` (from 1) where rows are not lines."""
        line = _line(self.file, index)
        return f"{self.file}, row {index + 1}" if line is None else f"{self.file}:{line}"


def read(files: Sequence[str], columns: Sequence[str], txt: str = "line") -> list[Rows]:
    """The columns asked for, of every file.

    Args:
      files: `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt`.
      columns: names; a `.txt` file has `text`.
      txt: what is one row of a `.txt` file: a `line`, a `paragraph` or the whole `document`.

    Raises:
      FileNotFoundError: no such file.
      DataError: a file of another kind, one that cannot be read, without a row, or without a column.
    """
    return [_read(Path(file), columns, txt) for file in files]


def digest(file: str | Path) -> str:
    """SHA-256 of a file."""
    with Path(file).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read(file: Path, columns: Sequence[str], txt: str) -> Rows:
    if not file.is_file():
        raise FileNotFoundError(f"no data file {file}")
    if file.suffix not in KINDS:
        raise DataError(f"{file} is no data file that is known; they end in {', '.join(KINDS)}")
    if not file.stat().st_size:
        raise DataError(f"{file} is empty")
    table = _table(file, {"sample_by": txt} if file.suffix == ".txt" else {})
    if not len(table):
        raise DataError(f"{file} holds no row")
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise DataError(
            f"{file} has no column {missing[0]!r}; it has {', '.join(table.column_names)} (see data.text, data.label)"
        )
    return Rows(file, {name: table[name][:] for name in columns})


def _table(file: Path, options: dict[str, Any]) -> Any:
    """The file in memory. `datasets` keeps a copy on disk only while it reads, so an old one is never taken."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    with tempfile.TemporaryDirectory() as cache, _quiet():
        try:
            return datasets.load_dataset(
                KINDS[file.suffix],
                data_files=[str(file)],
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
        except (DatasetGenerationError, ValueError) as error:
            cause = error.__cause__ or error
            raise DataError(f"{file} holds no row, or cannot be read: {' '.join(str(cause).split())}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without `datasets`' own progress bars and log."""
    import datasets

    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _line(file: Path, index: int) -> int | None:
    """The line, from 1, on which a row ends; None where rows are not lines."""
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            return next(n for n, _ in _skip(((n, line) for n, line in enumerate(lines, 1) if line.strip()), index))
    if file.suffix == ".csv":
        with file.open(encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            next(rows)
            return next(rows.line_num for _ in _skip((row for row in rows if row), index))
    return None


def _skip(values: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        next(values)
    return values
