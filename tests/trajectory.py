# SPDX-License-Identifier: Apache-2.0
"""The same training twice, in jpeft and in torch: AdamW from the same numbers on the same batches, loss by loss."""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import peft_oracle as oracle
import torch
from contracts.table import QUICK

import jpeft
from jpeft.train.losses import IGNORED, SUMS
from jpeft.train.step import advance, begin

UPDATES = 20
#: Of both optimizers. An eps well above the rounding of a gradient: an entry that has none but that (a key's bias,
#: which a softmax does not see) would be moved by a whole rate in the direction of the rounding.
BETAS, EPS, DECAY = (0.9, 0.999), 1e-4, 0.05

Batch = Mapping[str, np.ndarray]


def golden_rate(training: Any) -> float:
    """The rate of a golden training, told of in JSON; all else of it must be as it is here."""
    told = json.loads(str(training))
    rate = told.pop("rate")
    assert told == {"updates": UPDATES, "betas": [*BETAS], "eps": EPS, "decay": DECAY}
    return rate


class Twins(NamedTuple):
    """One adapted model in jpeft and in torch, with the same numbers.

    Attributes:
      model: jpeft's.
      other: torch's, which is trained in its place.
      errors: (jpeft's trained leaves) -> relative distance of each from torch's parameters as they are now.
    """

    model: Any
    other: Any
    errors: Callable[[Any], Mapping[str, float]]


def batches(task: str) -> list[Batch]:
    """Two of them, `[5, 9]`, padded on the right and on the left, with a label for every row or token.

    But for the first token of a language model: behind virtual tokens peft trains it too, as what they predict, and
    jpeft none that no text stands before.
    """
    rng = np.random.default_rng(11)
    lengths = np.array([[9, 4, 7, 9, 2], [6, 9, 3, 8, 5]])
    found = []
    for length, on_the_left in zip(lengths, (False, True), strict=True):
        mask = np.arange(9) < length[:, None]
        mask = mask[:, ::-1] if on_the_left else mask
        ids = np.where(mask, rng.integers(1, 48, mask.shape), 0)
        labels = rng.integers(0, 3, 5) if task == "SEQ_CLS" else np.where(mask, ids, IGNORED)
        if task == "SEQ_2_SEQ_LM":
            labels = labels[:, ::-1]
        if task == "CAUSAL_LM":
            labels[:, 0] = IGNORED
        found.append({"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels})
    return found


def cycled(all_batches: Iterable[Batch]) -> Iterator[Batch]:
    """One for each update."""
    return itertools.islice(itertools.cycle(all_batches), UPDATES)


def train(model: Any, all_batches: Iterable[Batch], rate: float, *selectors: str, sums: Any = None) -> Any:
    """(losses before each update, leaves after the last) of jpeft's own update.

    Args:
      selectors: the leaves that are trained, as of `jpeft.optimizer`; none for all.
      sums: as of `make_step`; None for the model's task's.
    """
    graphdef, trainable, frozen = jpeft.partition(model)
    adamw = optax.adamw(rate, *BETAS, eps=EPS, weight_decay=DECAY)
    tx = jpeft.optimizer(adamw, *selectors, model=graphdef)
    sums = sums or SUMS[model.task]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(state: Any, frozen: Any, batch: Any) -> Any:
        def of_one(trainable: Any, batch: Any, key: Any) -> Any:
            return sums(jpeft.combine(graphdef, trainable, frozen), batch, key, 1)

        def penalty(leaves: Any) -> Any:
            return jpeft.penalty(jpeft.combine(graphdef, leaves, frozen))

        return advance(of_one, tx, state, batch, None, penalty)

    state, losses = begin(tx, trainable), []
    for batch in cycled(all_batches):
        state, metrics = step(state, frozen, {name: value[None] for name, value in batch.items()})
        losses.append(float(metrics.loss))
    return np.array(losses), jax.tree.map(np.asarray, state.trainable)


def train_torch(model: Any, all_batches: Iterable[Batch], rate: float) -> np.ndarray:
    """The losses that transformers computes before each update."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, BETAS, EPS, weight_decay=DECAY)
    losses = []
    with oracle.quiet():
        for batch in cycled(all_batches):
            optimizer.zero_grad()
            loss = model(**{name: torch.tensor(value.copy()) for name, value in batch.items()}).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return np.array(losses)
