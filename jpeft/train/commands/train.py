# SPDX-License-Identifier: Apache-2.0
"""`jpeft train`: a run, as a configuration says."""

import argparse

from .. import config
from ._arguments import names_config

HELP = "fine-tune as a YAML file says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and what is often set beside it."""
    names_config(parser)
    parser.add_argument("--seed", metavar="N", help="train.seed")
    parser.add_argument("--out", metavar="DIR", help="out: the run's folder")
    parser.add_argument("--mesh", metavar="AXES", help="mesh: such as data=2,fsdp=2,tensor=2")
    parser.add_argument("--distributed", metavar="WHERE", help="host:port,num_processes,process_id; or auto")
    parser.add_argument("--dry-run", action="store_true", help="read the data, count, and stop")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")


def run(options: argparse.Namespace) -> None:
    """Trains, or says what would be trained."""
    given = {"train.seed": options.seed, "out": options.out, "mesh": options.mesh and f'"{options.mesh}"'}
    settings = config.load(
        options.config, options.overrides + [f"{key}={value}" for key, value in given.items() if value is not None]
    )
    from .. import devices, folder, loop

    devices.start_processes(options.distributed)
    if options.dry_run:
        print(loop.dry_run(settings))
        return
    if options.overwrite and devices.is_main():
        folder.remove_run(settings.out)
    loop.train(settings)
