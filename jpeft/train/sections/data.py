# SPDX-License-Identifier: Apache-2.0
"""The section `data`: rows, and how they become tokens."""

import dataclasses
from typing import ClassVar, Literal

from ._checks import FORBID, at_least_one


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows and how they become tokens.

    Attributes:
      train, eval: a file or several, of one kind: `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt`.
      text: column of the text; a `.txt` file has one called `text`.
      label: column of the label, for classification: a name, or an index into `label_names`.
      label_names: all labels, in the order of the head's outputs; None takes those of the training rows, sorted.
      max_length: longest row in tokens.
      longer: what happens to longer text: `truncate` (counted and printed) or `split` into rows (language models).
      txt: what is one text of a `.txt` file: a `line`, a `paragraph` or the whole `document`.
      num_widths: into how many widths rows are padded at most; each is compiled once.
    """

    __pydantic_config__: ClassVar = FORBID
    train: str | tuple[str, ...]
    eval: str | tuple[str, ...] = ()
    text: str = "text"
    label: str = "label"
    label_names: tuple[str, ...] | None = None
    max_length: int = 128
    longer: Literal["truncate", "split"] = "truncate"
    txt: Literal["line", "paragraph", "document"] = "line"
    num_widths: int = 8

    def wrong(self) -> list[str]:
        """What cannot be, a line each."""
        return at_least_one({"data.max_length": self.max_length, "data.num_widths": self.num_widths})
