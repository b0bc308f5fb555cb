# SPDX-License-Identifier: Apache-2.0
"""What `jpeft inspect` prints: what a folder holds; a model's modules, without its weights; what an adapter trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from .. import models
from .._summary import summary
from .._walk import sites
from ..io import Contents, verify
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


def verified(folder: str | Path, model: str | Path | None) -> Contents:
    """What a folder holds, with every fault of its own files; and, where its base is at hand, those in fitting it.

    Args:
      model: the base of an adapter; None for the one that it names, where that is here.
    """
    contents = verify(folder)
    base = model or contents.base
    if contents.kind == "model":
        _try(contents, lambda: models.load(folder))
    elif base is None or not Path(base).is_dir():
        contents.facts["fit to a base"] = f"not looked at: {base or 'none'} is not here; name one by --model"
    else:
        at = Path(folder) / "adapter" if contents.kind == "jpeft run" else Path(folder)
        adapted = _try(contents, lambda: open_model(base, at).model)
        if adapted is not None:
            found = summary(adapted)
            contents.facts["on its base"] = f"{_kind(adapted)}, {found.trainable:,} trainable of {found.base:,}"
            contents.facts["methods"] = "; ".join(dict.fromkeys(str(row.method) for row in found.rows))
    return contents


def _try(contents: Contents, load: Callable[[], Any]) -> Any:
    """What `load` gives; its error is a fault, unless it is there already."""
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
        if str(error) not in contents.faults:
            contents.faults.append(str(error))
        return None


def _kind(model: Any) -> str:
    return f"{model.config.model_type} for {model.task}"
