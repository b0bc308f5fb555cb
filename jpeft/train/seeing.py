# SPDX-License-Identifier: Apache-2.0
"""What a model makes of image files: the class of each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._partition import Leaves, combine, partition
from .evaluate import Prediction
from .images import Processor
from .losses import logits_of


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
    if batch_size < 1:
        raise ValueError(f"a batch has 1 image or more, got {batch_size}")
    graphdef, trainable, frozen = partition(model)

    @jax.jit
    def probabilities(trainable: Leaves, frozen: Leaves, pixels: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits_of(combine(graphdef, trainable, frozen), {"pixel_values": pixels}, None))

    found, size = [], max(1, min(batch_size, len(files)))
    for start in range(0, max(1, len(files)), size):
        pixels = processor.batch(files[start : start + size])
        whole = np.pad(pixels, [(0, size - len(pixels)), (0, 0), (0, 0), (0, 0)])
        found += [*np.asarray(probabilities(trainable, frozen, whole))[: len(pixels)]]
    return [
        Prediction(str(file), names[int(row.argmax())], float(row.max()))
        for file, row in zip(files, found, strict=True)
    ]
