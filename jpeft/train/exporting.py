# SPDX-License-Identifier: Apache-2.0
"""The commands about folders: `jpeft export` and `jpeft inspect`. Nothing heavy is imported before one runs."""

import argparse
from typing import Any

from .config import ConfigError

_FORMATS = ("peft", "adapters", "merged")
_TARGETS = ("peft", "vllm", "adapters")


def add_parsers(commands: Any) -> None:
    """Puts both commands under `jpeft`."""
    export = commands.add_parser("export", help="write an adapter, checked against its base, for PEFT or others")
    _names_model(export)
    export.add_argument("--out", metavar="DIR", help="where to; left out, nothing is written")
    export.add_argument("--format", choices=_FORMATS, default="peft", help="what to write (peft)")
    export.add_argument("--check", choices=_TARGETS, help="say what this target can hold; exit with 1 if not all")
    export.add_argument("--lossy", action="store_true", help="write it though something would be lost")

    inspect = commands.add_parser("inspect", help="what a folder holds, whether it is whole, and what can be adapted")
    inspect.add_argument(
        "folder", nargs="?", metavar="DIR", help="an adapter, a model or a run; exit with 1 on a fault"
    )
    _names_model(inspect)


def _names_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder; by default the adapter's own base")
    parser.add_argument("--adapter", metavar="DIR", help="folder of PEFT, such as RUN/adapter, or of AdapterHub")


def export(options: argparse.Namespace) -> None:
    """Says what a target can hold of an adapter, writes it, or both.

    Raises:
      ConfigError: no adapter named, or neither --out nor --check.
      ValueError: the format cannot hold it, or would lose something and --lossy was not given.
      SystemExit: with 1, where --check found that not all can be held.
    """
    if options.adapter is None:
        raise ConfigError("name the adapter to export by --adapter")
    if options.out is None and options.check is None:
        raise ConfigError("name the folder to write by --out, or a target to check for by --check")
    from ..io import check
    from . import saved

    opened = saved.open_model(options.model, options.adapter)
    if options.check is not None:
        findings = check(opened.model, options.check)
        print(findings)
        if findings.refused or (findings.lost and not options.lossy):
            raise SystemExit(1)
    if options.out is not None:
        _write(opened, options)


def _write(opened: Any, options: argparse.Namespace) -> None:
    from ..io import check
    from ..io.card import Card
    from . import saved

    if options.format == "merged":
        drift = saved.save_merged(opened, options.out)
        print(f"merged model: {options.out}\nby merging {drift}")
        return
    findings = check(opened.model, options.format)
    if findings.refused:
        raise ValueError("; ".join(findings.refused))
    if findings.lost and not options.lossy:
        raise ValueError(
            f"{options.format} would lose {'; '.join(findings.lost)}. Pass --lossy to write it all the same"
        )
    if options.format == "adapters":
        saved.save_for_adapters(opened, options.out)
        print(f"AdapterHub adapter: {options.out}")
        return
    saved.save_adapter(opened.model, options.out, opened.name, opened.info, Card())
    print(f"PEFT adapter: {options.out}")


def inspect(options: argparse.Namespace) -> None:
    """Prints what a folder holds with its faults, or what a model is made of.

    Raises:
      SystemExit: with 1, where a folder has faults.
    """
    from . import inspection

    if options.folder is None:
        print(inspection.describe(options.model, options.adapter))
        return
    if options.adapter is not None:
        raise ConfigError("name one folder to inspect: DIR verifies it, --adapter describes it on its base")
    contents = inspection.verified(options.folder, options.model)
    print(contents)
    if contents.faults:
        raise SystemExit(1)
