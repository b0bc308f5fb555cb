# SPDX-License-Identifier: Apache-2.0
"""`jpeft replay`: the update that stopped a run, computed once more."""

import argparse

HELP = "compute once more the update whose loss was not finite"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and other values."""
    parser.add_argument("folder", metavar="FOLDER", help="failure/ in the folder of a run that stopped")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as model.dtype=float32")


def run(options: argparse.Namespace) -> None:
    """Prints the loss and the gradient's norm."""
    from .. import replay

    print(replay.described(replay.replay(options.folder, options.overrides)))
