# SPDX-License-Identifier: Apache-2.0
"""What `jpeft data inspect` shows of images: how many each class has, and some of them as the model sees them."""

import base64
import html
import io
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .data_report import PAGE
from .job import Dataset
from .pictures import Resized

_WIDTH = 40
#: Columns of a terminal that an image takes at most.
_COLUMNS = 64


class Shown(NamedTuple):
    """One image of the training data.

    Attributes:
      title: its file or row.
      label: its class.
      image: resized.
    """

    title: str
    label: str
    image: Resized


def rows(dataset: Dataset, count: int) -> list[Shown]:
    """Images at equal distances, for those of a folder stand class by class."""
    examples, names = dataset.train.examples, [*(dataset.label_names or ())]
    numbers = sorted({*np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int).tolist()})
    if not numbers:
        return []
    found = examples.pixels(numbers)
    return [Shown(examples.names[n], names[examples.labels[n]], image) for n, image in zip(numbers, found, strict=True)]


def classes(dataset: Dataset) -> list[tuple[str, int]]:
    """How many training images each class has."""
    names = dataset.label_names or ()
    counts = np.bincount(dataset.train.examples.labels, minlength=len(names))
    return [*zip(names, counts.tolist(), strict=True)]


def bars(dataset: Dataset) -> str:
    """The same in lines."""
    found = classes(dataset)
    most, wide = max(count for _, count in found), max(len(name) for name, _ in found)
    lines = [f"{name:>{wide}} {'█' * -(-count * _WIDTH // most):<{_WIDTH}} {count:,}" for name, count in found]
    return "\n".join(["images of a class:", *lines])


def as_text(shown: Shown) -> str:
    """Without a picture: size, and the mean of every colour."""
    red, green, blue = shown.image.reshape(-1, 3).mean(0)
    height, width = shown.image.shape[:2]
    return f"{height} x {width} pixels, on average red {red:.0f}, green {green:.0f}, blue {blue:.0f}{_label(shown)}"


def as_ansi(shown: Shown) -> str:
    """For a terminal: two rows of pixels in a line of text, one above the other."""
    from PIL import Image

    columns = min(_COLUMNS, shutil.get_terminal_size().columns)
    height, width = shown.image.shape[:2]
    lines = max(1, round(height * columns / width / 2))
    small = np.asarray(Image.fromarray(shown.image).resize((columns, 2 * lines), Image.Resampling.BILINEAR))
    out = []
    for above, below in zip(small[::2], small[1::2], strict=True):
        pairs = zip(above.tolist(), below.tolist(), strict=True)
        out.append("".join(f"\033[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀" for a, b in pairs) + "\033[0m")
    return "\n".join(out) + _label(shown)


def as_html(dataset: Dataset, described: str, shown: Sequence[Shown]) -> str:
    """A page with all that is shown, which needs no other file."""
    parts = [f"<h1>Training data</h1><pre>{html.escape(described)}\n\n{html.escape(bars(dataset))}</pre>"]
    for row in shown:
        source = base64.b64encode(_png(row.image)).decode()
        parts.append(
            f"<h2>{html.escape(row.title)}</h2>"
            f"<img alt='{html.escape(row.label)}' src='data:image/png;base64,{source}'>"
            f"<p>label: {html.escape(row.label)}</p>"
        )
    return PAGE.format(body="".join(parts))


def report(dataset: Dataset, described: str, count: int, show: Callable[[Shown], str]) -> str:
    """All of it in lines."""
    return "\n\n".join([described, bars(dataset), *(f"--- {one.title}\n{show(one)}" for one in rows(dataset, count))])


def _label(shown: Shown) -> str:
    return f"\nlabel: {shown.label}"


def _png(image: Resized) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
