# SPDX-License-Identifier: Apache-2.0
"""All that is wrong with a configuration, at once: its keys and values, the method's options, and its files."""

from collections.abc import Sequence
from pathlib import Path

from . import config as configuration
from .config import Config, ConfigError


def faults(path: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """What is wrong, a line each; an empty list is a configuration that can be run as far as can be told unread.

    Raises:
      FileNotFoundError, ConfigError: the file is absent, or no YAML.
    """
    tree, found, config = configuration.read(path, overrides), [], None
    try:
        config = configuration.parse(tree)
    except ConfigError as error:
        found += str(error).splitlines()
    options = tree.get("method", {"kind": "lora"})
    if isinstance(options, (dict, list)) and all(isinstance(part, dict) for part in _several(options)):
        try:
            configuration.method(options)
        except ConfigError as error:
            found += str(error).splitlines()
    return found if config is None else found + _absent(config)


def _several(options: dict | list) -> list:
    return options if isinstance(options, list) else [options]


def _absent(config: Config) -> list[str]:
    """The model's folder and the data's files, where the configuration names such and they are not there."""
    from ..models._hub import is_id

    found = []
    model = config.model.path
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            found.append(f"model.path: {model} holds no config.json")
    elif not is_id(model):
        found.append(f"model.path: no folder {model}, and it is no id on the hub, ORG/NAME")
    for key in ("train", "eval"):
        given = getattr(config.data, key)
        for source in given if isinstance(given, tuple) else (given,):
            file = source if isinstance(source, str) else source.path
            if Path(file).suffix in _SUFFIXES and not Path(file).is_file():
                found.append(f"data.{key}: no data file {file}")
    return found


_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
