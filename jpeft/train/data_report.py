# SPDX-License-Identifier: Apache-2.0
"""What `jpeft data inspect` shows: rows with every token and whether it is learnt, how long rows are, what was lost.

Tokens are pieces of the text that a row's ids decode to, so a character of several tokens stands in the last of them.
"""

import dataclasses
import html
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .examples import IGNORED, Examples
from .feed import Feed
from .job import Dataset
from .packing import Packs
from .tokenizer import Tokenizer

#: Tokens of a row that are shown.
SHOWN = 4096
_BARS = 12
_WIDTH = 40
_BROKEN = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one token says, and whether it is learnt."""

    text: str
    trained: bool


@dataclasses.dataclass(frozen=True)
class Shown:
    """One row of the training data.

    Attributes:
      title: which, and how much of it is learnt.
      pieces: its tokens.
      label: of a classification, else None.
    """

    title: str
    pieces: tuple[Piece, ...]
    label: str | None = None


def rows(dataset: Dataset, count: int) -> list[Shown]:
    """The first rows of the training data, pairs as two."""
    examples = dataset.train.examples
    found = []
    for row in range(min(count * examples.per_example, len(examples.tokens))):
        ids, labels = examples.tokens[row][:SHOWN], examples.labels[row]
        kind = ("chosen ", "rejected ")[row % 2] if examples.per_example == 2 else ""
        title = f"{kind}row {row // examples.per_example + 1}, {len(examples.tokens[row]):,} tokens"
        learnt = _learnt(examples, row, dataset.label_names is None)
        if examples.labels_of == "token":
            title += f", {int(learnt.sum()):,} learnt"
        found.append(Shown(title, pieces(dataset.tokenizer, ids, learnt[:SHOWN]), _label_of(dataset, labels)))
    return found


def _learnt(examples: Examples, row: int, language: bool) -> np.ndarray:
    """Which tokens of a row are learnt, or are the answer."""
    labels, learnt = examples.labels[row], np.zeros(len(examples.tokens[row]), bool)
    if examples.labels_of == "token":
        learnt = labels != IGNORED
        learnt[0] &= not language  # nothing stands before the first token that could predict it
    if examples.labels_of == "span" and labels.any():
        learnt[labels[0] : labels[1] + 1] = True
    return learnt


def _label_of(dataset: Dataset, labels: np.ndarray) -> str | None:
    """A row's class, its tags, or what is to be written."""
    names, tokenizer = dataset.label_names, dataset.tokenizer
    match dataset.train.examples.labels_of:
        case "row":
            assert names is not None
            return names[int(labels)]
        case "token" if names is not None:
            return " ".join(names[label] for label in labels if label != IGNORED)
        case "target":
            return tokenizer.decode([int(token) for token in labels])
        case "span":
            return None if labels.any() else "no answer in this part"
    return None


def pieces(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, trained: np.ndarray) -> tuple[Piece, ...]:
    """What every token adds to the text."""
    found, before = [], ""
    for at in range(len(ids)):
        text = tokenizer.backend.decode([int(i) for i in ids[: at + 1]], skip_special_tokens=False)
        whole = text.rstrip(_BROKEN) if at + 1 < len(ids) else text
        found.append(Piece(whole[len(before) :], bool(trained[at])))
        before = max(before, whole, key=len)
    return tuple(found)


def as_text(shown: Shown) -> str:
    """Without colours: what is learnt stands in ⟦ ⟧."""
    out, inside = [], False
    for piece in shown.pieces:
        if piece.trained != inside:
            out.append("⟦" if piece.trained else "⟧")
            inside = piece.trained
        out.append(piece.text)
    return "".join(out) + ("⟧" if inside else "") + _label(shown)


def as_ansi(shown: Shown) -> str:
    """For a terminal: what is learnt is green, all else grey; every other token is underlined."""
    out = []
    for at, piece in enumerate(shown.pieces):
        colour, line = ("1;32" if piece.trained else "90"), (";4" if at % 2 else "")
        lines = piece.text.split("\n")
        out.append("↵\n".join(f"\033[{colour}{line}m{text}\033[0m" if text else "" for text in lines))
    return "".join(out) + _label(shown)


def as_html(dataset: Dataset, described: str, shown: Sequence[Shown]) -> str:
    """A page with all that is shown, which needs no other file."""
    parts = [f"<h1>Training data</h1><pre>{html.escape(described)}</pre>", _svg(dataset.train.examples.lengths)]
    for row in shown:
        parts.append(f"<h2>{html.escape(row.title)}</h2><p class=row>")
        for piece in row.pieces:
            text = html.escape(piece.text).replace("\n", "<i>↵</i><br>")
            parts.append(f"<span{' class=learnt' if piece.trained else ''}>{text}</span>")
        parts.append(f"</p>{html.escape(_label(row))}")
    return PAGE.format(body="".join(parts))


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, number of examples) of bars of one width, which begin with the shortest example."""
    low, high = int(lengths.min()), int(lengths.max())
    step = max(-(-(high - low + 1) // _BARS), 1)
    return [
        (start, start + step - 1, int(((lengths >= start) & (lengths < start + step)).sum()))
        for start in range(low, high + 1, step)
    ]


def bars(lengths: np.ndarray) -> str:
    """The histogram in lines."""
    found = histogram(lengths)
    most, digits = max(count for *_, count in found), len(str(found[-1][1]))
    lines = [
        f"{low:>{digits}} - {high:>{digits}} {'█' * -(-count * _WIDTH // most):<{_WIDTH}} {count:,}"
        for low, high, count in found
    ]
    middle, most_of = np.percentile(lengths, [50, 95])
    told = f"tokens of an example: mean {lengths.mean():.1f}, median {middle:.0f}, 95 % up to {most_of:.0f}"
    return "\n".join([told, *lines])


def shapes(batches: Feed) -> str:
    """What is compiled, and how full each shape is."""
    if isinstance(batches.buckets, Packs):
        packs = batches.buckets
        beside = ""
        if packs.target_fill is not None:
            beside = f"with targets in {packs.target_width} tokens, {100 * packs.target_fill:.1f} % full, "
        return (
            f"packed: {len(packs.members):,} rows of {packs.width} tokens, {100 * packs.fill:.1f} % full, {beside}up "
            f"to {packs.most} examples in one; 1 compilation"
        )
    lines = []
    order = batches.buckets.in_order()
    for width in batches.buckets.widths:
        mine = [batches.sizes(batch) for batch in order if batch.width == width]
        if mine:
            real, padded = map(sum, zip(*mine, strict=True))
            lines.append(f"  {width:>5} tokens: {len(mine):,} batches, {100 * real / padded:.1f} % real")
    return "\n".join([f"padded to one of {len(lines)} widths, each compiled once:", *lines])


def report(dataset: Dataset, described: str, count: int, show: Callable[[Shown], str]) -> str:
    """All of it in lines."""
    head = [described, bars(dataset.train.examples.lengths), shapes(dataset.train)]
    return "\n\n".join([*head, *(f"--- {shown.title}\n{show(shown)}" for shown in rows(dataset, count))])


def _label(shown: Shown) -> str:
    return "" if shown.label is None else f"\nlabel: {shown.label}"


def _svg(lengths: np.ndarray) -> str:
    found: Any = histogram(lengths)
    most, step = max(count for *_, count in found), 640 / len(found)
    parts = ["<svg viewBox='0 0 640 150' role=img aria-label='lengths'>"]
    for at, (low, high, count) in enumerate(found):
        tall, left = 110 * count / most, at * step
        parts.append(
            f"<rect x='{left:.1f}' y='{120 - tall:.1f}' width='{step - 3:.1f}' height='{tall:.1f}'/>"
            f"<text x='{left:.1f}' y='{115 - tall:.1f}'>{count:,}</text>"
            f"<text x='{left:.1f}' y='134'>{low}-{high}</text>"
        )
    return "".join([*parts, "<text x='0' y='148'>tokens of an example</text></svg>"])


#: A page around a body, which needs no other file.
PAGE = """<!doctype html><meta charset=utf-8><title>Training data</title><style>
body{{font:15px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;color:#1b1b1b;background:#fff}}
h1{{font-size:1.3rem}}h2{{font-size:1rem;margin:1.6rem 0 .3rem;color:#555}}pre{{white-space:pre-wrap;color:#333}}
.row{{font:14px/1.9 ui-monospace,monospace;color:#8a8a8a;overflow-wrap:anywhere;margin:0}}
i{{color:#bbb;font-style:normal}}
.row span:nth-of-type(even){{border-bottom:1px solid #ddd}}.row span.learnt{{color:#0b5d1e;background:#dcf3e1}}
svg{{width:100%;max-width:640px}}img{{min-width:14rem;image-rendering:pixelated}}rect{{fill:#4c78a8}}text{{font-size:9px;fill:#444}}
</style><body>{body}
"""
