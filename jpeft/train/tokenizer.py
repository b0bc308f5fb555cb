# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that lies in a model folder, the same that transformers uses, without importing transformers."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models._files import CheckpointError, is_file, read_json


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids.

    Attributes:
      backend: `tokenizers.Tokenizer`.
      pad_id: what padding is filled with; masks say where it is, so any token serves.
      eos_id: end of text; None where the model has none.
      digest: SHA-256 of the tokenizer, for a run's record.
      folder: that it was read from.
      bos_id: start of text; None where the folder names none.
      has_types: whether the folder's model tells a row's second text from its first.
    """

    backend: Any
    pad_id: int
    eos_id: int | None
    digest: str
    folder: Path = Path()
    has_types: bool = False
    bos_id: int | None = None

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> list[list[int]]:
        """Token ids of every text, or pair of texts, special tokens included, at full length."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts))]

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text that holds its special tokens already, as a chat template writes them."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def located(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode_plain`, and the characters `[start, end)` of the text that each token stands for."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def starts_with(self, token: str) -> bool:
        """Whether every text begins with this token."""
        return bool(token) and self.backend.encode("a").ids[:1] == [self.backend.token_to_id(token)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def cut(self, texts: Sequence[str | tuple[str, str]], max_length: int) -> tuple[list[list[int]], list[int]]:
        """As `encode`, at most `max_length` tokens each with the special ones kept; and how many tokens were lost."""
        ids, lost, _ = self.cut_typed(texts, max_length)
        return ids, lost

    def cut_typed(
        self, texts: Sequence[str | tuple[str, str]], max_length: int
    ) -> tuple[list[list[int]], list[int], list[list[int]]]:
        """As `cut`, and of every token which text of its row it is of, 0 or 1. The longer text is cut first."""
        whole, lost = self.cut_whole(texts, max_length)
        return [row.ids for row in whole], lost, [row.type_ids for row in whole]

    def cut_whole(self, texts: Sequence[str | tuple[str, str]], max_length: int) -> tuple[list[Any], list[int]]:
        """As `cut`, with all that the tokenizer knows of a row: its ids, types, and the characters of every token."""
        whole = self.backend.encode_batch(list(texts))
        long = [i for i, row in enumerate(whole) if len(row) > max_length]
        lost = [0] * len(whole)
        self.backend.enable_truncation(max_length)
        for i, encoding in zip(long, self.backend.encode_batch([texts[i] for i in long]), strict=True):
            lost[i] = len(whole[i]) - len(encoding)
            whole[i] = encoding
        self.backend.no_truncation()
        return whole, lost

    def windows(self, first: str, second: str, max_length: int, stride: int) -> list[Any]:
        """Rows of `first` with a part of `second` each, of which `stride` tokens are in the next one's as well.

        Raises:
          ValueError: `first` and the special tokens leave no more than `stride` tokens to a part.
        """
        beside = len(self.backend.encode(first, "").ids)
        if max_length - beside <= stride:
            raise ValueError(
                f"its question takes {beside} of data.max_length={max_length} tokens, which leaves no more than "
                f"data.stride={stride} to a part of the context"
            )
        self.backend.enable_truncation(max_length, stride=stride, strategy="only_second")
        try:
            whole = self.backend.encode(first, second)
        finally:
            self.backend.no_truncation()
        return [whole, *whole.overflowing]


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: its `tokenizer.json`, or what transformers makes of its older files.

    Raises:
      FileNotFoundError: there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; name a Hugging Face model folder")
    backend = _backend(folder)
    backend.no_truncation()
    backend.no_padding()
    special = _special(folder)
    ids = {name: backend.token_to_id(token) for name, token in special.items()}
    digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
    config = folder / "config.json"
    types = read_json(config).get("type_vocab_size") if is_file(config) else None
    has_types = type(types) is int and types > 1
    return Tokenizer(
        backend, ids.get("pad_token") or 0, ids.get("eos_token"), digest, folder, has_types, ids.get("bos_token")
    )


def ends(folder: str | Path, words: Tokenizer) -> tuple[int, ...]:
    """The ids that end what the model of a folder writes: its generation config's, its config's, or its tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        found = read_json(file).get("eos_token_id") if is_file(file) else None
        found = [found] if type(found) is int else found
        if isinstance(found, list) and all(type(token) is int for token in found):
            return tuple(found)
        if found is not None:
            raise CheckpointError(f"{file}: eos_token_id is an id or a list of ids, got {found!r:.100}")
    return () if words.eos_id is None else (words.eos_id,)


def auto_tokenizer(folder: str | Path) -> Any:
    """What transformers makes of the tokenizer's files.

    Raises:
      CheckpointError: it cannot.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many types, some of them of the libraries below
        raise CheckpointError(f"{folder} has a tokenizer that transformers cannot read: {error!s:.500}") from error


def _backend(folder: Path) -> Any:
    file = folder / "tokenizer.json"
    if is_file(file):
        from tokenizers import Tokenizer as Backend

        try:
            return Backend.from_file(str(file))
        except Exception as error:  # of no other type
            raise CheckpointError(f"{file} is no tokenizer: {error!s:.500}") from error
    if not any(is_file(folder / name) for name in ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")):
        raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor a vocabulary")
    return auto_tokenizer(folder).backend_tokenizer


def _special(folder: Path) -> dict[str, str]:
    """The tokens that the folder names, such as `eos_token`, by name."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        values = read_json(file) if is_file(file) else {}
        for key in ("pad_token", "eos_token", "bos_token"):
            token = values.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[key] = token
    return found
