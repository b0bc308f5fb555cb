# SPDX-License-Identifier: Apache-2.0
"""Adapters of jpeft and of the real peft, leaf by leaf and layer by layer."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from flax import nnx

import jpeft

#: What peft calls a leaf, behind the name of its module.
NAMES = {
    "A": ("lora_A.default.weight", "lora_embedding_A.default", "lora_A.default"),
    "B": ("lora_B.default.weight", "lora_embedding_B.default", "lora_B.default"),
    "E": ("lora_E.default",),
    "m": ("lora_magnitude_vector.default.weight",),
    "bias": ("base_layer.bias",),
}


def pairs(model: Any, real: Any) -> Iterator[tuple[str, tuple[Any, ...], torch.nn.Parameter]]:
    """(path of a leaf, index of one adapted layer in it, peft's parameter, transposed) for all trained leaves."""
    theirs = dict(real.named_parameters())
    paths = jpeft.partition(model)[1]
    for at, module in nnx.iter_modules(model):
        for name, adapter in getattr(module, "adapters", {}).items():
            prefix = "/".join((*map(str, at), "adapters", name)).lstrip("/")
            for path in (path for path in paths if path.startswith(prefix + "/")):
                leaf = path.rpartition("/")[2]
                layers = adapter.saved_layers.get(leaf, adapter.site.active)
                for i, (own, acts) in enumerate(zip(adapter.site.names, layers, strict=True)):
                    if acts:
                        found = [f"base_model.model.{own}.{end}" for end in NAMES[leaf]]
                        (parameter,) = (theirs[key] for key in found if key in theirs)
                        lead = np.unravel_index(i, adapter.site.lead) if adapter.site.lead else ()
                        yield path, (*lead, *_part(leaf, parameter)), parameter


def _part(leaf: str, parameter: torch.nn.Parameter) -> tuple[slice, ...]:
    """The part of a padded leaf that the parameter is."""
    shape = parameter.shape[:1] if leaf == "E" else parameter.shape[::-1]
    return tuple(slice(size) for size in shape)


def give(model: Any, real: Any) -> None:
    """Writes the leaves of `model` into peft's parameters, all of which must be trained."""
    trainable = jpeft.partition(model)[1]
    given = set()
    for path, index, parameter in pairs(model, real):
        parameter.data = torch.tensor(np.asarray(trainable[path])[index].T.copy().reshape(parameter.shape))
        given.add(id(parameter))
    assert given == {id(parameter) for parameter in real.parameters() if parameter.requires_grad}


def differences(model: Any, real: Any, leaves: Any, attribute: str) -> dict[str, float]:
    """By path and layer, the relative distance of `leaves` from peft's parameters (`data`) or gradients (`grad`)."""
    found = {}
    for path, index, parameter in pairs(model, real):
        theirs = getattr(parameter, attribute).detach().numpy().astype(np.float64)
        ours = np.asarray(leaves[path], np.float64)[index].T.reshape(theirs.shape)
        found[f"{path}{[*index]}"] = float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30))
    return found
