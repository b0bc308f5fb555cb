# SPDX-License-Identifier: Apache-2.0
"""The tag of every word of a text."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import placing
from .evaluate import each_row
from .examples import Examples
from .items import Tagged
from .tokenizer import Tokenizer


def tag(
    model: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    names: Sequence[str],
    *,
    max_length: int = 128,
    batch_size: int = 32,
) -> list[list[tuple[str, str | None]]]:
    """Every word of every text with its most probable tag, None for words behind the longest row.

    Args:
      model: a `TOKEN_CLS` model, adapted or not.
      tokenizer: that of its folder.
      texts: any number; what stands between spaces is a word.
      names: tag of every output of the head.
      max_length, batch_size: as in training.
    """
    words = [tuple(text.split()) for text in texts]
    kept = [at for at, found in enumerate(words) if found]
    if not kept:
        return [[] for _ in texts]
    rows = [placing.by_word(Tagged(words[at], words[at]), range(len(words[at])), tokenizer, max_length) for at in kept]
    tokens = [np.asarray(row.tokens, np.int32) for row in rows]
    places = [np.asarray(row.labels, np.int32) for row in rows]
    examples = Examples(tokens, places, len(rows), 0, 0, 0, {}, labels_of="token")
    sizes = {"max_length": max_length, "batch_size": batch_size, "pad_id": tokenizer.pad_id}
    found: list[list[tuple[str, str | None]]] = [[(word, None) for word in text] for text in words]
    for row, numbers in each_row(model, examples, lambda logits: jnp.argmax(logits, -1), **sizes):
        of = found[kept[row]]
        for place, number in zip(places[row], numbers, strict=False):
            if place >= 0:
                of[place] = of[place][0], names[int(number)]
    return found
