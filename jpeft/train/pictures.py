# SPDX-License-Identifier: Apache-2.0
"""Images to learn from, and batches of their pixels: what `Examples` and `Batches` are for texts.

Every image was decoded once before training, so that what cannot be read is known. It is held resized, in bytes, or
decoded again for each batch, in the thread that works ahead of the loop.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from jaxtyping import Float, Int, UInt8

from .buckets import Batch, Buckets
from .examples import IGNORED
from .feed import Feed, Unit
from .images import Processor, decoded
from .records import DataError

#: An image of the size that a model reads.
Resized = UInt8[np.ndarray, "height width 3"]
_T = TypeVar("_T")
_Done = TypeVar("_Done")
#: Images that threads work at together.
_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Again:
    """An image that is decoded each time.

    Attributes:
      source: its file, or the bytes of one.
      where: what it is called in a message.
      digest: SHA-256 of its bytes.
      processor: that resizes it.
    """

    source: Path | bytes
    where: str
    digest: str
    processor: Processor

    def __call__(self) -> Resized:
        """The image.

        Raises:
          DataError: the file is not the one that was read before training.
        """
        try:
            content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
            if hashlib.sha256(content).hexdigest() == self.digest:
                return self.processor.resized(decoded(content))
        except OSError as error:
            raise DataError(f"{self.where}: it was there before the training began: {error}") from error
        raise DataError(f"{self.where}: {self.source} is not the file that it was before the training began")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images with classes, and an account of what became of all rows.

    Attributes:
      kept: each resized, or what makes it so.
      labels: the class of each.
      names: what each is called, as a file or a row.
      rows: rows read.
      skipped: bad rows left out.
      digests: SHA-256 by source, of its rows and all its images.
      files: SHA-256 by image file, of those that are files.
      per_example: rows that belong together.
    """

    kept: list[Resized | Again]
    labels: Int[np.ndarray, " images"]
    names: list[str]
    rows: int
    skipped: int
    digests: dict[str, str]
    files: dict[str, str]
    per_example: ClassVar[int] = 1
    warning: ClassVar[str | None] = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.kept)

    def pixels(self, numbers: Sequence[int]) -> UInt8[np.ndarray, "images height width 3"]:
        """The images of these numbers, resized.

        Raises:
          DataError: a file is not the one that was read before training.
        """
        return np.stack([*threaded(self.image, numbers)])

    def image(self, number: int) -> Resized:
        """One image, resized. Raises as `pixels`."""
        image = self.kept[number]
        return image() if isinstance(image, Again) else image

    def chosen(self, numbers: Sequence[int]) -> "Pictures":
        """The images of these numbers, of which one may come several times; no array is copied."""
        kept, names = ([values[number] for number in numbers] for values in (self.kept, self.names))
        return dataclasses.replace(self, kept=kept, names=names, labels=self.labels[np.asarray(numbers, int)])

    def __str__(self) -> str:
        held = [image for image in self.kept if not isinstance(image, Again)]
        said = [f"{self.rows:,} rows -> {len(self):,} images"]
        if len(held) < len(self):
            said.append(f"{len(self) - len(held):,} are decoded for every batch, for all would take too much memory")
        if self.skipped:
            said.append(f"skipped {self.skipped:,} bad rows")
        return "; ".join(said)


def joined(parts: Sequence[Pictures]) -> Pictures:
    """The images of several sources as one."""
    return Pictures(
        kept=[image for part in parts for image in part.kept],
        labels=np.concatenate([part.labels for part in parts]),
        names=[name for part in parts for name in part.names],
        rows=sum(part.rows for part in parts),
        skipped=sum(part.skipped for part in parts),
        digests={source: digest for part in parts for source, digest in part.digests.items()},
        files={file: digest for part in parts for file, digest in part.files.items()},
    )


@dataclasses.dataclass(frozen=True)
class Pixels(Feed):
    """Images as batches of one shape.

    Attributes:
      examples: images.
      buckets: which of them make a batch; its one width is what an image has of tokens.
      accumulation: micro-batches of a batch.
      processor: that makes values of bytes.
      image: height and width.
    """

    examples: Pictures
    buckets: Buckets
    accumulation: int
    processor: Processor
    image: tuple[int, int]

    @property
    def unit(self) -> Unit:
        return Unit("images", self.buckets.widths[0])

    @property
    def shapes(self) -> str:
        """The size of every image."""
        height, width = self.image
        return f"{height} x {width} pixels, {self.unit.tokens} tokens to the model"

    def collate(
        self, batch: Batch, own: Collection[int] | None = None
    ) -> dict[str, Float[np.ndarray, "..."] | Int[np.ndarray, "..."]]:
        """`pixel_values` `[accumulation, rows, 3, height, width]` and `labels`; as `Feed.collate`.

        Raises:
          DataError: a file is not the one that was read before training.
        """
        rows = self.buckets.batch_rows
        places = [at for at in range(len(batch.rows)) if own is None or at % (rows // self.accumulation) in own]
        arrays = {
            "pixel_values": np.zeros((rows, 3, *self.image), np.float32),
            "labels": np.full(rows, IGNORED, np.int32),
        }

        def fill(at: int) -> None:
            number = int(batch.rows[at])
            self.processor.values(self.examples.image(number), arrays["pixel_values"][at])
            arrays["labels"][at] = self.examples.labels[number]

        for _ in threaded(fill, places):
            pass
        return {name: x.reshape(self.accumulation, -1, *x.shape[1:]) for name, x in arrays.items()}

    def sizes(self, batch: Batch) -> tuple[int, int]:
        """Tokens of a batch: of its images, and with those of the rows that are missing."""
        return batch.width * len(batch.rows), batch.width * self.buckets.batch_rows

    def like(self, examples: Pictures) -> "Pixels":
        """Other images in batches of this shape."""
        rows = self.buckets.batch_rows // self.accumulation
        return pixels(examples, self.processor, self.image, self.unit.tokens, batch_size=rows)


def pixels(
    examples: Pictures, processor: Processor, image: tuple[int, int], tokens: int, *, batch_size: int,
    accumulation: int = 1,
) -> Pixels:  # fmt: skip
    """Batches of `batch_size` images, `accumulation` of them at a time.

    Args:
      examples: images of this size.
      processor, image: as of `Pixels`.
      tokens: that a model makes of an image.
    """
    lengths = np.full(len(examples), tokens)
    return Pixels(examples, Buckets(lengths, (tokens,), batch_size * accumulation), accumulation, processor, image)


def threaded(make: Callable[[_T], _Done], values: Iterable[_T]) -> Iterator[_Done]:
    """What `make` gives for every value, in their order, made by as many threads as there are cores."""
    values = [*values]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), "jpeft-images") as pool:
        for start in range(0, len(values), _AT_ONCE):
            yield from pool.map(make, values[start : start + _AT_ONCE])
