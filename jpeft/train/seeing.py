# SPDX-License-Identifier: Apache-2.0
"""What a model makes of image files: the class of each, and how well the classes of a folder are told apart."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._partition import Leaves, combine, partition
from .evaluate import Prediction, figures
from .examples import IGNORED
from .image_folder import Labelled
from .images import Processor
from .losses import logits_of
from .measures import MEASURES
from .records import DataError


def classify(
    model: Any, processor: Processor, files: Sequence[str | Path], names: Sequence[str], *, batch_size: int = 32
) -> list[Prediction]:
    """The most probable class of every image, in their order.

    Args:
      model: an `IMAGE_CLS` model, adapted or not.
      processor: that of its folder.
      files: one or more.
      names: of every output of the head.
      batch_size: images at a time; fewer where there are not so many.

    Raises:
      DataError: no file is given, or one holds no image.
    """
    labels = np.full(len(files), IGNORED, np.int32)
    batches = _batches(processor, files, labels, batch_size)
    rows = [row for batch in _each(model, _probabilities, batches) for row in np.asarray(batch)]
    found = zip(files, rows, strict=False)  # the rest is padding
    return [Prediction(str(file), names[int(row.argmax())], float(row.max())) for file, row in found]


def measured(model: Any, processor: Processor, found: Labelled, *, batch_size: int = 32) -> dict[str, float]:
    """Loss, accuracy and macro-F1 over all images of a folder.

    Args:
      model, processor, batch_size: as of `classify`.
      found: images and classes, in the order of the head's outputs.

    Raises:
      DataError: a file holds no image.
      FloatingPointError: the loss is not finite.
    """
    measure = MEASURES["IMAGE_CLS"]
    batches = _batches(processor, found.files, found.labels, batch_size)
    outcomes = [jax.device_get(batch) for batch in _each(model, lambda m, b: measure.sums(m, b, 1), batches)]
    return figures(measure, outcomes)


def _probabilities(model: Any, batch: dict[str, Any]) -> jax.Array:
    return jax.nn.softmax(logits_of(model, batch, None))


def _each(model: Any, compute: Callable[..., Any], batches: Iterator[dict[str, np.ndarray]]) -> Iterator[Any]:
    """What a function of the model makes of every batch, compiled once for a size of images."""
    graphdef, trainable, frozen = partition(model)

    @jax.jit
    def compiled(trainable: Leaves, frozen: Leaves, batch: dict[str, Any]) -> Any:
        return compute(combine(graphdef, trainable, frozen), batch)

    for batch in batches:
        yield compiled(trainable, frozen, batch)


def _batches(
    processor: Processor, files: Sequence[str | Path], labels: np.ndarray, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one size, the last filled up with black images that have no label."""
    if not files:
        raise DataError("no image file was given")
    if batch_size < 1:
        raise ValueError(f"a batch has 1 image or more, got {batch_size}")
    size = min(batch_size, len(files))
    for start in range(0, len(files), size):
        pixels, known = processor.batch(files[start : start + size]), labels[start : start + size]
        lacking = size - len(known)
        yield {
            "pixel_values": np.pad(pixels, [(0, lacking), (0, 0), (0, 0), (0, 0)]),
            "labels": np.pad(known, (0, lacking), constant_values=IGNORED),
        }
