# SPDX-License-Identifier: Apache-2.0
"""What a language model writes in the middle of its training: the same prompts after every evaluation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .examples import IGNORED, Examples
from .tokenizer import Tokenizer
from .writer import Writer

#: How much of a text without a prompt is given, and tokens of it at most.
SHARE, MOST = 4, 32


class Sample(NamedTuple):
    """A prompt, and what the model wrote after it."""

    prompt: str
    text: str


class Sampler:
    """Writes on from the same prompts, taking the likeliest tokens.

    Args:
      prompts: texts; or how many examples are begun: with their prompt, all before the first label, or where they have
        none with their first quarter.
      tokens: how many are written at most.
      tokenizer, ends: of the model's folder.
      examples: to begin.
    """

    def __init__(
        self, prompts: int | Sequence[str], tokens: int, tokenizer: Tokenizer, ends: tuple[int, ...], examples: Examples
    ):
        self._tokens, self._tokenizer, self._ends = tokens, tokenizer, ends
        if isinstance(prompts, int):
            rows = range(0, min(prompts, len(examples)) * examples.per_example, examples.per_example)
            self._prompts = [begin(examples.tokens[row], examples.labels[row]) for row in rows]
        else:
            self._prompts = tokenizer.encode(list(prompts))

    def __call__(self, model: Any) -> list[Sample]:
        """What the model writes now."""
        writer = Writer(model, self._tokenizer, self._ends)
        texts = [""] * len(self._prompts)
        for pieces in writer.stream(self._prompts, max_new_tokens=self._tokens):
            texts = [text + piece for text, (piece,) in zip(texts, pieces, strict=True)]
        return [Sample(self._tokenizer.decode(ids), text) for ids, text in zip(self._prompts, texts, strict=True)]


def begin(tokens: np.ndarray, labels: np.ndarray) -> list[int]:
    """The prompt of an example: what stands before its first label, or the first quarter of one that is all labels."""
    first = int(np.argmax(labels != IGNORED))
    count = first if first > 1 else max(1, min(len(tokens) // SHARE, MOST))
    return tokens[:count].tolist()
