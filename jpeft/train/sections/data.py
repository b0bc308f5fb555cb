# SPDX-License-Identifier: Apache-2.0
"""The section `data`: rows, and how they become tokens or images."""

import dataclasses
from typing import ClassVar, Literal

from ._checks import FORBID, at_least_one, positive

#: Who speaks in a conversation, as `data.loss_on` names them.
ROLES = ("system", "developer", "user", "assistant", "tool")
#: What `data.format` may name: see docs/data.md.
Form = Literal[
    "text",
    "alpaca",
    "messages",
    "sharegpt",
    "prompt_completion",
    "question_answer",
    "preference",
    "sentence",
    "sentence_pair",
    "words",
    "squad",
    "source_target",
    "image",
]


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of rows.

    Attributes:
      path: a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow`, `.txt`), a folder, or a data set's id on
        the hub.
      split: of a data set; parts are written as `train[:1000]` or `train[80%:]`. A file is `train`.
      name: the data set's configuration, such as `sst2` of `glue`.
      weight: how often its rows occur in an epoch, 0.5 half of them; of streams, how often it has its turn.
      format: as `data.format`; None is that one.
      columns: as `data.columns`; None is those.
    """

    __pydantic_config__: ClassVar = FORBID
    path: str
    split: str = "train"
    name: str | None = None
    weight: float = 1.0
    format: Form | None = None
    columns: dict[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows and how they become tokens or images.

    Attributes:
      train, eval: a file, a folder, a data set's id on the hub, a `Source`, or several of them.
      format: what the columns mean (docs/data.md); None finds it by their names.
      columns: the column of a part where it has another name: `{instruction: question, output: solution}`.
      text: column of the text; the same as `columns: {text: ...}`.
      label: column of the label, for classification: a name, or an index into `label_names`.
      label_names: all labels, in the order of the head's outputs; None takes those of the training rows, sorted.
      template: how messages become text: the tokenizer's own (None), `chatml`, `llama-3`, `alpaca`, `plain`, or a file
        in jinja.
      loss_on: what is learnt of a conversation: `responses`, the `last` response, `all`, or a list of roles.
      max_length: longest row in tokens.
      max_target: longest target in tokens, of `SEQ_2_SEQ_LM`; None is `max_length`.
      stride: tokens that two windows of a context share, of `QUESTION_ANS`; None is a quarter of `max_length`.
      longer: what happens to longer text: `truncate` (counted and printed) or `split` into rows (plain texts).
      txt: what is one text of a `.txt` file: a `line`, a `paragraph` or the whole `document`.
      packing: several examples in one row of `max_length` tokens, and `max_target` of targets, each for itself:
        `none`, `first_fit` or `best_fit`.
      num_widths: into how many widths rows are padded at most, where they are not packed; each is compiled once.
      streaming: rows are read while training goes on, some at a time; needs `train.max_steps`.
      window: rows that streaming holds, shuffles and packs at a time.
      on_bad_row: a row that cannot be read or learnt from: `stop`, or `skip` (counted and printed).
      max_bad_rows: how many may be skipped.
      cache: folder in which tokenised rows, or resized images, are kept; None keeps none.
    """

    __pydantic_config__: ClassVar = FORBID
    train: str | Source | tuple[str | Source, ...]
    eval: str | Source | tuple[str | Source, ...] = ()
    format: Form | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    text: str | None = None
    label: str | None = None
    label_names: tuple[str, ...] | None = None
    template: str | None = None
    loss_on: Literal["responses", "last", "all"] | tuple[str, ...] = "responses"
    max_length: int = 128
    max_target: int | None = None
    stride: int | None = None
    longer: Literal["truncate", "split"] = "truncate"
    txt: Literal["line", "paragraph", "document"] = "line"
    packing: Literal["none", "first_fit", "best_fit"] = "none"
    num_widths: int = 8
    streaming: bool = False
    window: int = 4096
    on_bad_row: Literal["stop", "skip"] = "stop"
    max_bad_rows: int = 100
    cache: str | None = None

    def sources(self, split: str) -> tuple[Source, ...]:
        """The sources of `train` or `eval`, each with its format and columns."""
        given = getattr(self, split)
        named = {part: name for part in ("text", "label") if (name := getattr(self, part)) is not None}
        return tuple(
            dataclasses.replace(
                source,
                format=source.format or self.format,
                columns=named | self.columns if source.columns is None else source.columns,
            )
            for source in (
                Source(one) if isinstance(one, str) else one
                for one in (given if isinstance(given, tuple | list) else (given,))
            )
        )

    def wrong(self) -> list[str]:
        """What cannot be, a line each."""
        twice = [part for part in ("text", "label") if getattr(self, part) is not None and part in self.columns]
        said = [f"data.columns names {part!r}, and data.{part} too; give one of them" for part in twice]
        if self.streaming and self.cache is not None:
            said.append("data.cache keeps what is tokenised before training, and data.streaming tokenises during it")
        weights = {f"the weight of {source.path}": source.weight for source in self.sources("train")}
        if self.loss_on == ():
            said.append("data.loss_on names no role, so nothing would be learnt")
        if isinstance(self.loss_on, tuple) and (others := [role for role in self.loss_on if role not in ROLES]):
            said.append(f"data.loss_on names roles of {', '.join(ROLES)}; got {others[0]!r}")
        if not self.streaming and self.window != Data.window:
            said.append("data.window is for data.streaming, which is false")
        if self.on_bad_row != "skip" and self.max_bad_rows != Data.max_bad_rows:
            said.append(f"data.max_bad_rows is for data.on_bad_row=skip, got {self.on_bad_row}")
        if self.stride is not None and not 0 <= self.stride < self.max_length:
            said.append(f"data.stride must lie in [0, data.max_length), got {self.stride} of {self.max_length}")
        if any(source.weight != 1 for source in self.sources("eval")):
            said.append("data.eval: every row is evaluated once, so no source has a weight")
        return [
            *said,
            *positive(weights),
            *at_least_one(
                {
                    "data.max_length": self.max_length,
                    "data.num_widths": self.num_widths,
                    "data.window": self.window,
                    "data.max_bad_rows": self.max_bad_rows,
                    **({} if self.max_target is None else {"data.max_target": self.max_target}),
                }
            ),
        ]
