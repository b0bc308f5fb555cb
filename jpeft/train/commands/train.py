# SPDX-License-Identifier: Apache-2.0
"""`jpeft train`: a run, as a configuration says."""

import argparse
import json
import sys

from .. import config, exits
from ._arguments import names_config

HELP = "fine-tune as a YAML file says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and what is often set beside it."""
    names_config(parser)
    parser.add_argument("--seed", metavar="N", help="train.seed")
    parser.add_argument("--out", metavar="DIR", help="out: the run's folder")
    parser.add_argument("--mesh", metavar="AXES", help="mesh: such as data=2,fsdp=2,tensor=2")
    parser.add_argument("--distributed", metavar="WHERE", help="host:port,num_processes,process_id; or auto")
    parser.add_argument(
        "--arrival", metavar="SECONDS", type=float, default=300.0, help="in which all processes have to come (300)"
    )
    parser.add_argument(
        "--stall", metavar="SECONDS", type=float, default=1800.0, help="a process may stand still behind others (1800)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="read the data, compile by shape, print the plan, and stop"
    )
    parser.add_argument("--profile", action="store_true", help="trace a few updates: logging.profile=3")
    parser.add_argument("--no-compilation-cache", action="store_true", help="compilation_cache=null: keep no programs")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")


def run(options: argparse.Namespace) -> None:
    """Trains, or says what would be trained; an interrupted run that can be resumed ends with `exits.INTERRUPTED`."""
    if options.overwrite and options.resume:
        raise config.ConfigError("--resume goes on with a run and --overwrite removes it; give one of them")
    given = {
        "train.seed": options.seed,
        "out": _quoted(options.out),
        "mesh": _quoted(options.mesh),
        "logging.profile": "3" if options.profile else None,
        "compilation_cache": "null" if options.no_compilation_cache else None,
    }
    settings = config.load(
        options.config, options.overrides + [f"{key}={value}" for key, value in given.items() if value is not None]
    )
    from .. import devices

    with devices.together(options.distributed, options.arrival, options.stall, traced=options.traceback):
        _run(options, settings)


def _quoted(text: str | None) -> str | None:
    """A text as YAML has it, whatever it holds."""
    return None if text is None else json.dumps(text, ensure_ascii=False)


def _run(options: argparse.Namespace, settings: config.Config) -> None:
    from .. import compilation, folder, interruption, loop, plan, progress

    progress.say(compilation.keep_programs(settings.compilation_cache, settings.compilation_cache_mb))
    if options.dry_run:
        print(plan.dry_run(settings))
        return
    if options.resume and (run := folder.RunFolder(settings.out, resumes=True)).finished:
        from .. import identity

        identity.check_finished(config.load(run.path / "config.yaml"), settings)
        print(f"this run is finished: {run.adapter}")
        return
    try:
        loop.train(settings, resume=options.resume, overwrite=options.overwrite)
    except interruption.Interrupted as stop:
        print(f"jpeft: interrupted {stop}", file=sys.stderr)
        raise SystemExit(exits.INTERRUPTED) from None
