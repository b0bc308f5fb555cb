# SPDX-License-Identifier: Apache-2.0
"""An adapted model as an ordinary Hugging Face folder."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .. import models, seams
from .._adapt import merge
from .._graft import grafts
from .._partition import combine, partition

_LOG = logging.getLogger("jpeft")


def export_merged(model: Any, folder: str | Path, tokenizer_from: str | Path | None = None) -> float:
    """Merges the adapters into their base and writes it as a Hugging Face folder, which needs neither jpeft nor PEFT.

    Args:
      model: an adapted model of the zoo.
      folder: where config.json and the safetensors go.
      tokenizer_from: a model folder whose tokenizer is copied along.

    Returns:
      The drift: how far, at most, a logit of the merged model is from the adapted one's, on two rows of random tokens
      (random numbers for a model that reads none). Zero but for rounding; a bfloat16 base rounds the change to its own
      8 bits. It is logged with the logits' size.

    Raises:
      ValueError: the model has no adapter, or one that has no merged form.
    """
    if not any(True for _ in grafts(model)):
        raise ValueError("the model has no adapter to merge; jpeft.models.save writes it as it is")
    merged = merge(model)
    before, after = _logits(model), _logits(merged)
    drift = float(jnp.abs(after - before).max())
    _LOG.info("merging moved the logits by at most %.3g; they go up to %.3g", drift, float(jnp.abs(before).max()))
    models.save(merged, folder)
    if tokenizer_from is not None:
        models.copy_tokenizer(tokenizer_from, folder)
    return drift


def _logits(model: Any) -> jax.Array:
    graphdef, trainable, frozen = partition(model)
    call = jax.jit(lambda trainable, frozen, read, more: combine(graphdef, trainable, frozen)(read, **more))
    return call(trainable, frozen, *_inputs(model))


def _inputs(model: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Two rows of what the model reads, and those of a decoder beside an encoder."""
    key = jax.random.key(0)
    tokens = {
        seam.block: jax.random.randint(key, (2, min(32, seam.max_positions or 32)), 0, model.config.vocab_size)
        for _, seam in nnx.iter_modules(model)
        if isinstance(seam, seams.InputEmbedding) and hasattr(model.config, "vocab_size")
    }
    more = {"decoder_input_ids": tokens["decoder"]} if hasattr(model, "decode") else {}
    if hasattr(model, "input_shape"):
        return jax.random.normal(key, (2, *model.input_shape)), more
    return tokens["encoder" if "encoder" in tokens else "decoder"], more
