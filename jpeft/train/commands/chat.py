# SPDX-License-Identifier: Apache-2.0
"""`jpeft chat`: a conversation with a model and its adapters."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from ..config import ConfigError
from ._sampling import rules, show, takes_rules

_COMMANDS = "/switch NAME, /reset, /quit"

HELP = f"talk with a model and its adapters ({_COMMANDS})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its adapters, and how tokens are chosen."""
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="PEFT folder; may be repeated"
    )
    parser.add_argument(
        "--template", metavar="NAME", help="as data.template; by default an adapter's, else the tokenizer's own"
    )
    parser.add_argument("--system", metavar="TEXT", help="message that stands before the conversation")
    takes_rules(parser)


def run(options: argparse.Namespace) -> None:
    """Reads lines until /quit or the end, and prints the answers as they are written."""
    adapters = dict(_named(text) for text in options.adapter)
    if len(adapters) < len(options.adapter):
        raise ConfigError(f"every --adapter has a name of its own, got {' '.join(options.adapter)}")
    import jax

    from .. import compilation
    from ..chat import Conversation

    compilation.keep_programs()
    talk = Conversation(options.model, adapters, options.system, options.template)
    chosen, turns = {**rules(options), "stop": options.stop}, 0
    for line in _lines(talk):
        with _in_one_line():
            if line.startswith("/"):
                _obey(talk, line)
            elif line:
                key = jax.random.fold_in(jax.random.key(options.seed), turns)
                show(talk.answer(line, key=key, bucket=256, **chosen))
                turns += 1


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ConfigError(f"--adapter is NAME=DIR, got {text!r}")
    return name, folder


def _lines(talk: Any) -> Iterator[str]:
    """What the user types, until /quit or the end; with who answers in front, at a terminal."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{', '.join(talk.names)}; {_COMMANDS}")
    while True:
        if terminal:
            print(f"{talk.speaker}> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        yield line.strip()


def _obey(talk: Any, line: str) -> None:
    command, _, name = line.partition(" ")
    if command == "/reset" and not name:
        talk.reset()
    elif command == "/switch":
        talk.switch(name.strip())
    else:
        raise ConfigError(f"{line} is no command; there are {_COMMANDS}")


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """Says what is wrong with a line, and goes on with the next one."""
    try:
        yield
    except ValueError as error:
        print(f"jpeft: error: {error}", file=sys.stderr)
