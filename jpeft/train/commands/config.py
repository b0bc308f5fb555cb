# SPDX-License-Identifier: Apache-2.0
"""`jpeft config`: what a configuration may say, what one says in full, what is wrong with it, and recipes to copy."""

import argparse
import json
import sys
from pathlib import Path

from .. import config
from ._arguments import names_config

HELP = "the schema of a configuration, one in full, its faults, and recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    schema = actions.add_parser("schema", help="JSON Schema of a configuration, every key with its meaning")
    schema.add_argument("--markdown", action="store_true", help="as the tables of docs/configuration.md")
    names_config(actions.add_parser("show", help="the configuration with every key written out"))
    names_config(actions.add_parser("validate", help="all that is wrong with it; exit with 1 where anything is"))
    recipes = actions.add_parser("recipes", help="list the recipes, or copy one to a file of your own")
    recipes.add_argument("recipe", nargs="?", metavar="NAME", help="the one to copy")
    recipes.add_argument("file", nargs="?", metavar="FILE", help="where to; left out, it is printed")


def run(options: argparse.Namespace) -> None:
    """Does it.

    Raises:
      SystemExit: with 1, where `validate` found something.
    """
    {"schema": _schema, "show": _show, "validate": _validate, "recipes": _recipes}[options.action](options)


def _schema(options: argparse.Namespace) -> None:
    from .. import schema

    print(schema.markdown() if options.markdown else json.dumps(schema.json_schema(), indent=2))


def _show(options: argparse.Namespace) -> None:
    print(config.dump(config.load(options.config, options.overrides)), end="")


def _validate(options: argparse.Namespace) -> None:
    from ..validation import faults

    found = faults(options.config, options.overrides)
    for line in found:
        print(f"jpeft: error: {line}", file=sys.stderr)
    if found:
        raise SystemExit(1)
    print(f"{options.config} can be run")


def _recipes(options: argparse.Namespace) -> None:
    from .. import recipes

    if options.recipe is None:
        for name, purpose in recipes.listed().items():
            print(f"{name}\n    {purpose}")
        return
    text = recipes.text(options.recipe)
    if options.file is None:
        print(text, end="")
        return
    with Path(options.file).open("x", encoding="utf-8") as file:
        file.write(text)
    print(f"copied to {options.file}")
