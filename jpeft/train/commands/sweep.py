# SPDX-License-Identifier: Apache-2.0
"""`jpeft sweep`: many configurations of one training, trained together, and the best of them."""

import argparse
import sys

from ._arguments import names_config

HELP = "try ranks, rates and other keys as a YAML file says, many in one compiled step; called again, it goes on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sweep."""
    names_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say which points it comes to, and stop")


def run(options: argparse.Namespace) -> None:
    """Makes the trials that are not made yet, and writes the table, the plots and best.yaml."""
    from ..sweep import bayes, opening, space

    what = space.load(options.config, options.overrides)
    if what.search == "bayes":
        bayes.check()
    opening.check(what)
    if options.dry_run:
        print(_described(what))
        return
    from .. import exits, interruption
    from ..sweep import report, runner

    conduct = runner.Conduct(what)
    try:
        made = conduct.run()
    except interruption.Interrupted as stop:
        print(f"jpeft: interrupted {stop}", file=sys.stderr)
        raise SystemExit(exits.INTERRUPTED) from None
    page = report.write(what, made, conduct.cost)
    print(f"report: {page}\nbest:   {page.parent / 'best.yaml'}")


def _described(what: "object") -> str:
    """The points, one a line."""
    from ..sweep import space

    assert isinstance(what, space.Sweep)
    lines = []
    if what.search == "bayes":
        lines.append(f"points are proposed as scores come in, {what.batch} at a time")
    else:
        lines += [", ".join(f"{key}={value}" for key, value in values.items()) for values in space.points(what)]
    count = what.trials or len(lines)
    return "\n".join([*lines, f"{count} points x {len(what.seeds)} seeds = {count * len(what.seeds)} trials"])
