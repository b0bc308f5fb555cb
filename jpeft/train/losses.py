# SPDX-License-Identifier: Apache-2.0
"""The losses of fine-tuning, one per task: functions of a model and a batch, for any `jax.grad`.

A batch holds what the model reads and `labels`: `input_ids` `[batch seq]`, or the `pixel_values` of images or the
`input_features` of sounds; and it may hold `attention_mask`, `token_type_ids`, `segment_ids` and `positions`. A label
of -100 is ignored, so a row or a token of padding weighs nothing. Every loss is a mean over the labels that count;
`SUMS` gives sum and count apart, for means over several batches.

  CAUSAL_LM        labels `[batch seq]`, the tokens themselves: position t is to predict label t + 1 (as transformers
                   does)
  SEQ_CLS          labels `[batch]`; IMAGE_CLS likewise
  TOKEN_CLS        labels `[batch seq]`, not shifted
  QUESTION_ANS     labels `[batch 2]`, first and last token of the answer; the mean over both
  MULTIPLE_CHOICE  labels `[batch]`, which of the choices is right; what the model reads is `[batch choices seq]`
  SEQ_2_SEQ_LM     labels `[batch out]`, what the decoder is to write; it reads them shifted right from its start token,
                   unless the batch holds `decoder_input_ids` (and may hold `decoder_attention_mask`); beside packed
                   inputs it holds `decoder_segment_ids` `[batch out]`, and `row_segments` `[batch most]`, the segments
                   of every row, whose columns say how many these are at most (`jpeft.max_segments`)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Bool, Float, Int

from .._scope import current, dropout_key, scope
from ._head import IGNORED, PLAIN, Terms, head_log_probs, head_nll, log_probs, nll

Batch = Mapping[str, Any]
Sums = tuple[Float[Array, ""], Float[Array, ""]]
#: The same with sums of further figures, by name.
Measured = tuple[Float[Array, ""], Float[Array, ""], dict[str, jax.Array]]

#: What a model may read.
_READ = ("input_ids", "pixel_values", "input_features")
#: Entries of a batch that a model of the zoo takes beside it and `attention_mask`.
_EXTRAS = ("token_type_ids", "segment_ids", "positions")
#: Those that the decoder beside an encoder takes.
_DECODERS = ("decoder_input_ids", "decoder_attention_mask", "decoder_segment_ids")


def lm_loss(model: Any, batch: Batch, key: jax.Array | None = None) -> Float[Array, ""]:
    """Mean over the labelled tokens of -log p(token | the tokens before it), in nats.

    A model of the zoo computes logits only where a label is. Any other is called as `model(input_ids,
    attention_mask)`, or without a mask where the batch has none, and must return logits `[batch seq vocab]`. The prompt
    of an example is what stands before its first label, unless `jpeft.prompt_tokens` says otherwise.

    Args:
      model: an nnx model, adapted or not.
      batch: see above; labels `[batch seq]`.
      key: turns dropout on.

    Raises:
      ValueError: not one label counts.

    Example:
      >>> loss = lambda trainable: lm_loss(jpeft.combine(graphdef, trainable, frozen), batch)
      >>> grads = jax.grad(loss)(trainable)
    """
    return _mean(lm_sums, model, batch, key)


def cls_loss(model: Any, batch: Batch, key: jax.Array | None = None) -> Float[Array, ""]:
    """Mean over the labelled rows of -log p(label | row); labels `[batch]`. Arguments and errors as of `lm_loss`.

    Of a `MULTIPLE_CHOICE` model a row is all choices of an example, and the label is the right one's number.
    """
    return _mean(cls_sums, model, batch, key)


def token_cls_loss(model: Any, batch: Batch, key: jax.Array | None = None) -> Float[Array, ""]:
    """Mean over the labelled tokens of -log p(label | row); labels `[batch seq]`. Otherwise as `lm_loss`."""
    return _mean(cls_sums, model, batch, key)


def qa_loss(model: Any, batch: Batch, key: jax.Array | None = None) -> Float[Array, ""]:
    """Mean over first and last token of -log p(its position); labels `[batch 2]`. Otherwise as `lm_loss`."""
    return _mean(qa_sums, model, batch, key)


def seq2seq_loss(model: Any, batch: Batch, key: jax.Array | None = None) -> Float[Array, ""]:
    """Mean over the labelled tokens of -log p(token | input, the tokens before it); labels `[batch out]`.

    The prompt of the decoder, by which methods go that act on the ends of a prompt, is what it reads up to its first
    label: the start token, as in generation. Other arguments and errors as of `lm_loss`.
    """
    return _mean(seq2seq_sums, model, batch, key)


def lm_sums(model: Any, batch: Batch, key: jax.Array | None = None, groups: int = 1, *, terms: Terms = PLAIN) -> Sums:
    """Sum of `lm_loss`'s terms, and their number; `groups` and `terms` as in `head_nll`, `terms` in all of these."""
    targets = next_tokens(batch)
    prompt = _prompt(targets, batch.get("segment_ids")) if current().prompt is None else current().prompt
    with scope(prompt=prompt):
        if not hasattr(model, "hidden"):
            return nll(logits_of(model, batch, key), targets, terms), _count(targets)
        hidden = model.hidden(*_inputs(batch), **_extras(batch), key=key)
        return head_nll(model.logits, hidden, targets, key, groups=groups, terms=terms), _count(targets)


def lm_log_probs(model: Any, batch: Batch, key: jax.Array | None = None, groups: int = 1) -> Float[Array, " batch"]:
    """Of every row, the sum over its labelled tokens of log p(token | the tokens before it); `groups` as in `head_nll`.

    Raises:
      ValueError: rows are packed, so that a row is no text.
    """
    if "segment_ids" in batch:
        raise ValueError("rows of packed examples have no log-probability of their own; leave packing off")
    targets = next_tokens(batch)
    prompt = _prompt(targets, None) if current().prompt is None else current().prompt
    with scope(prompt=prompt):
        if not hasattr(model, "hidden"):
            return log_probs(logits_of(model, batch, key), targets).sum(axis=1)
        hidden = model.hidden(*_inputs(batch), **_extras(batch), key=key)
        return head_log_probs(model.logits, hidden, targets, key, groups=groups).sum(axis=1)


def cls_sums(model: Any, batch: Batch, key: jax.Array | None = None, groups: int = 1, *, terms: Terms = PLAIN) -> Sums:
    """Sum of `cls_loss`'s or `token_cls_loss`'s terms, and their number."""
    del groups  # few classes: all logits are computed
    logits = logits_of(model, batch, key)
    if logits.shape[-1] < 2:
        raise ValueError(f"classification needs at least 2 labels; the model's head gives {logits.shape[-1]}")
    return nll(logits, batch["labels"], terms), _count(batch["labels"])


def qa_sums(model: Any, batch: Batch, key: jax.Array | None = None, groups: int = 1, *, terms: Terms = PLAIN) -> Sums:
    """Sum of `qa_loss`'s terms, and their number."""
    del groups
    logits = jnp.swapaxes(logits_of(model, batch, key), 1, 2)  # [batch, 2, seq]
    return nll(logits, batch["labels"], terms), _count(batch["labels"])


def seq2seq_sums(
    model: Any, batch: Batch, key: jax.Array | None = None, groups: int = 1, *, terms: Terms = PLAIN
) -> Sums:
    """Sum of `seq2seq_loss`'s terms, and their number; `groups` as in `head_nll`."""
    labels, segments = batch["labels"], batch.get("decoder_segment_ids")
    inputs = {name: batch[name] for name in _DECODERS if name in batch}
    if "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = model.decoder_inputs(labels, segments)
    prompt = _prompt(labels, segments) if current().decoder_prompt is None else current().decoder_prompt
    room = {"max_segments": batch["row_segments"].shape[1]} if "row_segments" in batch else {}
    with scope(decoder_prompt=prompt, **room):
        hidden = model.hidden(*_inputs(batch), **_extras(batch), **inputs, key=key)
    return head_nll(model.logits, hidden, labels, key, groups=groups, terms=terms), _count(labels)


#: The sums of every task, by PEFT's name of it.
SUMS: Mapping[str, Callable[..., Sums]] = {
    "CAUSAL_LM": lm_sums,
    "SEQ_CLS": cls_sums,
    "TOKEN_CLS": cls_sums,
    "MULTIPLE_CHOICE": cls_sums,
    "QUESTION_ANS": qa_sums,
    "IMAGE_CLS": cls_sums,
    "SEQ_2_SEQ_LM": seq2seq_sums,
}


def next_tokens(batch: Batch) -> Int[Array, "batch seq"]:
    """What each position of a language model is to predict: the label after it, within its own segment."""
    labels = batch["labels"]
    targets = jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORED)], axis=1)
    if "segment_ids" not in batch:
        return targets
    segments = batch["segment_ids"]
    return targets.at[:, :-1].set(jnp.where(segments[:, 1:] == segments[:, :-1], targets[:, :-1], IGNORED))


def _prompt(targets: Int[Array, "batch seq"], segments: Any) -> Bool[Array, "batch seq"]:
    """The tokens of each example up to the one that predicts its first label: what generation would be given."""
    counts = targets != IGNORED
    before = jnp.cumsum(counts, axis=1) - counts
    if segments is None:
        return before == 0
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return before == jax.lax.cummax(jnp.where(starts, before, 0), axis=1)


def _mean(sums: Callable[..., Sums], model: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
    labels = next_tokens(batch) if sums is lm_sums else batch["labels"]
    if not isinstance(labels, core.Tracer) and not (np.asarray(labels) != IGNORED).any():
        raise ValueError(
            f"none of the {labels.size} labels counts (all are {IGNORED}), so the batch trains nothing; leave it out"
        )
    total, count = sums(model, batch, key)
    return total / count


def _count(labels: Any) -> jax.Array:
    return jnp.sum(labels != IGNORED).astype(jnp.float32)


def _inputs(batch: Batch) -> tuple[Any, ...]:
    """What a model reads, and the mask of it where there is one: the first arguments of a call."""
    found = [name for name in _READ if name in batch]
    if len(found) != 1:
        raise ValueError(f"a batch holds one of {', '.join(_READ)}, which the model reads; got {', '.join(batch)}")
    mask = (batch["attention_mask"],) if "attention_mask" in batch else ()
    return batch[found[0]], *mask


def _extras(batch: Batch) -> dict[str, Any]:
    return {name: batch[name] for name in _EXTRAS if name in batch}


def logits_of(model: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
    """A model's logits for a batch; one that takes no `key` gets it through the scope."""
    if hasattr(model, "hidden"):
        return model(*_inputs(batch), **_extras(batch), key=key)
    with scope() if key is None else dropout_key(key):
        return model(*_inputs(batch))
