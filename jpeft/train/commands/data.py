# SPDX-License-Identifier: Apache-2.0
"""`jpeft data inspect`: the training data as the model will see it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import config
from ._arguments import names_config

HELP = "look at training data: tokens, what is learnt of them, lengths, losses; or images and their classes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to look at."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", help="some rows, tokens coloured by what is learnt, and counts of all")
    names_config(inspect)
    inspect.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (3)")
    inspect.add_argument("--html", metavar="FILE", help="write a page instead")


def run(options: argparse.Namespace) -> None:
    """Prints the report, in colours on a terminal; or writes it as a page."""
    settings = config.load(options.config, options.overrides)
    if options.rows < 0:
        raise config.ConfigError(f"--rows is 0 or more, got {options.rows}")
    from .. import data_report, image_report, job
    from ..readers import Sight

    dataset = job.read_data(settings)
    described = job.describe(settings, dataset)
    reports: Any = image_report if isinstance(dataset.reader, Sight) else data_report
    if options.html is None:
        show = reports.as_ansi if sys.stdout.isatty() else reports.as_text
        print(reports.report(dataset, described, options.rows, show))
        return
    page = reports.as_html(dataset, described, reports.rows(dataset, options.rows))
    Path(options.html).write_text(page, encoding="utf-8")
    print(f"page: {options.html}")
