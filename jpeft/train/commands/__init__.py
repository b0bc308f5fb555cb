# SPDX-License-Identifier: Apache-2.0
"""The sub-commands of `jpeft`: one file each, found by its name and imported when it is called.

A new one, `jpeft NAME`, is a file `NAME.py` here, with

  HELP                    one line, for `jpeft --help`
  add_arguments(parser)   argparse's; a command with commands of its own, as `jpeft config show`, takes
                          `parser.add_subparsers(dest="action", required=True)`
  run(options)            prints; a ValueError, OSError or ImportError is shown as one line, and the exit code is 2

and nothing heavy imported before `run`: no NumPy, JAX, pydantic or YAML. A command whose arguments include `overrides`
(`nargs="*"`) gets every `key.key=value` and `--key.key value` there, wherever it stands. Files that begin with `_` are
what commands share.

Argparse reads the arguments: it is there without an import of 0.3 s, and overrides by dotted keys, which are the
configuration's own, need no second declaration of every field.
"""

import importlib
import pkgutil
from typing import Any


def names() -> list[str]:
    """Every command, in alphabetical order."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))


def find(name: str) -> Any:
    """The file of a command, imported."""
    return importlib.import_module(f".{name}", __name__)
