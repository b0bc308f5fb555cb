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

#: The tasks whose logits are of a row as a whole.
ONE_PER_ROW = ("SEQ_CLS", "IMAGE_CLS", "MULTIPLE_CHOICE")
#: Rows and tokens of a random sample.
_RANDOM = (2, 32)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What two models are compared on.

    Attributes:
      inputs: what the models read: tokens `[rows, seq]` or `[rows, choices, seq]`, images, or sounds.
      attention_mask: of tokens' shape; None for models that read none.
      told: what they are, in words.
      decoder_input_ids: `[rows, seq]`; None where there is no decoder, or it reads `inputs` behind its start token.
    """

    inputs: np.ndarray
    attention_mask: Int[np.ndarray, "rows *seq"] | None
    told: str
    decoder_input_ids: Int[np.ndarray, "rows seq"] | None = None


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
    """Two rows of what the model reads, always the same of one model: at most 32 tokens of the whole vocabulary."""
    embeddings = [module for _, module in nnx.iter_modules(model) if isinstance(module, InputEmbedding)]
    rows, seq = _RANDOM
    seq = min([seq, *(module.max_positions for module in embeddings if module.max_positions is not None)])
    rng = np.random.default_rng(0)

    def tokens(*shape: int) -> np.ndarray:
        return rng.integers(0, model.config.vocab_size, shape, dtype=np.int32)

    if hasattr(model, "input_shape"):
        told = f"{rows} rows of random numbers"
        numbers = rng.standard_normal((rows, *model.input_shape)).astype(np.float32)
        return Sample(numbers, None, told, tokens(rows, seq) if hasattr(model, "encode") else None)
    shape = (rows, 2, seq) if model.task == "MULTIPLE_CHOICE" else (rows, seq)
    return Sample(tokens(*shape), np.ones(shape, np.int32), f"{rows} rows of {seq} random tokens")


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
    mask = sample.attention_mask
    if mask is not None and not mask.reshape(len(mask), -1).any(1).all():
        raise ValueError(f"a row of the sample ({sample.told}) holds no token")
    moved, largest, divergences, same = 0.0, 0.0, [], []
    runs = [_compiled(before), _compiled(after)]
    for row in range(len(sample.inputs)):
        batch = _row(sample, row)
        one, other = (_distributions(run(*batch), batch[1], before.task) for run in runs)
        if not (np.isfinite(one).all() and np.isfinite(other).all()):
            raise ValueError(f"outputs on the sample ({sample.told}) are not finite, so they cannot be compared")
        moved, largest = max(moved, np.abs(one - other).max()), max(largest, np.abs(one).max())
        divergences.append(_divergence(one, other))
        same.append(one.argmax(-1) == other.argmax(-1))
    kl, agreement = np.concatenate(divergences), np.concatenate(same)
    told = (None, None) if before.task == "FEATURE_EXTRACTION" else (float(kl.mean()), float(agreement.mean()))
    return Drift(float(moved), float(largest), *told, len(kl), sample.told)


def _row(sample: Sample, row: int) -> tuple[Any, Any, Any]:
    """Inputs, mask and decoder's tokens of one row, with its axis."""
    arrays = (sample.inputs, sample.attention_mask, sample.decoder_input_ids)
    inputs, mask, decoder = (None if array is None else array[row : row + 1] for array in arrays)
    return inputs, mask, decoder


def _compiled(model: Any) -> Any:
    """(inputs, mask, decoder_input_ids) -> outputs."""
    graphdef, trainable, frozen = partition(model)

    @jax.jit
    def run(trainable: Any, frozen: Any, inputs: Any, mask: Any, decoder: Any) -> jax.Array:
        model = combine(graphdef, trainable, frozen)
        if not hasattr(model, "encode"):
            return model(inputs, mask)
        if decoder is not None:
            return model(inputs, mask, decoder_input_ids=decoder)
        return model(inputs, mask, decoder_input_ids=model.decoder_inputs(inputs), decoder_attention_mask=mask)

    return lambda *batch: np.asarray(run(trainable, frozen, *batch))


def _distributions(outputs: Float[np.ndarray, "1 *axes"], mask: Any, task: str) -> Float[np.ndarray, "count classes"]:
    """A row's outputs as the logits of distributions; those of padding are left out."""
    values = outputs[0].astype(np.float64)
    if task in ONE_PER_ROW:
        return values[None]
    values = values if mask is None else values[mask[0] != 0]
    return values.T if task == "QUESTION_ANS" else values


def _divergence(
    one: Float[np.ndarray, "count classes"], other: Float[np.ndarray, "count classes"]
) -> Float[np.ndarray, " count"]:
    """KL(p || q) of every pair of distributions, given their logits."""
    log_p, log_q = (x - x.max(-1, keepdims=True) for x in (one, other))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)
