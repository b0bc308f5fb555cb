# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands take."""

import argparse

from ..config import ConfigError


def names_model(parser: argparse.ArgumentParser) -> None:
    """--model and --adapter, of which one or both are given."""
    parser.add_argument(
        "--model", metavar="DIR", help="Hugging Face folder or ORG/NAME; by default the adapter's own base"
    )
    parser.add_argument("--adapter", metavar="DIR", help="PEFT folder such as RUN/adapter, or ORG/NAME")


def takes_length(parser: argparse.ArgumentParser) -> None:
    """--max-length."""
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a text (as in training, else 128)")


def no_text(options: argparse.Namespace, *names: str) -> None:
    """Refuses options that are for texts, where a model reads images.

    Raises:
      ConfigError: one of them is given.
    """
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    if given:
        raise ConfigError(f"this model reads images (IMAGE_CLS); {', '.join(given)} is for models that read texts")


def names_config(parser: argparse.ArgumentParser) -> None:
    """A configuration file, and overrides."""
    parser.add_argument("config", help="YAML file; `jpeft config recipes` lists those that come with jpeft")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optimizer.lr=1e-3")
