# SPDX-License-Identifier: Apache-2.0
"""The console script `jpeft`. Arguments are read before anything heavy is imported, so that `--help` is quick."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import config, exporting, writing
from .planning import command as planning

_EXAMPLES = """
examples:
  jpeft train sst2.yaml                                   train as the file says
  jpeft train sst2.yaml optimizer.lr=1e-3 --seed 1        with other values
  jpeft train sst2.yaml --dry-run                         only look: data, shapes, counts
  jpeft predict --adapter runs/sst2/adapter "what a film"
  jpeft generate --model DIR --temperature 0.8 "Once upon a time"
  jpeft chat --model DIR --adapter law=runs/law/adapter   /switch law, /reset, /quit
  jpeft merge --adapter runs/sst2/adapter --out merged    a plain Hugging Face folder
  jpeft export --adapter runs/sst2/adapter --check vllm   what a target can hold of it
  jpeft inspect runs/sst2                                 what a folder holds, and its faults
  jpeft plan --model llama-2-7b --batch 8 --remat full --topology v5e-8   will it fit?
  jpeft push runs/sst2/adapter my-name/sst2 --private     on the hub
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `jpeft`; an error of the user's is one line and exit code 2, a run that had to stop exits with 1."""
    options, rest = _parser().parse_known_args(_as_overrides(sys.argv[1:] if arguments is None else arguments))
    try:
        if options.command == "train":
            options.overrides += rest  # those that stand behind an option
        elif rest:
            raise config.ConfigError(f"jpeft {options.command} does not know {' '.join(rest)}; see --help")
        _COMMANDS[options.command](options)
    except (ValueError, OSError, ImportError) as error:
        if options.traceback:
            raise
        print(f"jpeft: error: {_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        if options.traceback:
            raise
        print(f"jpeft: stopped: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jpeft",
        description="Parameter-efficient fine-tuning in JAX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="fine-tune as a YAML file says")
    train.add_argument("config", help="YAML file; the recipes are in jpeft/train/recipes")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optimizer.lr=1e-3")
    train.add_argument("--seed", metavar="N", help="train.seed")
    train.add_argument("--out", metavar="DIR", help="out: the run's folder")
    train.add_argument("--mesh", metavar="AXES", help="mesh: such as data=2,fsdp=2,tensor=2")
    train.add_argument("--distributed", metavar="WHERE", help="host:port,num_processes,process_id; or auto")
    train.add_argument("--dry-run", action="store_true", help="read the data, count, and stop")
    train.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")

    evaluate = commands.add_parser("eval", help="loss and metrics of a model on a file")
    _names_model(evaluate)
    evaluate.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help=".jsonl, .json, .csv, .parquet, .txt"
    )
    evaluate.add_argument("--text", default="text", metavar="COLUMN", help="column of the text (text)")
    evaluate.add_argument("--label", default="label", metavar="COLUMN", help="column of the label (label)")
    evaluate.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows at a time (32)")
    _takes_length(evaluate)

    predict = commands.add_parser("predict", help="classify sentences given here, or on standard input")
    _names_model(predict)
    predict.add_argument("texts", nargs="*", metavar="TEXT", help="sentences; none reads lines from standard input")
    _takes_length(predict)

    writing.add_parsers(commands)

    merge = commands.add_parser("merge", help="write base and adapter as one Hugging Face folder")
    _names_model(merge)
    merge.add_argument("--out", required=True, metavar="DIR")
    merge.add_argument("--text", metavar="FILE", help="what merging changes is measured on its first 64 lines")

    exporting.add_parsers(commands)
    planning.add_parser(commands)

    push = commands.add_parser("push", help="put an adapter or a model on the hub")
    push.add_argument("folder", metavar="FOLDER", help="such as RUN/adapter")
    push.add_argument("name", metavar="ORG/NAME", help="repository, made if need be")
    push.add_argument("--private", action="store_true", help="one that others do not see")
    push.add_argument("--revision", metavar="BRANCH", help="made if need be (main)")
    push.add_argument("--message", metavar="TEXT", help="of the commit")

    demo = commands.add_parser("demo", help="fine-tune a real encoder on Python's own docstrings")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="folder (runs/demo)")

    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _names_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", help="Hugging Face folder or ORG/NAME; by default the adapter's own base"
    )
    parser.add_argument("--adapter", metavar="DIR", help="PEFT folder such as RUN/adapter, or ORG/NAME")


def _takes_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a text (as in training, else 128)")


def _train(options: argparse.Namespace) -> None:
    given = {"train.seed": options.seed, "out": options.out, "mesh": options.mesh and f'"{options.mesh}"'}
    settings = config.load(
        options.config, options.overrides + [f"{key}={value}" for key, value in given.items() if value is not None]
    )
    _quiet_tokenizers()
    from . import devices, folder, loop

    devices.start_processes(options.distributed)
    if options.dry_run:
        print(loop.dry_run(settings))
        return
    if options.overwrite and devices.is_main():
        folder.remove_run(settings.out)
    loop.train(settings)


def _eval(options: argparse.Namespace) -> None:
    _quiet_tokenizers()
    from .. import partition
    from . import data, saved
    from .evaluate import Evaluator

    opened = saved.open_model(options.model, options.adapter)
    names = saved.label_names(opened) if opened.model.task == "SEQ_CLS" else None
    length = options.max_length or opened.info.max_length or 128
    what = config.Data(train=tuple(options.data), text=options.text, label=options.label, max_length=length)
    rows = data.read_rows(what, opened.model.task, "train")
    examples = data.encode(rows, what, opened.tokenizer, names)
    batches = data.make_batches(
        examples,
        batch_size=options.batch_size,
        accumulation=1,
        max_length=length,
        num_widths=what.num_widths,
        pad_id=opened.tokenizer.pad_id,
    )
    print(examples)
    graphdef, trainable, frozen = partition(opened.model)
    for name, value in Evaluator(graphdef, opened.model.task)(trainable, frozen, batches).metrics.items():
        print(f"{name} {value:.6f}")


def _predict(options: argparse.Namespace) -> None:
    texts = options.texts or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise config.ConfigError("give a sentence to classify, or lines on standard input")
    _quiet_tokenizers()
    from . import saved
    from .evaluate import predict

    opened = saved.open_model(options.model, options.adapter)
    names, length = saved.label_names(opened), options.max_length or opened.info.max_length or 128
    for found in predict(opened.model, opened.tokenizer, texts, names, max_length=length):
        print(f"{found.label}\t{found.probability:.4f}\t{found.text}")


def _generate(options: argparse.Namespace) -> None:
    _quiet_tokenizers()
    writing.generate(options)


def _chat(options: argparse.Namespace) -> None:
    _quiet_tokenizers()
    writing.chat(options)


def _merge(options: argparse.Namespace) -> None:
    from . import saved

    if options.adapter is None:
        raise config.ConfigError("name the adapter to merge by --adapter")
    drift = saved.save_merged(saved.open_model(options.model, options.adapter), options.out, options.text)
    print(f"merged model: {options.out}\nby merging {drift}")


def _push(options: argparse.Namespace) -> None:
    from ..io import push

    address = push(
        options.folder, options.name, private=options.private, revision=options.revision, message=options.message
    )
    print(f"on the hub: {address}")


def _demo(options: argparse.Namespace) -> None:
    _quiet_tokenizers()
    from . import demo

    demo.run(Path(options.out))


_COMMANDS = {
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "generate": _generate,
    "chat": _chat,
    "merge": _merge,
    "export": exporting.export,
    "inspect": exporting.inspect,
    "plan": planning.run,
    "push": _push,
    "demo": _demo,
}


def _as_overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--a.b=c` and `--a.b c` written as the override `a.b=c`."""
    out: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and "." in name:
            out.append(f"{name[2:]}={value if equals else next(rest, '')}")
        else:
            out.append(argument)
    return out


def _line(error: BaseException) -> str:
    """An error's message, with what is missing where an import failed."""
    if isinstance(error, ImportError):
        return f"{error}; install the program's own requirements: pip install 'jpeft[train]'"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def _quiet_tokenizers() -> None:
    """Spares the warning about forking that `tokenizers` prints under `datasets`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
