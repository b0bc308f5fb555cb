# SPDX-License-Identifier: Apache-2.0
"""From rows of text to batches of token ids, with every loss on the way counted.

Truncated rows, lost tokens and dropped rows are counted and printed. What cannot be trained on at all is an error
that names file and line: an empty data set, a label that is none of the names, a value that is no text.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from . import config as configuration
from .batches import Batches, batches_like, make_batches
from .examples import IGNORED, Examples
from .records import DataError
from .rows import Rows, digest, read
from .sections import Data
from .tokenizer import Tokenizer

__all__ = [
    "IGNORED",
    "Batches",
    "DataError",
    "Examples",
    "batches_like",
    "encode",
    "label_names",
    "make_batches",
    "read_rows",
]


def label_names(rows: Sequence[Rows], column: str) -> tuple[str, ...]:
    """The labels of these rows, sorted: the names themselves, or `"0" ... "n-1"` for class numbers.

    Raises:
      DataError: fewer than two labels, names and numbers mixed, or class numbers that leave gaps.
    """
    found = {value for part in rows for value in part.columns[column]}
    numbers = {value for value in found if _is_number(value)}
    if numbers and numbers == found:
        gaps = sorted({*range(max(found) + 1)} - found) if min(found) >= 0 else []
        if gaps:
            raise DataError(
                f"the classes of column {column!r} go up to {max(found)} without {gaps[0]}; give data.label_names"
            )
        names = tuple(str(value) for value in sorted(found))
    else:
        names = tuple(sorted(value for value in found if isinstance(value, str)))
        if numbers and names:
            raise DataError(
                f"column {column!r} holds names ({names[0]!r}) and numbers ({min(numbers)}); use one of them"
            )
    if len(names) < 2:
        raise DataError(
            f"classification needs two labels or more; column {column!r} holds {', '.join(names) or 'none'}"
        )
    return names


def read_rows(data: Data, task: str, split: str) -> list[Rows]:
    """The rows of `split`, `train` or `eval`, with the columns that the task needs."""
    columns = [data.text, data.label] if task == "SEQ_CLS" else [data.text]
    return read(configuration.paths(getattr(data, split)), columns, data.txt)


def encode(rows: Sequence[Rows], data: Data, tokenizer: Tokenizer, names: Sequence[str] | None) -> Examples:
    """Tokenised rows: for classification with label `names`, for a language model without.

    Raises:
      DataError: text or label of the wrong type, a label that is none of the names, or nothing left to train on.
    """
    texts = [_text(part, index, data.text) for part in rows for index in range(len(part))]
    if names is None:
        tokens, lost = _lm_tokens(texts, data, tokenizer)
        kept = [ids for ids in tokens if len(ids) > 1]  # one token alone predicts nothing
        labels = kept
    else:
        tokens, lost = tokenizer.cut(texts, data.max_length)
        kept = tokens
        labels = [_class(part, index, data.label, names) for part in rows for index in range(len(part))]
    if not kept:
        raise DataError(f"none of the {len(texts)} rows of {rows[0].file} has a token that can be trained")
    return Examples(
        [np.asarray(ids, np.int32) for ids in kept],
        [np.asarray(label, np.int32) for label in labels],
        rows=len(texts),
        truncated=sum(n > 0 for n in lost),
        lost=sum(lost),
        dropped=len(tokens) - len(kept),
        digests={str(part.file): digest(part.file) for part in rows},
    )


def _lm_tokens(texts: list[str], data: Data, tokenizer: Tokenizer) -> tuple[list[list[int]], list[int]]:
    """Rows of at most `max_length` tokens, each text with its end-of-text token; and the tokens lost per text."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    whole = [ids if ids[-1:] == end else ids + end for ids in tokenizer.encode(texts)]
    if data.longer == "split":
        size = data.max_length
        return [ids[at : at + size] for ids in whole for at in range(0, max(len(ids), 1), size)], [0] * len(texts)
    return [ids[: data.max_length] for ids in whole], [max(len(ids) - data.max_length, 0) for ids in whole]


def _text(rows: Rows, index: int, column: str) -> str:
    value = rows.columns[column][index]
    if not isinstance(value, str):
        raise DataError(f"{rows.where(index)}: column {column!r} must be text, got {value!r}")
    return value


def _class(rows: Rows, index: int, column: str, names: Sequence[str]) -> int:
    value: Any = rows.columns[column][index]
    if isinstance(value, str) and value in names:
        return names.index(value)
    if _is_number(value) and 0 <= value < len(names):
        return value
    known = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
    raise DataError(
        f"{rows.where(index)}: label {value!r} is out of range; there are {len(names)} labels, {known}, or 0 to "
        f"{len(names) - 1}"
    )


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
