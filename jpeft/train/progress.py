# SPDX-License-Identifier: Apache-2.0
"""What a run says while it runs: a bar on a terminal, lines elsewhere, nothing from processes but the first."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from .devices import is_main
from .feed import counted

#: The bar's own part of a line; a share of the width is left to it.
_BAR = "{percentage:3.0f}% |{bar:14}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
_BAR_COLUMNS = 54


def say(text: str) -> None:
    """Prints, from the first process, without breaking a bar."""
    if is_main():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Bar:
    """Updates made and left, the time that they take, and the last figures.

    Args:
      total: updates of the run.
      done: those made before.
      file: a terminal; anything else gets nothing, as do processes but the first.
      columns: width of the line; None asks the terminal.
    """

    def __init__(self, total: int, done: int, file: TextIO | None = None, columns: int | None = None):
        from tqdm import tqdm

        file, self._columns = file or sys.stderr, columns
        shown = is_main() and file is not None and file.isatty()
        self._bar = tqdm(
            total=total, initial=done, file=file, disable=not shown, bar_format=_BAR,
            ncols=columns, dynamic_ncols=columns is None,
        )  # fmt: skip

    def show(self, number: int, entry: Mapping[str, Any]) -> None:
        """Moves the bar to update `number` and writes the figures of a log line beside it, as many as there is room."""
        if self._bar.disable:
            return
        columns = self._columns or shutil.get_terminal_size().columns
        self._bar.set_postfix_str(fitted(figures(entry), columns - _BAR_COLUMNS), refresh=False)
        self._bar.update(number - self._bar.n)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def figures(entry: Mapping[str, Any]) -> list[str]:
    """A log line's figures as short texts, the most wanted first."""
    unit = counted(entry)
    said = [
        "loss skipped" if entry["loss"] is None else f"loss {entry['loss']:.4f}",
        f"lr {entry['lr']:.1e}",
        f"{entry[f'{unit}_per_s']:,.0f} {unit}/s",
        f"({entry[f'padded_{unit}_per_s']:,.0f} padded)",
    ]
    if entry.get("mfu") is not None:
        said.append(f"MFU {100 * entry['mfu']:.0f} %")
    return [*said, f"{entry['peak_memory_mb'] / 1024:.1f} GiB"]


def fitted(texts: Sequence[str], room: int) -> str:
    """The first of these texts, as many as there is room for."""
    chosen: list[str] = []
    for text in texts:
        if len(", ".join([*chosen, text])) > room:
            break
        chosen.append(text)
    return ", ".join(chosen)
