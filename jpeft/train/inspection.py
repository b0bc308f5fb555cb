# SPDX-License-Identifier: Apache-2.0
"""What `jpeft inspect` prints: a model's modules by shape, without its weights; or what an adapter trains."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from .. import models
from .._summary import summary
from .._walk import sites
from ..models._checkpoint import read_config
from ..models._hub import model_folder
from .saved import open_model


def describe(model: str | Path | None, adapter: str | Path | None) -> str:
    """A model's kind, size and places to adapt; with an adapter, its counts on its base."""
    if adapter is not None:
        opened = open_model(model, adapter)
        return f"{_kind(opened.model)}, base {opened.base}\n{summary(opened.model)}"
    if model is None:
        raise ValueError("name a model, an adapter, or both")
    hf = read_config(model_folder(model))
    shapes = nnx.eval_shape(lambda: models.build(hf, key=jax.random.key(0)))
    lines = [f"{_kind(shapes)}, {summary(shapes).base:,} parameters; where a method can act:"]
    for site in sites(shapes):
        size = f"{site.d_in} -> {site.d_out}" if site.d_in else ""
        names = site.names[0] + (f" and {len(site.names) - 1} more" if len(site.names) > 1 else "")
        lines.append(f"  {site.kind:<12}{site.type:<12}{size:<16}{names}")
    return "\n".join(lines)


def _kind(model: Any) -> str:
    return f"{model.config.model_type} for {model.task}"
