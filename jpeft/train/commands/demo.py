# SPDX-License-Identifier: Apache-2.0
"""`jpeft demo`: a first run, on data that every Python has."""

import argparse
from pathlib import Path

HELP = "fine-tune a real encoder on Python's own docstrings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to."""
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder (runs/demo)")


def run(options: argparse.Namespace) -> None:
    """Trains, and shows what was learnt."""
    from .. import demo

    demo.run(Path(options.out))
