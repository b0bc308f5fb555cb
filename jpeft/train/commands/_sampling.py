# SPDX-License-Identifier: Apache-2.0
"""What the commands that write share: how tokens are chosen, and text shown as it is written."""

import argparse
from collections.abc import Iterator
from typing import Any


def takes_rules(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and when a text ends."""
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens at most (256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that sum to P")
    parser.add_argument("--min-p", type=float, metavar="P", help="draw among those P times as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="divides logits of what stands there (1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")


def rules(options: argparse.Namespace) -> dict[str, Any]:
    """The options as `Writer` takes them, without those that were not given."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    names += ("num_return_sequences", "num_beams", "length_penalty", "early_stopping")
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if "early_stopping" in given:
        given["early_stopping"] = {"true": True, "false": False, "never": "never"}[given["early_stopping"]]
    return given


def show(pieces: Iterator[str]) -> None:
    """Prints pieces of a text as they come."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
