# SPDX-License-Identifier: Apache-2.0
"""`jpeft generate`: what a language model writes after a prompt."""

import argparse
import sys

from ..config import ConfigError
from ._arguments import names_model
from ._sampling import rules, show, takes_rules

HELP = "go on with prompts given here, or on standard input"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the prompts, and how tokens are chosen."""
    names_model(parser)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="none reads a prompt a line from standard input")
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is a message in the adapter's or model's chat template"
    )
    takes_rules(parser)
    parser.add_argument(
        "--num-return-sequences", type=int, metavar="N", help="texts for each prompt, drawn or searched"
    )
    parser.add_argument("--num-beams", type=int, metavar="N", help="search among N partial texts")
    parser.add_argument("--length-penalty", type=float, metavar="X", help="of a search: above 0 favours long texts (1)")
    parser.add_argument("--early-stopping", choices=("true", "false", "never"), help="of a search (false)")


def run(options: argparse.Namespace) -> None:
    """Prints what follows each prompt; of one text for one prompt, as it is written."""
    prompts = options.prompts or [line.rstrip("\n") for line in sys.stdin]
    if not prompts:
        raise ConfigError("give a prompt, or lines on standard input")
    import jax

    from .. import compilation, saved, templates, tokenizer
    from ..writer import Writer

    compilation.keep_programs()
    opened = saved.open_model(options.model, options.adapter)
    writer = Writer(opened.model, opened.tokenizer, tokenizer.ends(opened.base, opened.tokenizer))
    if options.chat:
        ids = templates.asked(prompts, opened.tokenizer, opened.template)
    else:
        ids = opened.tokenizer.encode(prompts)
    chosen = {**rules(options), "key": jax.random.key(options.seed), "stop": options.stop}
    if len(prompts) == 1 and "num_beams" not in chosen and "num_return_sequences" not in chosen:
        show(piece for ((piece,),) in writer.stream(ids, **chosen))
        return
    for prompt, texts in zip(prompts, writer.write_on(ids, **chosen), strict=True):
        for text in texts:
            print(f"==> {prompt} <==\n{text}")
