# SPDX-License-Identifier: Apache-2.0
"""An adapted model as an ordinary Hugging Face folder."""

import logging
from pathlib import Path
from typing import Any

from .. import models
from .._adapt import merge
from .._graft import grafts
from .._summary import summary
from ._drift import Drift, Sample, measure_drift
from .card import render_merged

_LOG = logging.getLogger("jpeft")


def export_merged(
    model: Any,
    folder: str | Path,
    tokenizer_from: str | Path | None = None,
    *,
    sample: Sample | None = None,
    base: str | None = None,
) -> Drift:
    """Merges the adapters into their base and writes it as a Hugging Face folder, which needs neither jpeft nor PEFT.

    A quantized base is written dequantized: as the floats that its codes stand for, to which the change is added.

    Args:
      model: an adapted model of the zoo.
      folder: where config.json, the safetensors and README.md go.
      tokenizer_from: a model folder whose tokenizer, or processor of images or sounds, is copied along.
      sample: what the drift is measured on; by default two rows of random tokens.
      base: the base model's id on the Hub, or its folder, for README.md.

    Returns:
      The drift: how far the merged model's outputs are from the adapted one's. Zero but for rounding; a bfloat16 base
      rounds the change to its own 8 bits. It is logged, and stands in README.md.

    Raises:
      ValueError: the model has no adapter, or one that has no merged form.
    """
    if not any(True for _ in grafts(model)):
        raise ValueError("the model has no adapter to merge; jpeft.models.save writes it as it is")
    merged = merge(model)
    drift = measure_drift(model, merged, sample)
    _LOG.info("merging: %s", drift)
    models.save(merged, folder)
    if tokenizer_from is not None:
        models.copy_tokenizer(tokenizer_from, folder)
    (Path(folder) / "README.md").write_text(render_merged(drift, summary(model), model.task, base))
    return drift
