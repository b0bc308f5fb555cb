# SPDX-License-Identifier: Apache-2.0
"""Rows of Parquet and Arrow files, some at a time, and of data sets that `datasets` loads."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..records import Bad, DataError, Record
from .lines import checked

#: Rows that are held as Python values at a time.
_AT_ONCE = 512


def parquet(file: Path) -> Iterator[Record | Bad]:
    """Rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_AT_ONCE)
        yield from _numbered(batches, file)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def arrow(file: Path) -> Iterator[Record | Bad]:
    """Rows of an Arrow file, of either form."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(file)) as source:
            try:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = pyarrow.ipc.open_stream(source)
            yield from _numbered((part for batch in batches for part in _slices(batch)), file)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def load(path: str, name: str | None, split: str, streaming: bool) -> Any:
    """A data set of the hub, or of a folder: what `datasets` makes of it.

    Raises:
      DataError: there is none of this name or split, or it cannot be read.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    with _quiet():
        try:
            if (Path(path) / "state.json").is_file():  # of save_to_disk
                return _undecoded(_part(datasets.load_from_disk(path), path, split))
            return _undecoded(datasets.load_dataset(path, name, split=split, streaming=streaming))
        except (ValueError, OSError, DatasetsError) as error:
            raise DataError(f"{path}, split {split!r}, cannot be loaded: {' '.join(str(error).split())}") from error


def rows(dataset: Any, path: str, split: str, start: int) -> Iterator[Record | Bad]:
    """Rows of what `load` gives, from number `start` (0 is the first) on."""
    number = start
    try:
        for number, row in enumerate(dataset.skip(start) if start else dataset, start + 1):
            yield checked(row, f"{path} ({split}), row {number}")
    except UnicodeDecodeError as error:  # after it `datasets` gives no further row
        raise DataError(str(_not_text(error, f"{path} ({split}), row {number + 1}"))) from error


def classes(dataset: Any) -> dict[str, tuple[str, ...]]:
    """The names of the class numbers of every column that has such, or lists of them, of what `load` gives."""
    from datasets import ClassLabel

    found = ((name, getattr(feature, "feature", feature)) for name, feature in (dataset.features or {}).items())
    return {name: tuple(feature.names) for name, feature in found if isinstance(feature, ClassLabel)}


def _part(dataset: Any, path: str, split: str) -> Any:
    if split != "train":
        raise DataError(f"{path} was saved as one data set; its split is 'train', got {split!r}")
    return dataset


def _undecoded(dataset: Any) -> Any:
    """With images as their bytes or the names of their files."""
    from datasets import Image

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _slices(batch: Any) -> Iterator[Any]:
    return (batch.slice(at, _AT_ONCE) for at in range(0, batch.num_rows, _AT_ONCE))


def _numbered(batches: Any, file: Path) -> Iterator[Record | Bad]:
    number = 0
    for batch in batches:
        for row in _values(batch):
            number += 1
            where = f"{file}, row {number}"
            yield _not_text(row, where) if isinstance(row, UnicodeDecodeError) else checked(row, where)


def _values(batch: Any) -> list[Any]:
    """The rows of a batch; in the place of one whose text is not UTF-8, the error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
    return [row for at in range(batch.num_rows) for row in _values(batch.slice(at, 1))]


def _not_text(error: UnicodeDecodeError, where: str) -> Bad:
    return Bad(where, f"it is not UTF-8: {error.reason} at byte {error.start + 1}")


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
