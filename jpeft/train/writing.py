# SPDX-License-Identifier: Apache-2.0
"""The commands that write: `jpeft generate` and `jpeft chat`. Nothing heavy is imported before one runs."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from .config import ConfigError

_COMMANDS = "/switch NAME, /reset, /quit"


def add_parsers(commands: Any) -> None:
    """Puts both commands under `jpeft`."""
    generate = commands.add_parser("generate", help="go on with prompts given here, or on standard input")
    generate.add_argument("--model", metavar="DIR", help="Hugging Face folder; by default the adapter's own base")
    generate.add_argument("--adapter", metavar="DIR", help="PEFT folder, such as RUN/adapter")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="none reads a prompt a line from standard input")
    _takes_rules(generate)
    generate.add_argument(
        "--num-return-sequences", type=int, metavar="N", help="texts for each prompt, drawn or searched"
    )
    generate.add_argument("--num-beams", type=int, metavar="N", help="search among N partial texts")
    generate.add_argument(
        "--length-penalty", type=float, metavar="X", help="of a search: above 0 favours long texts (1)"
    )
    generate.add_argument("--early-stopping", choices=("true", "false", "never"), help="of a search (false)")

    chat = commands.add_parser("chat", help=f"talk with a model and its adapters ({_COMMANDS})")
    chat.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder with a chat template")
    chat.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="PEFT folder; may be repeated")
    chat.add_argument("--system", metavar="TEXT", help="message that stands before the conversation")
    _takes_rules(chat)


def _takes_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens at most (256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that sum to P")
    parser.add_argument("--min-p", type=float, metavar="P", help="draw among those P times as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="divides logits of what stands there (1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")


def _rules(options: argparse.Namespace) -> dict[str, Any]:
    """The options as `Writer` takes them, without those that were not given."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    names += ("num_return_sequences", "num_beams", "length_penalty", "early_stopping")
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if "early_stopping" in given:
        given["early_stopping"] = {"true": True, "false": False, "never": "never"}[given["early_stopping"]]
    return given


def generate(options: argparse.Namespace) -> None:
    """Prints what follows each prompt; of one text for one prompt, as it is written."""
    prompts = options.prompts or [line.rstrip("\n") for line in sys.stdin]
    if not prompts:
        raise ConfigError("give a prompt, or lines on standard input")
    import jax

    from . import saved, tokenizer
    from .writer import Writer

    opened = saved.open_model(options.model, options.adapter)
    writer = Writer(opened.model, opened.tokenizer, tokenizer.ends(opened.base, opened.tokenizer))
    rules = {**_rules(options), "key": jax.random.key(options.seed), "stop": options.stop}
    if len(prompts) == 1 and "num_beams" not in rules and "num_return_sequences" not in rules:
        _show(piece for ((piece,),) in writer.stream(opened.tokenizer.encode(prompts), **rules))
        return
    for prompt, texts in zip(prompts, writer.write(prompts, **rules), strict=True):
        for text in texts:
            print(f"==> {prompt} <==\n{text}")


def chat(options: argparse.Namespace) -> None:
    """Reads lines until /quit or the end, and prints the answers as they are written."""
    adapters = dict(_named(text) for text in options.adapter)
    if len(adapters) < len(options.adapter):
        raise ConfigError(f"every --adapter has a name of its own, got {' '.join(options.adapter)}")
    import jax

    from .chat import Conversation

    talk = Conversation(options.model, adapters, options.system)
    rules, turns = {**_rules(options), "stop": options.stop}, 0
    for line in _lines(talk):
        with _in_one_line():
            if line.startswith("/"):
                _obey(talk, line)
            elif line:
                key = jax.random.fold_in(jax.random.key(options.seed), turns)
                _show(talk.answer(line, key=key, bucket=256, **rules))
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


def _show(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
