# SPDX-License-Identifier: Apache-2.0
"""From characters of a text to its tokens: the tag of every word, and the first and last token of an answer."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .examples import IGNORED
from .items import Asked, Tagged
from .tokenizer import Tokenizer


class Placed(NamedTuple):
    """One row of tokens with labels.

    Attributes:
      tokens, types: ids, and which of two texts each is of.
      labels: of every token, or the places of two.
      lost: tokens that were cut off.
    """

    tokens: list[int]
    types: list[int]
    labels: list[int]
    lost: int = 0


def by_word(item: Tagged, tags: Sequence[int], tokenizer: Tokenizer, size: int) -> Placed:
    """A row in which the first token of every word has the word's tag; all others are ignored, as in BERT's paper.

    The words are tokenised as one text with spaces between them, and a token is of the word that its last character is
    of, so it does not matter how a tokenizer writes the space.

    Args:
      item: words.
      tags: of every word, as a number.
      tokenizer: of the model.
      size: most tokens of a row.
    """
    (encoding,), (lost,) = tokenizer.cut_whole([" ".join(item.words)], size)
    starts = list(itertools.accumulate((len(word) + 1 for word in item.words[:-1]), initial=0))
    labels, before = [], -1
    for start, end in encoding.offsets:
        word = before if end == start else bisect.bisect_right(starts, end - 1) - 1
        labels.append(tags[word] if word > before else IGNORED)
        before = word
    return Placed(encoding.ids, encoding.type_ids, labels, lost)


def answers(item: Asked, tokenizer: Tokenizer, size: int, stride: int) -> Iterator[Placed]:
    """The question with every window of its text, `stride` tokens of it shared with the next one.

    The labels are the places of the answer's first and last token; of a window that does not hold all of it 0 and 0,
    the first token of the row, as in BERT's paper.

    Raises:
      ValueError: the question leaves no room for a text.
    """
    for encoding in tokenizer.windows(item.question, item.context, size, stride):
        places = [at for at, part in enumerate(encoding.sequence_ids) if part == 1]
        spans = [encoding.offsets[at] for at in places]
        labels = [0, 0]
        if item.answer is not None and spans and spans[0][0] <= item.answer[0] and item.answer[1] <= spans[-1][1]:
            first = max(at for at, (start, _) in zip(places, spans, strict=True) if start <= item.answer[0])
            last = min(at for at, (_, end) in zip(places, spans, strict=True) if end >= item.answer[1])
            labels = [first, max(first, last)]
        yield Placed(encoding.ids, encoding.type_ids, labels)
