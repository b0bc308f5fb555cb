# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that lies in a model folder, the same that transformers uses, without importing transformers."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids.

    Attributes:
      backend: `tokenizers.Tokenizer`.
      pad_id: what padding is filled with; masks say where it is, so any token serves.
      eos_id: end of text; None where the model has none.
      digest: SHA-256 of the tokenizer, for a run's record.
    """

    backend: Any
    pad_id: int
    eos_id: int | None
    digest: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, special tokens included, at full length."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts))]

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text that holds its special tokens already, as a chat template writes them."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def cut(self, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], list[int]]:
        """As `encode`, at most `max_length` tokens each with the special ones kept; and how many tokens were lost."""
        ids = self.encode(texts)
        long = [i for i, row in enumerate(ids) if len(row) > max_length]
        lost = [0] * len(ids)
        self.backend.enable_truncation(max_length)
        for i, encoding in zip(long, self.backend.encode_batch([texts[i] for i in long]), strict=True):
            lost[i] = len(ids[i]) - len(encoding.ids)
            ids[i] = encoding.ids
        self.backend.no_truncation()
        return ids, lost


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder: its `tokenizer.json`, or what transformers makes of its older files.

    Raises:
      FileNotFoundError: there is none.
    """
    folder = Path(folder)
    backend = _backend(folder)
    backend.no_truncation()
    backend.no_padding()
    special = _special(folder)
    ids = {name: backend.token_to_id(token) for name, token in special.items()}
    digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return Tokenizer(backend, ids.get("pad_token") or 0, ids.get("eos_token"), digest)


def ends(folder: str | Path, words: Tokenizer) -> tuple[int, ...]:
    """The ids that end what the model of a folder writes: its generation config's, its config's, or its tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return () if words.eos_id is None else (words.eos_id,)


def _backend(folder: Path) -> Any:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer as Backend

        return Backend.from_file(str(folder / "tokenizer.json"))
    if not any((folder / name).is_file() for name in ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")):
        raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor a vocabulary")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer


def _special(folder: Path) -> dict[str, str]:
    """The tokens that the folder names, such as `eos_token`, by name."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for key in ("pad_token", "eos_token"):
            token = values.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[key] = token
    return found
