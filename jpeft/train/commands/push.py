# SPDX-License-Identifier: Apache-2.0
"""`jpeft push`: a folder on the hub."""

import argparse

HELP = "put an adapter or a model on the hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and where it goes."""
    parser.add_argument("folder", metavar="FOLDER", help="such as RUN/adapter")
    parser.add_argument("name", metavar="ORG/NAME", help="repository, made if need be")
    parser.add_argument("--private", action="store_true", help="one that others do not see")
    parser.add_argument("--revision", metavar="BRANCH", help="made if need be (main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")


def run(options: argparse.Namespace) -> None:
    """Uploads, and prints the address."""
    from ...io import push

    address = push(
        options.folder, options.name, private=options.private, revision=options.revision, message=options.message
    )
    print(f"on the hub: {address}")
