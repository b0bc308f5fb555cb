# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: a model that writes, its tokenizer, and strings that end a text.

`jpeft.models.stream` gives ids, some at a time; here they become text between the chunks, where a stop string is looked
for in the text itself, for it may begin and end within tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .. import models
from .tokenizer import Tokenizer

#: What a decoder puts in the place of bytes that are no whole character (yet).
_BROKEN = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model that writes, with its tokenizer.

    Attributes:
      model: for CAUSAL_LM or SEQ_2_SEQ_LM, adapted or not.
      tokenizer: of its folder.
      ends: ids that end a text.
    """

    model: Any
    tokenizer: Tokenizer
    ends: tuple[int, ...] = ()

    def write(self, prompts: Sequence[str], *, stop: Sequence[str] = (), **options: Any) -> list[list[str]]:
        """What the model writes after each prompt: for each, a list of texts (one, without num_return_sequences).

        Args:
          prompts: texts, which get the tokenizer's special tokens.
          stop: strings that end a text, and are left out of it.
          **options: of `jpeft.models.generate`.

        Raises:
          ValueError: as `jpeft.models.generate`; a stop string is empty.
        """
        return self.write_on(self.tokenizer.encode(prompts), stop=stop, **options)

    def write_on(self, ids: Sequence[list[int]], *, stop: Sequence[str] = (), **options: Any) -> list[list[str]]:
        """As `write`, of prompts that are token ids, special ones included."""
        if options.get("num_beams", 1) > 1:
            return [[text.last() for text in row] for row in self._searched(ids, stop, options)]
        written = [["" for _ in range(options.get("num_return_sequences") or 1)] for _ in ids]
        for pieces in self.stream(ids, stop=stop, **options):
            written = [
                [text + piece for text, piece in zip(*row, strict=True)] for row in zip(written, pieces, strict=True)
            ]
        return written

    def stream(
        self, prompts: Sequence[Sequence[int]], *, stop: Sequence[str] = (), chunk: int = 8, **options: Any
    ) -> Iterator[list[list[str]]]:
        """The same piece by piece, as soon as it is certain; for each prompt, what each of its texts goes on by.

        Nothing is given that a later token could take back: bytes of half a character, or what may become a stop
        string. The ids behind it are those of `jpeft.models.generate`; writing ends when all texts have.

        Args:
          prompts: token ids, special ones included.
          stop: as of `write`.
          chunk: tokens at a time.
          **options: of `jpeft.models.generate`, without num_beams.
        """
        texts = self._texts(prompts, stop, options)
        ids, mask = self._padded(prompts)
        for new in models.stream(self.model, ids, mask, chunk=chunk, eos_token_id=self.ends or None, **options):
            pieces = new.reshape(len(prompts), -1, new.shape[-1])
            yield [
                [text.given(piece) for text, piece in zip(*row, strict=True)] for row in zip(texts, pieces, strict=True)
            ]
            if all(text.ended for row in texts for text in row):
                return
        yield [[text.last() for text in row] for row in texts]

    def _searched(self, prompts: Sequence[Sequence[int]], stop: Sequence[str], options: Any) -> list[list["_Text"]]:
        """The texts of a beam search, which are cut at a stop string once they are found."""
        ids, mask = self._padded(prompts)
        found = np.asarray(models.generate(self.model, ids, mask, eos_token_id=self.ends or None, **options))
        texts = self._texts(prompts, stop, options)
        for row, ids in zip(texts, found.reshape(len(prompts), -1, found.shape[-1]), strict=True):
            for text, written in zip(row, ids, strict=True):
                text.read(written)
        return texts

    def _texts(self, prompts: Sequence[Sequence[int]], stop: Sequence[str], options: Any) -> list[list["_Text"]]:
        if "" in stop or isinstance(stop, str):
            raise ValueError(f"stop is a list of strings with one character or more, got {stop!r}")
        count = options.get("num_return_sequences") or 1
        # a decoder of an encoder's states writes a text of its own, any other goes on with the prompt
        before = [() if hasattr(self.model, "encode") else prompt for prompt in prompts]
        return [[_Text(self.tokenizer, tuple(stop), self.ends, ids) for _ in range(count)] for ids in before]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(prompt) for prompt in prompts])
        mask = np.arange(max(lengths))[None] >= (max(lengths) - lengths)[:, None]
        ids = np.full(mask.shape, self.tokenizer.pad_id)
        ids[mask] = np.concatenate([np.asarray(prompt, int) for prompt in prompts])
        return ids, mask


class _Text:
    """One text while it is written.

    Its ids are decoded behind those of its prompt, for what a token says may depend on what stands before: a decoder
    takes the space off the first word alone.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], ends: tuple[int, ...], before: Sequence[int]):
        self.tokenizer, self.stop, self.ends = tokenizer, stop, ends
        self.before, self.ids = list(before), []
        self.start = len(tokenizer.decode(self.before))
        self.shown, self.ended, self.text = 0, False, ""

    def read(self, ids: np.ndarray) -> None:
        """Takes further ids in."""
        if self.ended:
            return
        stops = np.flatnonzero(np.isin(ids, self.ends))
        self.ended = len(stops) > 0
        self.ids += ids[: stops[0] if self.ended else None].tolist()
        self.text = self.tokenizer.decode(self.before + self.ids)[self.start :]
        places = [place for string in self.stop if (place := self.text.find(string)) >= 0]
        if places:
            self.text, self.ended = self.text[: min(places)], True

    def given(self, ids: np.ndarray) -> str:
        """What is certain once these ids are there."""
        self.read(ids)
        return self._shown(len(self.text) if self.ended else certain(self.text, self.stop))

    def last(self) -> str:
        """All the rest."""
        return self._shown(len(self.text))

    def _shown(self, end: int) -> str:
        piece = self.text[self.shown : end]
        self.shown = max(end, self.shown)
        return piece


def certain(text: str, stop: Sequence[str]) -> int:
    """How many characters of a text further tokens cannot change: no half characters, no beginning of a stop string."""
    whole = len(text.rstrip(_BROKEN))
    for start in range(max(0, whole - max(map(len, stop), default=0)), whole):
        if any(string.startswith(text[start:whole]) for string in stop):
            return start
    return whole
