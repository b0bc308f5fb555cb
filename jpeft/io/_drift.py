# SPDX-License-Identifier: Apache-2.0
"""How far a model's outputs are from another's, on a stated sample: what a merge has changed."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from .._partition import combine, partition
from ..seams import InputEmbedding

#: Rows and tokens of a random sample.
_RANDOM = (2, 32)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Tokens to compare two models on.

    Attributes:
      input_ids, attention_mask: `[rows, seq]`.
      told: what they are, in words.
    """

    input_ids: Int[np.ndarray, "rows seq"]
    attention_mask: Int[np.ndarray, "rows seq"]
    told: str


@dataclasses.dataclass(frozen=True)
class Drift:
    """What `measure_drift` gives; printed, a line.

    Attributes:
      logit: the largest difference of a logit.
      largest: the largest logit of the model before, by magnitude.
      kl: the mean of KL(before || after), in nats, over the distributions that the logits are; None of states.
      agreement: the share of these distributions whose most probable class is the same; None likewise.
      count: how many distributions there are: one per token, per row of a classifier, two per row of an extractor of
        answers.
      sample: what they were measured on, in words.
    """

    logit: float
    largest: float
    kl: float | None
    agreement: float | None
    count: int
    sample: str

    def __str__(self) -> str:
        moved = f"a logit moved by at most {self.logit:.3g} (they go up to {self.largest:.3g})"
        if self.kl is None or self.agreement is None:
            return f"{moved.replace('logit', 'state')}; on {self.sample}"
        same = round(self.agreement * self.count)
        return f"{moved}, KL {self.kl:.3g} nats, same argmax in {same:,} of {self.count:,}; on {self.sample}"


def random_sample(model: Any) -> Sample:
    """Two rows of at most 32 tokens, drawn from the whole vocabulary: always the same of one model."""
    inputs = [module for _, module in nnx.iter_modules(model) if isinstance(module, InputEmbedding)]
    rows, seq = _RANDOM
    seq = min([seq, *(module.max_positions for module in inputs if module.max_positions is not None)])
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, seq), dtype=np.int32)
    return Sample(ids, np.ones_like(ids), f"{rows} rows of {seq} random tokens")


def measure_drift(before: Any, after: Any, sample: Sample | None = None) -> Drift:
    """How far the outputs of `after` are from those of `before`, summed in float64.

    A model with a decoder reads the sample on both sides. Padding does not count.

    Args:
      before, after: models of the zoo for one task, adapted or not.
      sample: `random_sample` of the first by default.

    Raises:
      ValueError: the models are for different tasks; the sample has no token; an output is not finite.

    Example:
      >>> print(jpeft.io.measure_drift(model, jpeft.merge(model)))
    """
    if before.task != after.task:
        raise ValueError(f"models for {before.task} and {after.task} have no outputs to compare")
    sample = random_sample(before) if sample is None else sample
    if not sample.attention_mask.any(1).all():
        raise ValueError(f"a row of the sample ({sample.told}) holds no token")
    moved, largest, divergences, same = 0.0, 0.0, [], []
    runs = [_compiled(before), _compiled(after)]
    for ids, mask in zip(sample.input_ids[:, None], sample.attention_mask[:, None], strict=True):
        one, other = (_distributions(run(ids, mask), mask[0] != 0, before.task) for run in runs)
        if not (np.isfinite(one).all() and np.isfinite(other).all()):
            raise ValueError(f"outputs on the sample ({sample.told}) are not finite, so they cannot be compared")
        moved, largest = max(moved, np.abs(one - other).max()), max(largest, np.abs(one).max())
        divergences.append(_divergence(one, other))
        same.append(one.argmax(-1) == other.argmax(-1))
    kl, agreement = np.concatenate(divergences), np.concatenate(same)
    told = (None, None) if before.task == "FEATURE_EXTRACTION" else (float(kl.mean()), float(agreement.mean()))
    return Drift(float(moved), float(largest), *told, len(kl), sample.told)


def _compiled(model: Any) -> Any:
    """(ids, mask) -> outputs."""
    graphdef, trainable, frozen = partition(model)

    @jax.jit
    def run(trainable: Any, frozen: Any, ids: Any, mask: Any) -> jax.Array:
        model = combine(graphdef, trainable, frozen)
        if hasattr(model, "encode"):
            return model(ids, mask, decoder_input_ids=model.decoder_inputs(ids), decoder_attention_mask=mask)
        return model(ids, mask)

    return lambda ids, mask: np.asarray(run(trainable, frozen, ids, mask))


def _distributions(
    outputs: Float[np.ndarray, "1 *axes"], text: np.ndarray, task: str
) -> Float[np.ndarray, "count classes"]:
    """A row's outputs as the logits of distributions; those of padding are left out."""
    values = outputs[0].astype(np.float64)
    if task == "SEQ_CLS":
        return values[None]
    return values[text].T if task == "QUESTION_ANS" else values[text]


def _divergence(
    one: Float[np.ndarray, "count classes"], other: Float[np.ndarray, "count classes"]
) -> Float[np.ndarray, " count"]:
    """KL(p || q) of every pair of distributions, given their logits."""
    log_p, log_q = (x - x.max(-1, keepdims=True) for x in (one, other))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)
