# SPDX-License-Identifier: Apache-2.0
"""The tag of every word of a text."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._partition import Leaves, combine, partition
from . import placing
from .batches import Batches
from .buckets import Buckets, choose_widths
from .examples import Examples
from .items import Tagged
from .losses import logits_of
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
    graphdef, trainable, frozen = partition(model)

    @jax.jit
    def tags(trainable: Leaves, frozen: Leaves, batch: dict[str, Any]) -> jax.Array:
        batch = jax.tree.map(lambda x: x[0], batch)
        return jnp.argmax(logits_of(combine(graphdef, trainable, frozen), batch, None), -1)

    words = [tuple(text.split()) for text in texts]
    kept = [at for at, found in enumerate(words) if found]
    if not kept:
        return [[] for _ in texts]
    rows = [placing.by_word(Tagged(words[at], words[at]), range(len(words[at])), tokenizer, max_length) for at in kept]
    tokens = [np.asarray(row.tokens, np.int32) for row in rows]
    places = [np.asarray(row.labels, np.int32) for row in rows]
    examples = Examples(tokens, places, len(rows), 0, 0, 0, {}, labels_of="token")
    widths = choose_widths(examples.lengths, 8, max_length)
    batches = Batches(examples, Buckets(examples.lengths, widths, min(batch_size, len(rows))), 1, tokenizer.pad_id)
    found: list[list[tuple[str, str | None]]] = [[(word, None) for word in text] for text in words]
    for batch in batches.buckets.in_order():
        for row, numbers in zip(batch.rows, np.asarray(tags(trainable, frozen, batches.collate(batch))), strict=False):
            of = found[kept[int(row)]]
            for place, number in zip(places[int(row)], numbers, strict=False):
                if place >= 0:
                    of[place] = of[place][0], names[int(number)]
    return found
