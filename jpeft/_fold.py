# SPDX-License-Identifier: Apache-2.0
"""Evaluating away what a method computes from its leaves alone: a network that makes a prompt leaves the prompt."""

from typing import Any

from flax import nnx

from ._graft import adapters, grafts
from ._method import Adapter
from .methods import METHODS


def fold(model: nnx.Module) -> Any:
    """`model` with every adapter that computes what it shares turned into one that holds it: a new model, same outputs.

    P-tuning becomes prompt tuning, and prefix tuning loses its projection. That is what PEFT saves, and all that
    inference needs; to train on as before, keep the unfolded leaves. A model without such an adapter is copied.

    Example:
      >>> prompt = jpeft.partition(jpeft.fold(model))[1]["adapters/p_tuning/prompt"]
    """
    model = nnx.clone(model)
    for name, root in list(adapters(model).items()):
        folded = root.method.fold(root) if root.site.seam == "model" else None
        if folded is None:
            continue
        method = METHODS[folded.kind](**folded.options)
        for _, module in grafts(model):
            if name in adapters(module):
                adapters(module)[name].method = method
        holding = Adapter(method, root.site, folded.start, {}, {})
        holding.order = root.order
        model.adapters[name] = holding  # type: ignore[attr-defined]
    return model
