# SPDX-License-Identifier: Apache-2.0
"""The three kinds of task: naming a class, writing a text, and how likely a text is."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..scoring.intervals import Estimate
from ..sections.data import Source

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Classify:
    """A model names a class, of a text or of an image.

    Attributes:
      source: on the hub; `--data` takes a file in its place. None where only a file will do.
      columns: those of the parts `text`, `pair` and `label`, or `image` and `label`, by part.
      form: of the rows, `sentence`, `sentence_pair` or `image`.
      names: of the classes, in the order of their numbers; None takes those that
        the data set tells, else those of the model.
      published: figures of others, with their source.
      task: of the models, `SEQ_CLS` or `IMAGE_CLS`.
    """

    source: Source | None
    columns: dict[str, str]
    form: str
    names: tuple[str, ...] | None
    published: dict[str, str]
    task: str = "SEQ_CLS"


@dataclasses.dataclass(frozen=True)
class Scored:
    """What came of written texts.

    Attributes:
      metrics: figures with intervals.
      examples: of each row what was found in its texts, and whether it is right.
      notes: how it was scored: signatures, layers of a sandbox, what was counted.
      values: of each figure that is a mean over rows, the value of every row; figures of a whole corpus have none.
    """

    metrics: dict[str, Estimate]
    examples: list[dict[str, Any]]
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    values: dict[str, list[float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Write:
    """A model writes behind a prompt.

    Attributes:
      source: on the hub; `--data` takes a file in its place. None where only a file will do.
      prompt: of a row, with its columns in braces.
      answer: what stands behind a prompt that is shown with its answer (`--shots`); None where none can be shown.
      stop: strings that end a text.
      max_new_tokens: of a text.
      score: rows, the texts of each (one or several) and the seed of intervals -> figures.
      extractor: how an answer is found in a text, in words.
      published: figures of others, with their source.
      columns: for a column of the prompt, the names that it goes by in various files.
      shots_from: the source of rows that are shown.
      compared: figures that models may be compared by, the first unless another is asked for: means over rows of which
        more is better. NAME@K needs K texts of each prompt.
    """

    source: Source | None
    prompt: str
    score: Callable[[Sequence[Row], Sequence[Sequence[str]], int], Scored]
    extractor: str
    published: dict[str, str]
    answer: str | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    columns: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    shots_from: Source | None = None
    compared: tuple[str, ...] = ()

    def figures(self, samples: int) -> tuple[str, ...]:
        """Those of `compared` that so many texts of each prompt give."""
        return tuple(name for name in self.compared if int(name.partition("@")[2] or 1) <= samples)

    def row(self, values: Row) -> dict[str, Any]:
        """A row with the columns that the prompt and the score need, under their first names.

        Raises:
          KeyError: one is missing.
        """
        found = dict(values)
        for name, names in self.columns.items():
            known = next((column for column in (name, *names) if column in values), None)
            if known is None:
                raise KeyError(name)
            found[name] = values[known]
        return found


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely a language model finds texts.

    Attributes:
      published: figures of others, with their source.
    """

    published: dict[str, str]
