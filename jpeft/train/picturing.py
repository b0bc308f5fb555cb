# SPDX-License-Identifier: Apache-2.0
"""Rows to images and classes, with an account of what was left out: what `encoding` is for texts.

Every image is decoded here once, by as many threads as there are cores. It is then held resized, in a file of
`data.cache` or in memory as far as `HELD` goes; the others are decoded again for every batch.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import pixel_store
from .encoding import class_of
from .formats import Reader
from .images import FILE, decoded
from .pictures import Again, Pictures, Resized, threaded
from .readers import Sight
from .records import Bad, Record, Refusals
from .sections import Data
from .sources import Opened

#: Bytes of resized images that are held in memory, of the training images and of the others each.
HELD = 2**30


@dataclasses.dataclass(frozen=True)
class _Found:
    """An image that is there, and its class; `file` where it is one."""

    again: Again
    label: int
    file: str | None


class Picturer:
    """Makes images of the rows of any source.

    Args:
      data: options.
      sight: of the model.
      names: of the classes.
    """

    def __init__(self, data: Data, sight: Sight, names: Sequence[str]):
        self._cache, self._sight, self._names, self._room = data.cache, sight, names, HELD

    def __call__(self, opened: Opened, reader: Reader, refusals: Refusals) -> Pictures:
        """The images of one source; none may be left.

        Raises:
          DataError: a row is bad, and that is to stop.
        """
        before = refusals.count
        inside = opened.folder
        rows = refusals.passing(opened.rows())
        found = [*refusals.passing(threaded(lambda row: self._found(row, reader, inside), rows))]
        kept, good = [], []
        for one, image in zip(found, self._outcomes([one.again for one in found]), strict=True):
            if isinstance(image, str):
                refusals.add(Bad(one.again.where, image))
            else:
                kept.append(image)
                good.append(one)
        digest = hashlib.sha256(" ".join([opened.digest, *(one.again.digest for one in found)]).encode()).hexdigest()
        return Pictures(
            kept,
            np.array([one.label for one in good], np.int32),
            [one.again.where for one in good],
            rows=len(good) + refusals.count - before,
            skipped=refusals.count - before,
            digests={opened.called: digest},
            files={one.file: one.again.digest for one in found if one.file is not None},
        )

    def _found(self, row: Record, reader: Reader, inside: Path) -> _Found | Bad:
        """What a row names, read but not decoded."""
        try:
            item: Any = reader(row.values)
            label = class_of(item.label, self._names)
        except ValueError as error:
            return Bad(row.where, str(error))
        if isinstance(item.image, bytes):
            digest = hashlib.sha256(item.image).hexdigest()
            return _Found(Again(item.image, row.where, digest, self._sight.processor), label, None)
        file = inside / item.image
        where = row.where if row.where == str(file) else f"{row.where}: image {file}"
        try:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            return Bad(where, f"it cannot be read: {error.strerror}")
        return _Found(Again(file, where, digest, self._sight.processor), label, str(file))

    def _outcomes(self, images: list[Again]) -> Iterator[Resized | Again | str]:
        """How each is kept, or why it cannot be read."""
        if self._cache is not None:
            key = pixel_store.key_of([image.digest for image in images], self._sight)
            yield from pixel_store.kept(self._cache, key, len(images), self._sight.image, lambda: self._made(images))
            return
        for again, image in zip(images, self._made(images), strict=True):
            if isinstance(image, np.ndarray):
                self._room -= image.nbytes
            yield again if isinstance(image, np.ndarray) and self._room < 0 else image

    def _made(self, images: list[Again]) -> Iterator[Resized | str]:
        return threaded(self._resized, images)

    def _resized(self, image: Again) -> Resized | str:
        """An image as the model reads it, or why there is none."""
        try:
            found = self._sight.processor.resized(decoded(image.source))
        except ValueError as error:
            return str(error)
        if found.shape[:2] != self._sight.image:
            (rows, columns), (height, width) = found.shape[:2], self._sight.image
            return f"it has {rows} x {columns} pixels and the model reads {height} x {width}; {FILE} resizes none"
        return found
