# SPDX-License-Identifier: Apache-2.0
"""`jpeft export`: an adapter for other libraries, or a check of what they can hold of it."""

import argparse
from typing import Any

from ..config import ConfigError
from ._arguments import names_model

HELP = "write an adapter, checked against its base, for PEFT or others"

_FORMATS = ("peft", "adapters", "merged")
_TARGETS = ("peft", "vllm", "adapters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The adapter, and what to do with it."""
    names_model(parser)
    parser.add_argument("--out", metavar="DIR", help="where to; left out, nothing is written")
    parser.add_argument("--format", choices=_FORMATS, default="peft", help="what to write (peft)")
    parser.add_argument("--check", choices=_TARGETS, help="say what this target can hold; exit with 1 if not all")
    parser.add_argument("--lossy", action="store_true", help="write it though something would be lost")


def run(options: argparse.Namespace) -> None:
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
    from ...io import check
    from .. import saved

    opened = saved.open_model(options.model, options.adapter)
    if options.check is not None:
        findings = check(opened.model, options.check)
        print(findings)
        if findings.refused or (findings.lost and not options.lossy):
            raise SystemExit(1)
    if options.out is not None:
        _write(opened, options)


def _write(opened: Any, options: argparse.Namespace) -> None:
    from ...io import check
    from ...io.card import Card
    from .. import saved

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
    saved.save_adapter(
        opened.model, options.out, opened.name, opened.info, Card(), template=saved.template_source(opened)
    )
    print(f"PEFT adapter: {options.out}")
