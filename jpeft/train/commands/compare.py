# SPDX-License-Identifier: Apache-2.0
"""`jpeft compare`: methods x models x tasks x seeds, and the report of it."""

import argparse

from ._arguments import names_config

HELP = "compare methods as a YAML file says, with a report; called again, it goes on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study."""
    names_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say which runs it comes to")
    parser.add_argument("--report", action="store_true", help="only write the report again, of runs that are all made")


def run(options: argparse.Namespace) -> None:
    """Makes the runs that are not made yet, and writes the report."""
    from ..compare import opening, report, runner, study

    what = study.load(options.config, options.overrides)
    if options.dry_run:
        runs = [*study.trials(what), *study.finals(what, {})]
        print("\n".join(str(run.folder) for run in runs) + f"\n{len(runs)} runs")
        return
    if not options.report:
        opening.check(what)
    try:
        runs = runner.conduct(what, only_made=options.report)
    except runner.RunFailed as error:
        raise ValueError(str(error)) from error
    print(f"report: {report.write(what, runs)}")
