# SPDX-License-Identifier: Apache-2.0
"""The console script `jpeft`. Arguments are read before anything heavy is imported, so that `--help` is quick."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import commands, exits
from .config import ConfigError

_EXAMPLES = """
examples:
  jpeft train sst2.yaml                                   train as the file says
  jpeft train sst2.yaml optimizer.lr=1e-3 --seed 1        with other values
  jpeft train sst2.yaml --dry-run                         only look: data, shapes, counts
  jpeft sweep ranks.yaml                                  many configurations in one step, and the best of them
  jpeft predict --adapter runs/sst2/adapter "what a film"
  jpeft eval --task sst2 --adapter runs/sst2/adapter      by a task, with intervals
  jpeft generate --model DIR --temperature 0.8 "Once upon a time"
  jpeft chat --model DIR --adapter law=runs/law/adapter   /switch law, /reset, /quit
  jpeft merge --adapter runs/sst2/adapter --out merged    a plain Hugging Face folder
  jpeft export --adapter runs/sst2/adapter --check vllm   what a target can hold of it
  jpeft inspect runs/sst2                                 what a folder holds, and its faults
  jpeft plan --model llama-2-7b --batch 8 --remat full --topology v5e-8   will it fit?
  jpeft push runs/sst2/adapter my-name/sst2 --private     on the hub
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `jpeft`; an error of the user's is one line and exit code 2, a run that had to stop exits with 1."""
    given = _as_overrides(sys.argv[1:] if arguments is None else arguments)
    options, rest = _parser(given[0] if given else "").parse_known_args(given)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # spares a warning about forking under `datasets`
    try:
        if "overrides" in options:
            options.overrides += rest  # those that stand behind an option
        elif rest:
            raise ConfigError(f"jpeft {options.command} does not know {' '.join(rest)}; see --help")
        commands.find(options.command).run(options)
    except Exception as error:
        if options.traceback or not exits.explained(error):
            raise
        raise SystemExit(exits.report(error)) from None


def _parser(command: str) -> argparse.ArgumentParser:
    """Of one command alone where it is one, and of all otherwise: for `jpeft --help`, and to say what there is."""
    parser = argparse.ArgumentParser(
        prog="jpeft",
        description="Parameter-efficient fine-tuning in JAX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = commands.names()
    chosen = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in [command] if command in known else known:
        found = commands.find(name)
        _traced(chosen.add_parser(name, help=found.HELP, description=found.__doc__), found)
    return parser


def _traced(parser: argparse.ArgumentParser, command: Any) -> None:
    command.add_arguments(parser)
    nested = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for each in [parser] if not nested else nested[0]:
        each.add_argument("--traceback", action="store_true", help="show where an error comes from")


def _as_overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--a.b=c` and `--a.b c` written as the override `a.b=c`."""
    out: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and "." in name:
            out.append(f"{name[2:]}={value if equals else next(rest, '')}")
        else:
            out.append(argument)
    return out
