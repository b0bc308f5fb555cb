# SPDX-License-Identifier: Apache-2.0
"""`jpeft merge`: base and adapter as one model."""

import argparse

from ..config import ConfigError
from ._arguments import names_model

HELP = "write base and adapter as one Hugging Face folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, where to, and what to measure the change on."""
    names_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--text", metavar="FILE", help="what merging changes is measured on its first 64 lines")


def run(options: argparse.Namespace) -> None:
    """Writes the folder, and says what merging changed."""
    if options.adapter is None:
        raise ConfigError("name the adapter to merge by --adapter")
    from .. import saved

    drift = saved.save_merged(saved.open_model(options.model, options.adapter), options.out, options.text)
    print(f"merged model: {options.out}\nby merging {drift}")
