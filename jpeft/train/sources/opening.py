# SPDX-License-Identifier: Apache-2.0
"""One source of a configuration, opened: its rows from any number on, its columns, and what it is known by."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import image_folder
from ..records import Bad, DataError, Record
from ..sections.data import Source
from . import columnar, lines

#: How files are read, by their ending.
_KINDS: dict[str, Callable[[Path, str], Iterator[Record | Bad]]] = {
    ".jsonl": lambda file, _: lines.jsonl(file),
    ".json": lambda file, _: lines.json_list(file),
    ".csv": lambda file, _: lines.table(file, ","),
    ".tsv": lambda file, _: lines.table(file, "\t"),
    ".parquet": lambda file, _: columnar.parquet(file),
    ".arrow": lambda file, _: columnar.arrow(file),
    ".txt": lines.text,
}
_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A source that can be read any number of times.

    Attributes:
      source: as the configuration names it.
      columns: of its first good row.
      digest: SHA-256 of a file; of a data set of the hub, of its fingerprint.
      classes: names of the class numbers of a column, where a data set tells them.
    """

    source: Source
    columns: tuple[str, ...]
    digest: str
    _rows: Callable[[int], Iterator[Record | Bad]]
    classes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def called(self) -> str:
        """Its path, with the configuration and split of a data set or the part of a file, as several may be used."""
        source = self.source
        rest = (source.name, None if source.split == "train" else source.split)
        return ", ".join([source.path, *(part for part in rest if part is not None)])

    @property
    def folder(self) -> Path:
        """In which the files lie that rows name."""
        path = Path(self.source.path)
        return path if path.is_dir() else path.parent

    def rows(self, start: int = 0) -> Iterator[Record | Bad]:
        """Rows of the split, good and bad, from number `start` on."""
        return self._rows(start)


def open_source(source: Source, txt: str = "line", *, streaming: bool = False, images: bool = False) -> Opened:
    """Opens a file, a folder or a data set of the hub.

    Args:
      source: what to open.
      txt: what is one row of a `.txt` file: a `line`, a `paragraph` or the whole `document`.
      streaming: never to hold all rows.
      images: a folder without files of rows holds a folder of images for each class.

    Raises:
      FileNotFoundError: no such file.
      DataError: a file of another kind, an empty one, one without a good row, or a split that is not there; a folder of
        images with something else in it.
    """
    path, classes = Path(source.path), {}
    if path.suffix in _KINDS or path.is_file():
        key, rows = _open_file(path, source, txt, streaming)
    elif images and path.is_dir() and not holds_rows(path):
        key, rows = _open_images(path, source)
    elif path.is_dir() or re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source.path):
        key, rows, classes = _open_set(source, streaming)
    else:
        raise FileNotFoundError(f"no data file {path}")
    return Opened(source, _columns(rows(0), source), key, rows, classes)


def digest(file: str | Path) -> str:
    """SHA-256 of a file."""
    with Path(file).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _open_file(path: Path, source: Source, txt: str, streaming: bool) -> tuple[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}")
    if path.suffix not in _KINDS:
        raise DataError(f"{path} is no data file that is known; they end in {', '.join(_KINDS)}")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty")

    def whole() -> Iterator[Record | Bad]:
        return _KINDS[path.suffix](path, txt)

    start, stop = _limits(source, None if streaming else lambda: sum(1 for _ in whole()))
    return digest(path), lambda skipped: itertools.islice(whole(), start + skipped, stop)


def holds_rows(folder: Path) -> bool:
    """Whether a folder is one that `datasets` reads: with files of rows, or of its own, in it or one folder below."""
    ends = {*_KINDS} - {".txt"}  # a note is no data set
    return any(file.suffix in ends for pattern in ("*", "*/*") for file in folder.glob(pattern))


def _open_images(path: Path, source: Source) -> tuple[str, Any]:
    """A row for each image in the folders of a folder, sorted by class and name."""
    found = image_folder.by_class(path)
    rows = [
        Record({"image": str(file.relative_to(path)), "label": name}, str(file))
        for name, files in found.items()
        for file in files
    ]
    start, stop = _limits(source, lambda: len(rows))
    key = hashlib.sha256("\n".join(row.values["image"] for row in rows[start:stop]).encode()).hexdigest()
    return key, lambda skipped: iter(rows[start + skipped : stop])


def _open_set(source: Source, streaming: bool) -> tuple[str, Any, dict[str, tuple[str, ...]]]:
    if streaming and "[" in source.split:
        raise DataError(f"data.streaming reads whole splits of {source.path}; got {source.split!r}")
    dataset = columnar.load(source.path, source.name, source.split, streaming)
    named = f"{source.path} {source.name} {source.split} {getattr(dataset, '_fingerprint', '')} {dataset.info.version}"
    key = hashlib.sha256(named.encode()).hexdigest()
    return key, lambda skipped: columnar.rows(dataset, source.path, source.split, skipped), columnar.classes(dataset)


def _limits(source: Source, count: Callable[[], int] | None) -> tuple[int, int | None]:
    """Rows [start, stop) of a file that a split such as `train[10%:]` stands for; a file is one split, `train`."""
    found = _SPLIT.fullmatch(source.split)
    if found is None or found["name"] != "train":
        raise DataError(
            f"a file is one split, 'train', of which parts are written as train[:100] or train[80%:]; "
            f"{source.path} has none called {source.split!r}"
        )
    ends = [found["start"], found["stop"]]
    if ends == [None, None]:
        return 0, None
    if count is None:
        if any(end and (end.endswith("%") or end.startswith("-")) for end in ends):
            raise DataError(f"data.streaming does not know how many rows {source.path} has; got {source.split!r}")
        return int(ends[0] or 0), None if ends[1] is None else int(ends[1])
    rows = count()
    at = [None if end is None else _row(end, rows) for end in ends]
    start, stop, _ = slice(*at).indices(rows)
    return start, stop


def _row(end: str, rows: int) -> int:
    return round(int(end[:-1]) * rows / 100) if end.endswith("%") else int(end)


def _columns(rows: Iterator[Record | Bad], source: Source) -> tuple[str, ...]:
    first: Bad | None = None
    for row in rows:
        if isinstance(row, Record):
            return tuple(row.values)
        first = first or row
    raise DataError(str(first) if first else f"{source.path} holds no row")
