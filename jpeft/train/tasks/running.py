# SPDX-License-Identifier: Apache-2.0
"""A model measured by a task: figures with intervals, and a record of all that is needed to measure it again."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import config, readers, templates, tokenizer
from ..compare.judge import judge
from ..compare.outcomes import Classes, Texts
from ..data import Part, batches_by, encode, evaluated, told
from ..formats import find
from ..pictures import Pictures
from ..records import Bad, DataError
from ..saved import Opened, label_names
from ..scoring import classes
from ..scoring.intervals import Estimate, bootstrap
from ..sections.data import Source
from ..sections.model import SEEING
from ..sources import Opened as Rows
from ..sources import holds_rows, open_source
from ..writer import Writer
from .kinds import Classify, Likelihood, Row, Scored, Write
from .settings import Settings

_VERSIONS = ("jpeft", "jax", "jaxlib", "flax", "numpy", "tokenizers", "math-verify", "sacrebleu", "rouge-score")

#: Options of tasks that write.
_WRITING = ("shots", "shots_from", "samples", "temperature", "top_p", "max_new_tokens", "chat")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came of it.

    Attributes:
      metrics: figures with intervals.
      record: everything else, as plain values: data, options, versions, and what became of each row.
      values: of written texts, as of `Scored`.
    """

    metrics: dict[str, Estimate]
    record: dict[str, Any]
    values: dict[str, list[float]] = dataclasses.field(default_factory=dict)


def measure(name: str, task: Any, opened: Opened, settings: Settings) -> Measured:
    """Measures a model by a task.

    Raises:
      ValueError: the model is for another kind of task, or an option is for another.
      DataError, FileNotFoundError: the data is not there, or not right.
    """
    kinds = {Write: ("CAUSAL_LM", "SEQ_2_SEQ_LM"), Likelihood: ("CAUSAL_LM",)}
    wanted = (task.task,) if isinstance(task, Classify) else kinds[type(task)]
    if opened.model.task not in wanted:
        raise ValueError(
            f"the task {name} needs a model for {' or '.join(wanted)}; this one is for {opened.model.task}"
        )
    unused = settings.changed(*(("max_length",) if isinstance(task, Write) else _WRITING))
    if unused:
        does = "writes, and reads whole prompts" if isinstance(task, Write) else "writes nothing"
        raise ValueError(f"the task {name} {does}, so it has no use for {', '.join(unused)}; leave it out")
    run = {Classify: _classify, Write: _write, Likelihood: _likelihood}[type(task)]
    found = run(task, opened, settings)
    record = {
        "task": name,
        "model": opened.name,
        "settings": dataclasses.asdict(settings),
        "versions": {"python": platform.python_version(), **{v: _version(v) for v in _VERSIONS}},
        "devices": [str(device) for device in jax.devices()],
        f"{readers.called(opened.reader)}_sha256": opened.reader.digest,
        "published": task.published,
        "metrics": {key: value._asdict() for key, value in found.metrics.items()},
        **found.record,
    }
    return Measured(found.metrics, record, found.values)


def _classify(task: Classify, opened: Opened, settings: Settings) -> Measured:
    sees = task.task in SEEING
    if sees and settings.max_length is not None:
        raise ValueError(f"max_length={settings.max_length} is of texts, and this task is of images")
    rows = _opened(task.source, settings.data, settings.limit, images=sees)
    length = settings.max_length or opened.info.max_length or 128
    options = config.Data(train=rows.source.path) if sees else config.Data(train=rows.source.path, max_length=length)
    columns = {part: name for part, name in task.columns.items() if name in rows.columns}
    form = find(rows.columns, task.task, columns, task.form, rows.source.path)
    theirs = label_names(opened)
    part = Part(rows, form)
    names = task.names or told(part) or theirs
    order = _order(names, theirs)
    examples = encode([part], options, opened.reader, names)
    outcome = judge(opened.model, evaluated(options, examples, settings.batch_size, opened.reader))
    assert isinstance(outcome, Classes)
    predicted = np.asarray(order)[outcome.predicted]
    found = classes.report(outcome.truth.tolist(), predicted.tolist(), names, seed=settings.seed)
    record = {
        "data": _known(rows, len(examples)),
        "columns": dict(form.columns),
        **({} if isinstance(examples, Pictures) else {"max_length": length, "truncated_rows": examples.truncated}),
        "by_class": found.by_class,
        "majority": found.majority,
        "collapsed": found.collapsed,
        "predicted": [names[i] for i in predicted],
    }
    return Measured(found.metrics, record)


def _write(task: Write, opened: Opened, settings: Settings) -> Measured:
    rows = _opened(task.source, settings.data, settings.limit)
    found = [_row(task, record.values, record.where) for record in _good(rows)]
    shots, shown = _shots(task, settings)
    prompts = [shots + task.prompt.format_map(row) for row in found]
    ids = _encoded(opened, prompts, settings.chat)
    longest = settings.max_new_tokens or task.max_new_tokens
    texts = _written(task, opened, ids, longest, settings)
    scored: Scored = task.score(found, texts, settings.seed)
    limit = getattr(opened.model.config, "max_position_embeddings", None)
    record = {
        "data": _known(rows, len(found)),
        "prompt": task.prompt,
        "shots": shown,
        "extractor": task.extractor,
        "generation": {
            "max_new_tokens": longest,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "samples": settings.samples,
            "stop": task.stop,
            "seed": settings.seed,
        },
        "beyond_positions": None if limit is None else sum(len(row) + longest > limit for row in ids),
        **scored.notes,
        "examples": [
            {"prompt": prompt, "texts": each, **example}
            for prompt, each, example in zip(prompts, texts, scored.examples, strict=True)
        ],
    }
    return Measured(scored.metrics, record, scored.values)


def _likelihood(task: Likelihood, opened: Opened, settings: Settings) -> Measured:
    rows = _opened(None, settings.data, settings.limit)
    length = settings.max_length or opened.info.max_length or 128
    options = config.Data(train=rows.source.path, max_length=length, longer="split")
    reader = find(rows.columns, "CAUSAL_LM", {}, "text", rows.source.path)
    examples = encode([Part(rows, reader)], options, opened.tokenizer, None)
    batches = batches_by(options, examples, settings.batch_size, opened.tokenizer.pad_id)
    outcome = judge(opened.model, batches)
    assert isinstance(outcome, Texts)
    loss, tokens = outcome.loss, outcome.tokens
    column = reader.columns["text"]
    num_bytes = sum(len(str(record.values[column]).encode()) for record in _good(rows))

    def mean(at: np.ndarray) -> float:
        return float(loss[at].sum() / tokens[at].sum())

    per_token = bootstrap(mean, len(loss), seed=settings.seed)
    bits = loss.sum() / np.log(2) / num_bytes / per_token.value
    metrics = {
        "loss": per_token,
        "perplexity": Estimate(*(float(np.exp(min(value, 700.0))) for value in per_token)),
        "bits_per_byte": Estimate(*(float(value * bits) for value in per_token)),
    }
    record = {
        "data": _known(rows, examples.rows),
        "max_length": length,
        "rows_of_tokens": len(loss),
        "predicted_tokens": int(tokens.sum()),
        "bytes": num_bytes,
        "context": f"texts are cut into rows of {length} tokens, of which the first one is not predicted",
    }
    return Measured(metrics, record)


def _opened(source: Source | None, file: str | None, limit: int | None, *, images: bool = False) -> Rows:
    """The rows of a file, or of a folder of `images`, or of the task's source."""
    if file is None and source is None:
        raise ValueError("this task has no data of its own; name a file by --data")
    chosen = source if file is None else Source(file)
    assert chosen is not None
    if limit is not None:
        if limit < 1:
            raise ValueError(f"--limit is 1 or more, got {limit}")
        if images and Path(chosen.path).is_dir() and not holds_rows(Path(chosen.path)):
            raise ValueError(
                f"--limit takes the first {limit} rows, and the images of {chosen.path} stand class by class, so these "
                "would be of few classes; leave it out, or name a table of images"
            )
        chosen = dataclasses.replace(chosen, split=f"{chosen.split}[:{limit}]")
    try:
        return open_source(chosen, images=images)
    except DataError as error:
        if file is not None:
            raise
        raise DataError(f"{error}. The task's own data is not here: --data names a file with such rows") from error


def _good(rows: Rows) -> Iterator[Any]:
    for row in rows.rows():
        if isinstance(row, Bad):
            raise DataError(str(row))
        yield row


def _known(rows: Rows, count: int) -> dict[str, Any]:
    return {**dataclasses.asdict(rows.source), "sha256": rows.digest, "rows": count}


def _order(names: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """The task's class for every output of a model, by name, or by number where its outputs have no names.

    Raises:
      ValueError: its names are others.
    """
    ours, said = [name.lower() for name in names], [name.lower() for name in theirs]
    if sorted(said) == sorted(ours):
        return [ours.index(name) for name in said]
    if said in ([str(i) for i in range(len(ours))], [f"label_{i}" for i in range(len(ours))]):
        return list(range(len(ours)))
    raise ValueError(f"the task's classes are {', '.join(names)}; the model's are {', '.join(theirs) or 'not named'}")


def _row(task: Write, values: Row, where: str) -> Row:
    try:
        row = task.row(values)
        task.prompt.format_map(row)
    except KeyError as error:
        raise DataError(f"{where}: the task needs a column {error}; there are {', '.join(values)}") from None
    return row


def _shots(task: Write, settings: Settings) -> tuple[str, list[str]]:
    """What stands in front of every prompt, and its parts."""
    if not settings.shots:
        return "", []
    if task.answer is None:
        raise ValueError("the rows of this task have no answer to show, so --shots is 0")
    rows = _opened(task.shots_from, settings.shots_from, settings.shots)
    shown = [_row(task, record.values, record.where) for record in _good(rows)]
    if len(shown) < settings.shots:
        raise DataError(f"{rows.source.path} has {len(shown)} rows to show, not {settings.shots}")
    parts = [(task.prompt + task.answer).format_map(row) for row in shown]
    return "".join(f"{part}\n\n" for part in parts), parts


def _encoded(opened: Opened, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    words = opened.tokenizer
    if not chat:
        return words.encode(prompts)
    return templates.asked(prompts, words, opened.template)


def _written(
    task: Write, opened: Opened, ids: Sequence[list[int]], longest: int, settings: Settings
) -> list[list[str]]:
    """The texts of every prompt. Prompts of like length go together; what is drawn does not depend on the others."""
    writer = Writer(opened.model, opened.tokenizer, tokenizer.ends(opened.base, opened.tokenizer))
    options: dict[str, Any] = {"max_new_tokens": longest, "temperature": settings.temperature, "stop": task.stop}
    if settings.top_p is not None:
        options["top_p"] = settings.top_p
    if settings.samples > 1:
        options["num_return_sequences"] = settings.samples
    key, texts = jax.random.key(settings.seed), [[""] * settings.samples for _ in ids]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for at in range(0, len(order), settings.batch_size):
        rows = order[at : at + settings.batch_size]
        if settings.temperature:
            options["key"] = jax.vmap(lambda row: jax.random.fold_in(key, row))(np.asarray(rows))
        for pieces in writer.stream([ids[row] for row in rows], **options):
            for row, added in zip(rows, pieces, strict=True):
                texts[row] = [text + piece for text, piece in zip(texts[row], added, strict=True)]
    return texts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
