# SPDX-License-Identifier: Apache-2.0
"""`jpeft predict`: the labels of sentences, of their words, or of images."""

import argparse
import sys

from ..config import ConfigError
from ._arguments import names_model, no_text, takes_length

HELP = "classify sentences, or image files, given here or on standard input"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the sentences or files."""
    names_model(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="sentences, or image files; none reads lines")
    takes_length(parser)


def run(options: argparse.Namespace) -> None:
    """Prints label, probability and text, a line each; of a model for `TOKEN_CLS` every word and its tag.

    Of a model for `IMAGE_CLS` the texts are names of image files.
    """
    texts = options.texts or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise ConfigError("give a sentence or an image file to classify, or lines on standard input")
    from .. import compilation, saved, seeing
    from ..evaluate import predict
    from ..tagging import tag

    compilation.keep_programs()
    opened = saved.open_model(options.model, options.adapter)
    names = saved.label_names(opened)
    if opened.model.task == "IMAGE_CLS":
        no_text(options, "max_length")
        for found in seeing.classify(opened.model, opened.processor, texts, names):
            print(f"{found.label}\t{found.probability:.4f}\t{found.text}")
        return
    length = options.max_length or opened.info.max_length or 128
    if opened.model.task == "TOKEN_CLS":
        for tagged in tag(opened.model, opened.tokenizer, texts, names, max_length=length):
            print(" ".join(f"{word}/{name or '?'}" for word, name in tagged))
        return
    for found in predict(opened.model, opened.tokenizer, texts, names, max_length=length):
        print(f"{found.label}\t{found.probability:.4f}\t{found.text}")
