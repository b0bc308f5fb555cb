# SPDX-License-Identifier: Apache-2.0
"""How long a model takes to answer, with its adapters beside the base and merged into it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..._adapt import merge
from ..._partition import combine, partition
from ..sections.model import SEEING

#: Timed calls, of which the median is taken, and tokens that are written to time one.
REPEATS = 7
TOKENS = 16


def latencies(model: Any, length: int) -> dict[str, float | None]:
    """Milliseconds of one row of `length` tokens, or of one image: `adapted` and `merged` for a whole forward pass (a
    language model's reading of a prompt), `decode` and `merged_decode` for each token that follows it; None where it
    cannot be merged, and where a busy machine hides what a token takes.
    """
    try:
        plain = merge(model)
    except ValueError:
        plain = None
    found: dict[str, float | None] = {}
    for name, one in (("adapted", model), ("merged", plain)):
        found[name] = None if one is None else _forward(one, length)
    if model.task == "CAUSAL_LM":
        found["decode"] = _decode(model, length)
        found["merged_decode"] = None if plain is None else _decode(plain, length)
    return found


def _forward(model: Any, length: int) -> float:
    graphdef, trainable, frozen = partition(model)
    run = jax.jit(lambda trainable, frozen, row: combine(graphdef, trainable, frozen)(row))
    row = _image(model) if model.task in SEEING else _ids(model, length)
    return _timed(lambda: jax.block_until_ready(run(trainable, frozen, row)))


def _decode(model: Any, length: int) -> float | None:
    """From the times of two generations of different length: what is read and set up is in both.

    None where the longer one took less time: that is what else the machine did, and no time of a token.
    """
    from ...models import generate

    ids = _ids(model, max(1, length - 2 * TOKENS))  # so that what is written has positions too
    short, long = (_timed(lambda n=n: np.asarray(generate(model, ids, max_new_tokens=n))) for n in (1, 1 + TOKENS))
    return (long - short) / TOKENS if long > short else None


def _ids(model: Any, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, model.config.vocab_size, (1, length)).astype(np.int32)


def _image(model: Any) -> np.ndarray:
    shape = (1, model.config.num_channels, *model.config.image)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _timed(call: Callable[[], Any]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
