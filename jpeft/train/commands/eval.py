# SPDX-License-Identifier: Apache-2.0
"""`jpeft eval`: loss and metrics of a model on files, or by a task with prompts and metrics of its own."""

import argparse

from .. import config, testing
from ._arguments import names_model, no_text, takes_length

HELP = "loss and metrics of a model on a file, or by a task"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the rows."""
    names_model(parser)
    parser.add_argument("--data", nargs="+", metavar="FILE", help=".jsonl, .csv ...; or a folder of images by class")
    parser.add_argument("--text", metavar="COLUMN", help="column of the text (text or sentence)")
    parser.add_argument("--label", metavar="COLUMN", help="column of the label (label)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows at a time (32)")
    takes_length(parser)
    testing.add_options(parser)


def run(options: argparse.Namespace) -> None:
    """Prints what was read, and a line for each metric."""
    if options.task is None and not options.data:
        raise config.ConfigError("jpeft eval takes a file (--data), or a task (--task)")
    if options.batch_size < 1:
        raise config.ConfigError(f"--batch-size is 1 or more, got {options.batch_size}")
    if options.max_length is not None and options.max_length < 1:
        raise config.ConfigError(f"--max-length is 1 or more, got {options.max_length}")
    testing.refuse_unused(options)
    from .. import compilation

    compilation.keep_programs()
    if options.task is not None:
        testing.run(options)
        return
    from ... import partition
    from .. import data, saved
    from ..evaluate import Evaluator

    opened = saved.open_model(options.model, options.adapter)
    if opened.model.task in config.SEEING:
        no_text(options, "text", "max_length")
    names = saved.label_names(opened) if opened.model.task in config.CLASSIFYING else None
    length = options.max_length or opened.info.max_length or 128
    what = config.Data(train=tuple(options.data), text=options.text, label=options.label, max_length=length)
    rows = data.read_rows(what, opened.model.task, "train")
    examples = data.encode(rows, what, opened.reader, names)
    feed = data.evaluated(what, examples, options.batch_size, opened.reader)
    print(examples)
    graphdef, trainable, frozen = partition(opened.model)
    for name, value in Evaluator(graphdef, opened.model.task)(trainable, frozen, feed).metrics.items():
        print(f"{name} {value:.6f}")
