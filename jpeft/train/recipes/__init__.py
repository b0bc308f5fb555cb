# SPDX-License-Identifier: Apache-2.0
"""Configurations that are ready to run; each says its command, device, time and score, where these were measured."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def listed() -> dict[str, str]:
    """Name and purpose, the first line, of every recipe."""
    files = sorted(_FOLDER.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for file in files}


def text(name: str) -> str:
    """A recipe's text.

    Raises:
      ValueError: there is none of this name; it says which are nearest.
    """
    import difflib

    known = listed()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        raise ValueError(f"no recipe {name!r}; " + (f"did you mean {close[0]}?" if close else ", ".join(known)))
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
