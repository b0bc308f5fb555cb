# SPDX-License-Identifier: Apache-2.0
"""Images as ViT reads them: in RGB, of the checkpoint's size, rescaled and normalised, as transformers' processor does.

  processor = images.load(folder)
  pixel_values = processor.batch(["cat.png", "dog.jpg"])  # [2, channels, height, width]

What is done stands in the checkpoint's preprocessor_config.json. Pillow resizes, so the values are those of
transformers' `ViTImageProcessor` on Pillow.
"""

import dataclasses
import functools
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from ..models import CheckpointError
from ..models._files import read_json
from .records import DataError

FILE = "preprocessor_config.json"
#: The processors whose defaults these are, by all names that files have for them.
_KINDS = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor")
#: Steps of other processors, which are not done here.
_FOREIGN = ("do_center_crop", "do_pad", "do_thumbnail", "do_align_long_axis")
#: Pillow's filters by their numbers.
_FILTERS = range(6)


@dataclasses.dataclass(frozen=True)
class Processor:
    """What is done with an image before a model reads it.

    Attributes:
      size: height and width that images are resized to; None leaves them as they are.
      resample: number of Pillow's filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
      scale: that values of 0 to 255 are multiplied by; None leaves them.
      mean, std: of each channel, subtracted and divided by; None leaves them.
    """

    size: tuple[int, int] | None
    resample: int
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def __call__(self, image: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "channels rows columns"]:
        """The pixel values of one image in RGB, float32."""
        return self.values(self.resized(image))

    def resized(self, image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "rows columns 3"]:
        """An image of the size that a model reads, as Pillow makes it."""
        from PIL import Image

        if self.size is None:
            return image
        height, width = self.size
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling(self.resample)))

    def values(
        self, image: UInt8[np.ndarray, "rows columns 3"], out: Float[np.ndarray, "3 rows columns"] | None = None
    ) -> Float[np.ndarray, "3 rows columns"]:
        """The pixel values of a resized image, float32: each is looked up, for a byte has 256 values.

        Args:
          image: its bytes.
          out: where the values are written; None is a new array.
        """
        made = np.empty((3, *image.shape[:2]), np.float32) if out is None else out
        for channel, table in enumerate(self._table):
            np.take(table, image[..., channel], out=made[channel], mode="clip")  # no index is outside: the fastest mode
        return made

    @property
    def digest(self) -> str:
        """SHA-256 of what is done, for a run's record."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()

    @functools.cached_property
    def _table(self) -> Float[np.ndarray, "3 256"]:
        """What becomes of every byte of each channel."""
        values = np.broadcast_to(np.arange(256.0), (3, 256))
        values = (values if self.scale is None else values * self.scale).astype(np.float32)
        if self.mean is None or self.std is None:
            return values
        mean, std = (np.asarray(each, np.float32)[:, None] for each in (self.mean, self.std))
        return (values - mean) / std

    def batch(self, files: Sequence[str | Path]) -> Float[np.ndarray, "batch channels height width"]:
        """The pixel values of the images in these files.

        Raises:
          DataError: a file holds no image; no file; images of several sizes, where nothing resizes them.
        """
        if not files:
            raise DataError("no image file was given")
        made = [self(read(file)) for file in files]
        for file, values in zip(files, made, strict=True):
            if values.shape != made[0].shape:
                raise DataError(
                    f"{file} has {values.shape[1:]} pixels and {files[0]} {made[0].shape[1:]}; images of a batch have "
                    f"one size, and {FILE} says do_resize: false"
                )
        return np.stack(made)


def load(folder: str | Path) -> Processor:
    """The processor that a model folder's preprocessor_config.json describes.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it is another model's, or says what ViT's processor does not do.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}, which says how images are made ready for the model")
    said = read_json(file)
    kind = said.get("image_processor_type", said.get("feature_extractor_type", _KINDS[0]))
    foreign = [name for name in _FOREIGN if said.get(name)]
    if kind not in _KINDS or foreign:
        raise CheckpointError(
            f"{file} is of a {kind}{' with ' + ', '.join(foreign) if foreign else ''}; images are made ready as by "
            f"ViTImageProcessor: resized, rescaled and normalised"
        )
    resample = said.get("resample", 2)
    if not isinstance(resample, int) or resample not in _FILTERS:
        raise CheckpointError(f"{file}: resample is the number of a filter, 0 to 5; got {resample!r}")
    normalises = _flag(said, "do_normalize", file)
    return Processor(
        size=_size(said.get("size", 224), file) if _flag(said, "do_resize", file) else None,
        resample=resample,
        scale=_numbers(said, "rescale_factor", 1 / 255, 1, file)[0] if _flag(said, "do_rescale", file) else None,
        mean=_numbers(said, "image_mean", 0.5, 3, file) if normalises else None,
        std=_numbers(said, "image_std", 0.5, 3, file, positive=True) if normalises else None,
    )


def read(source: str | Path | bytes, where: str | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """An image in RGB, turned as its camera says.

    Args:
      source: a file, or the bytes of one.
      where: what it is called in a message; None is the file's own name.

    Raises:
      DataError: there is no such file, or it holds no image that Pillow reads.
    """
    try:
        return decoded(source)
    except ValueError as error:
        where = where or (f"{len(source):,} bytes" if isinstance(source, bytes) else str(source))
        raise DataError(f"{where}: {error}") from error


def decoded(source: str | Path | bytes) -> UInt8[np.ndarray, "height width 3"]:
    """As `read`, with an error that does not say where.

    Raises:
      ValueError: there is no such file, or it holds no image that Pillow reads.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"it is no image that can be read: {error}") from error


def _flag(said: Mapping[str, Any], name: str, file: Path) -> bool:
    value = said.get(name, True)
    if not isinstance(value, bool):
        raise CheckpointError(f"{file}: {name} is true or false; got {value!r}")
    return value


def _size(value: Any, file: Path) -> tuple[int, int]:
    """Height and width: both, or a number for both."""
    match value:
        case bool():
            pass
        case int() if value > 0:
            return value, value
        case {"height": int(height), "width": int(width)} if height > 0 and width > 0:
            return height, width
    raise CheckpointError(f"{file}: size is a height and a width, both above 0, or one number for both; got {value!r}")


def _numbers(
    said: Mapping[str, Any], name: str, default: float, count: int, file: Path, *, positive: bool = False
) -> tuple[float, ...]:
    """A number for each of `count` channels, or one for all."""
    value = said.get(name, default)
    values = value if isinstance(value, list) else [value] * count
    right = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in values)
    if not right or len(values) != count or (positive and min(values) <= 0):
        above = " above 0" if positive else ""
        raise CheckpointError(f"{file}: {name} is {count} finite number{'s' * (count > 1)}{above}; got {value!r}")
    return tuple(float(x) for x in values)
