# SPDX-License-Identifier: Apache-2.0
"""`jpeft advise`: its arguments, and what it prints. JAX is imported when advice is given."""

import argparse
import json
from pathlib import Path

from .needs import KINDS, LATENCIES, Needs, size

_EXAMPLES = """
examples:
  jpeft advise --model llama-2-7b --memory 24GB --examples 800 --task maths
  jpeft advise --model bert-base-uncased --task classification --examples 5000 --latency strict
  jpeft advise --model llama-3-8b --memory 80GB --tenants 200 --storage 4GB --out run.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What advice is asked for."""
    parser.epilog, parser.formatter_class = _EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, metavar="NAME", help="a preset, a Hugging Face folder, a config.json")
    parser.add_argument("--task", choices=KINDS, default="generation", help="(generation)")
    parser.add_argument("--examples", type=int, default=1000, metavar="N", help="to train on (1000)")
    parser.add_argument("--memory", metavar="SIZE", help="of the device that trains, such as 24GB (enough)")
    parser.add_argument(
        "--latency", choices=LATENCIES, default="relaxed", help="strict: no more than the base's (relaxed)"
    )
    parser.add_argument("--tenants", type=int, default=1, metavar="N", help="adapters served on one base (1)")
    parser.add_argument("--storage", metavar="SIZE", help="for all adapters together (enough)")
    parser.add_argument("--keep-base", action="store_true", help="the base must stay as it is")
    parser.add_argument("--batch", type=int, default=16, metavar="ROWS", help="of an update (16)")
    parser.add_argument("--seq", type=int, default=512, metavar="TOKENS", help="of a row (512)")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--out", metavar="FILE", help="writes the best one's configuration")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> None:
    """Prints advice.

    Raises:
      ValueError, OSError: the demands collide, or the model is not known.
    """
    needs = needs_of(options)
    if options.out and Path(options.out).exists():
        raise FileExistsError(f"{options.out} is there already; give --out a new name")
    if options.out and not Path(options.out).parent.is_dir():
        raise FileNotFoundError(f"--out {options.out}: there is no folder {Path(options.out).parent}; make it first")
    import jax

    jax.config.update("jax_platforms", "cpu")  # advice runs nothing, and takes no accelerator from anyone
    from . import report
    from .advice import advise

    found = advise(needs)
    print(json.dumps(report.values(found), indent=2) if options.json else report.lines(found))
    if options.out:
        Path(options.out).write_text(report.configuration(found.choices[0]), encoding="utf-8")


def needs_of(options: argparse.Namespace) -> Needs:
    """What the arguments ask.

    Raises:
      ValueError: one of them cannot be, or two collide.
    """
    return Needs(
        model=options.model,
        task=options.task,
        examples=options.examples,
        memory=None if options.memory is None else size(options.memory),
        latency=options.latency,
        tenants=options.tenants,
        storage=None if options.storage is None else size(options.storage),
        keep_base=options.keep_base,
        batch=options.batch,
        seq=options.seq,
        epochs=options.epochs,
    )
