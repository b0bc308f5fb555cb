# SPDX-License-Identifier: Apache-2.0
"""Tokenised rows, and an account of what became of all that were read."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

#: A label that is ignored, as in torch.
IGNORED = -100

Labelling = Literal["row", "token", "span", "target"]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised rows.

    Attributes:
      tokens: ids of every row; of preference pairs the chosen answer's and the rejected one's in turn.
      labels: of every row, as `labels_of` says: the class of a `row` `[]`; of every `token` `[tokens]`; the places of a
        `span`'s first and last token `[2]`; or the tokens of a `target` `[out]`. `IGNORED` where nothing is learnt.
      rows: rows read.
      truncated: rows that were cut, and `lost` the tokens cut off.
      dropped: rows left out because nothing in them could be trained.
      digests: SHA-256 by file.
      skipped: bad rows left out.
      unended: rows with labels by token in which no end of a text is learnt.
      types: of every row, 0 in its first text and 1 in its second, `[tokens]`; None where no row has two.
      labels_of: what labels are of.
      per_example: rows that belong together: 2 of preference pairs, else 1.
    """

    tokens: list[np.ndarray]
    labels: list[np.ndarray]
    rows: int
    truncated: int
    lost: int
    dropped: int
    digests: dict[str, str]
    skipped: int = 0
    unended: int = 0
    types: list[np.ndarray] | None = None
    per_example: int = 1
    labels_of: Labelling = "row"

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.tokens) // self.per_example

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every example's longest row."""
        return np.array([len(tokens) for tokens in self.tokens]).reshape(-1, self.per_example).max(axis=1)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of every example's rows together, with those of their targets."""
        targets = self.target_lengths if self.labels_of == "target" else 0
        return (np.array([len(tokens) for tokens in self.tokens]) + targets).reshape(-1, self.per_example).sum(axis=1)

    @property
    def target_lengths(self) -> np.ndarray:
        """Labels of every row that has several."""
        return np.array([len(labels) for labels in self.labels])

    @property
    def trained(self) -> int:
        """Labels that count."""
        return int(sum((labels != IGNORED).sum() for labels in self.labels))

    @property
    def warning(self) -> str | None:
        """What a training on them would not teach."""
        if self.unended and self.unended == len(self.tokens):
            return "no row learns an end of text, so the model will not learn to stop"
        return None

    def chosen(self, numbers: Sequence[int]) -> "Examples":
        """The examples of these numbers, of which one may come several times; no array is copied."""
        rows = [i * self.per_example + k for i in numbers for k in range(self.per_example)]
        columns = {"tokens": self.tokens, "labels": self.labels, "types": self.types}
        taken = {name: None if column is None else [column[row] for row in rows] for name, column in columns.items()}
        return dataclasses.replace(self, **taken)

    def __str__(self) -> str:
        total = int(self.sizes.sum())
        said = [
            f"{self.rows:,} rows -> {len(self):,} {'pairs' if self.per_example == 2 else 'examples'}, {total:,} tokens"
            + (f" ({self.trained:,} trained)" if self.labels_of in ("token", "target") else "")
            + f"; truncated {self.truncated:,} rows ({self.lost:,} tokens lost)",
            f"dropped {self.dropped:,} without a trainable token",
        ]
        if self.skipped:
            said.append(f"skipped {self.skipped:,} bad rows")
        if self.unended:
            said.append(f"{self.unended:,} learn no end of text")
        return "; ".join(said)


def drawn(count: int, weight: float, seed: int = 0) -> Sequence[int]:
    """Which of `count` examples a source of this weight has: 2.5 is each twice, and half of them, drawn, once more."""
    if weight == 1:
        return range(count)
    more = np.random.default_rng((seed, count)).permutation(count)[: round(weight % 1 * count)]
    return [*range(count)] * int(weight) + sorted(more.tolist())


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several sources as one."""
    if len(parts) == 1:
        return parts[0]
    types = None
    if any(part.types is not None for part in parts):
        types = [t for part in parts for t in part.types or [np.zeros_like(tokens) for tokens in part.tokens]]
    return Examples(
        [tokens for part in parts for tokens in part.tokens],
        [labels for part in parts for labels in part.labels],
        digests={file: digest for part in parts for file, digest in part.digests.items()},
        types=types,
        per_example=parts[0].per_example,
        labels_of=parts[0].labels_of,
        **{name: sum(getattr(part, name) for part in parts) for name in _COUNTS},
    )


#: What is summed over sources.
_COUNTS = ("rows", "truncated", "lost", "dropped", "skipped", "unended")
