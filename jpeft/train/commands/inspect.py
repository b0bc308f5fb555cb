# SPDX-License-Identifier: Apache-2.0
"""`jpeft inspect`: what a folder holds, and what a model is made of."""

import argparse

from ..config import ConfigError
from ._arguments import names_model

HELP = "what a folder holds, whether it is whole, and what can be adapted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A folder, or a model."""
    parser.add_argument("folder", nargs="?", metavar="DIR", help="an adapter, a model or a run; exit with 1 on a fault")
    names_model(parser)


def run(options: argparse.Namespace) -> None:
    """Prints what a folder holds with its faults, or what a model is made of.

    Raises:
      SystemExit: with 1, where a folder has faults.
    """
    from .. import inspection

    if options.folder is None:
        print(inspection.describe(options.model, options.adapter))
        return
    if options.adapter is not None:
        raise ConfigError("name one folder to inspect: DIR verifies it, --adapter describes it on its base")
    contents = inspection.verified(options.folder, options.model)
    print(contents)
    if contents.faults:
        raise SystemExit(1)
