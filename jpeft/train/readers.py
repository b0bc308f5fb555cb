# SPDX-License-Identifier: Apache-2.0
"""What makes data ready for a model: the tokenizer of one that reads texts, the processor of one that reads images."""

import dataclasses
from pathlib import Path

from ..models import CheckpointError
from ..models._checkpoint import read_config
from ..models._families import FAMILIES
from ..models._files import is_file
from . import images, tokenizer
from .images import Processor
from .tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sight:
    """How a model sees.

    Attributes:
      processor: what is done with an image.
      image: height and width that the model reads.
      tokens: that it makes of an image.
    """

    processor: Processor
    image: tuple[int, int]
    tokens: int

    @property
    def digest(self) -> str:
        """SHA-256 of what is done with an image, for a run's record."""
        return self.processor.digest


Reader = Tokenizer | Sight


def load(folder: str | Path) -> Reader:
    """The reader of a model's folder.

    Raises:
      FileNotFoundError, CheckpointError: as `tokenizer.load` and `images.load`; or the processor makes images that the
        model does not read.
    """
    hf = read_config(folder) if is_file(Path(folder) / "config.json") else {}  # a tokenizer may be there alone
    family = FAMILIES.get(hf.get("model_type", ""))
    if family is None or family.reads != "pixel_values":
        return tokenizer.load(folder)
    processor, config = images.load(folder), family.config(hf)
    if processor.size not in (None, config.image) or config.num_channels != 3:
        raise CheckpointError(
            f"{Path(folder) / images.FILE} makes images of 3 channels and {processor.size} pixels, and the model of "
            f"{folder} reads {config.num_channels} and {config.image}"
        )
    return Sight(processor, config.image, config.num_tokens)


def of_texts(reader: Reader, task: str) -> Tokenizer:
    """The reader, of a model for `task` that reads texts.

    Raises:
      ValueError: it reads images.
    """
    if isinstance(reader, Sight):
        raise ValueError(
            f"this model is for {task} and reads images, not texts; jpeft predict takes image files, and jpeft eval "
            f"--data a folder with a folder of images for each class"
        )
    return reader


def of_images(reader: Reader, task: str) -> Sight:
    """The reader, of a model for `task` that reads images.

    Raises:
      ValueError: it reads texts.
    """
    if not isinstance(reader, Sight):
        raise ValueError(f"this model is for {task} and reads texts, not images")
    return reader


def called(reader: Reader) -> str:
    """What a reader is called in records."""
    return "processor" if isinstance(reader, Sight) else "tokenizer"
