# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of docs/results/ from docs/results/data/: `python benchmarks/studies/pages.py [NAME=FOLDER ...]`.

Of each NAME=FOLDER, the folder of a study that `jpeft compare` or `jpeft sweep` made, report.json is first taken as
data/NAME.json. Then all that stands between these lines of a page is written from the data, so that the two cannot
disagree:

  <!-- NAME | Scores | accuracy; macro_f1 -->   a table of the report, here with two of its columns; all without them
  <!-- NAME | Protocol -->                     what was done, in lines
  <!-- NAME | Flags -->                        collapses and divergences, in lines
  <!-- NAME | Plot | learning curves -->       a plot, drawn into images/; of a sweep, its heat map
  <!-- NAME | Points -->                       of a sweep: what was tried, best first
  <!-- end -->
"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jpeft.train.compare import digest as digests
from jpeft.train.compare import figures, report
from jpeft.train.sweep import digest as sweeps
from jpeft.train.sweep import report as swept

RESULTS = Path(__file__).parents[2] / "docs" / "results"
_BLOCK = re.compile(r"(<!-- ([\w-]+) \| (\w+)(?: \| ([^>]*?))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main(taken: dict[str, Path]) -> None:
    """Takes the reports of `taken`, by name, and writes all pages and plots."""
    for name, folder in taken.items():
        (RESULTS / "data").mkdir(exist_ok=True)
        (RESULTS / "data" / f"{name}.json").write_text((folder / "report.json").read_text())
    for page in sorted(RESULTS.glob("*.md")):
        text = page.read_text()
        for _, name, kind, columns, _, _ in _BLOCK.findall(text):
            if kind == "Plot":
                draw(name, columns)
        if (new := written(text)) != text:
            page.write_text(new)
            print(f"written: {page}")


def written(text: str) -> str:
    """A page with its figures as they are in the data."""
    return _BLOCK.sub(lambda m: m[1] + "\n" + block(m[2], m[3], m[4]) + "\n\n" + m[6], text)


def block(name: str, kind: str, columns: str | None) -> str:
    """What stands between two lines of a page.

    Raises:
      KeyError: the data has no such table or column.
    """
    digest = data(name)
    if kind == "Plot":
        return f"![{columns} of {name}]({image(name, columns or '')})"
    if kind == "Protocol":
        return "\n".join(f"- {line}" for line in digest.protocol)
    if isinstance(digest, sweeps.Digest):
        if kind != "Points":
            raise KeyError(f"a sweep has the tables Protocol and Points, not {kind}")
        return "\n".join(swept.table(digest))
    (table,) = digest.tables
    if kind == "Flags":
        return "\n".join(f"- {line}" for line in report.flags(table)) or "No method collapsed or diverged."
    head, rows = report.parts(table, digest.reference)[kind]
    at = chosen(head, [part.strip() for part in (columns or "").split(";")])
    return "\n".join(report.marked([head[i] for i in at], [[row[i] for i in at] for row in rows]))


def chosen(head: Sequence[str], columns: Sequence[str]) -> list[int]:
    """The first column and those whose heads begin with one of these, as whole words; without any, all.

    Raises:
      KeyError: no column begins so.
    """
    if not any(columns):
        return [*range(len(head))]
    lost = [part for part in columns if not any(f"{cell} ".startswith(f"{part} ") for cell in head)]
    if lost:
        raise KeyError(f"no column begins with {lost[0]!r}; there are {', '.join(head)}")
    starts = tuple(f"{part} " for part in columns)
    return [0, *(i for i, cell in enumerate(head) if i and f"{cell} ".startswith(starts))]


def data(name: str) -> digests.Digest | sweeps.Digest:
    """A study's committed figures."""
    text = (RESULTS / "data" / f"{name}.json").read_text()
    return sweeps.read(text) if "points" in json.loads(text) else digests.read(text)


def image(name: str, title: str) -> str:
    """Where a plot lies, from the pages."""
    return f"images/{name}_{title.replace(' ', '_')}.png"


def draw(name: str, title: str) -> None:
    """Draws a plot of the only table of a study, or the heat map of a sweep."""
    digest, file = data(name), RESULTS / image(name, title)
    if isinstance(digest, sweeps.Digest):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(swept.heat_map(digest, Path(folder) / "map.svg").with_suffix(".png"), file)
        return
    (table,) = digest.tables
    figures.draw_one(table, title, file)


if __name__ == "__main__":
    main({name: Path(folder) for name, folder in (argument.split("=", 1) for argument in sys.argv[1:])})
