# SPDX-License-Identifier: Apache-2.0
"""Which of the base's own leaves a method trains as copies: biases, norms, whole modules."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from . import seams
from ._graft import adapters
from ._method import AdapterParam
from ._quantized import QuantizedKernel
from ._walk import Found, own_leaves

#: What `Targets.seam` may say beside the kinds of seams: leaves of which copies are trained.
COPIES: Mapping[str, str] = {
    "bias": "module with a bias",
    "norm": "norm (a module whose class is called ...Norm)",
    "parameter": "module with parameters",
}

#: By name of a leaf, or path of a module: the layers meant, as one bool per layer.
Layers = dict[str, tuple[bool, ...]]


def leaves_of(found: Found, kind: str) -> tuple[str, ...]:
    """The module's own leaves of which a method with this word for `Targets.seam` trains copies."""
    leaves = tuple(own_leaves(found.module))
    if kind == "norm":
        return leaves if _is_norm(found.module) else ()
    return leaves if kind == "parameter" else tuple(leaf for leaf in leaves if leaf == _bias_of(found.module))


def _is_norm(module: Any) -> bool:
    """Whether the module's class, or one it inherits from, is called a norm (and does not wrap another module)."""
    wraps = isinstance(module, (nnx.WeightNorm, nnx.SpectralNorm))
    return not wraps and any(re.search(r"Norm([123]?d)?$", t.__name__) for t in type(module).__mro__)


def _bias_of(module: Any) -> str:
    """The attribute that holds the module's bias, if it has one."""
    return (seams.kind(module) == "projection" and seams.projection(module).bias) or "bias"


def saved_leaves(found: Found, acts: tuple[bool, ...], copied: Layers, whole: bool, head: bool, bias: str) -> Layers:
    """The module's own leaves of which a copy is trained, each with the layers in which it stands in."""
    leaves = own_leaves(found.module)
    everywhere = (True,) * len(found.names)
    name = _bias_of(found.module)
    wanted = dict.fromkeys(leaves, everywhere) if whole else {**copied}
    if not whole and name in leaves and bias != "none":
        wanted = {name: everywhere if bias == "all" else acts}
    wanted = {leaf: layers for leaf, layers in wanted.items() if any(layers)}
    if wanted and not callable(found.module):
        raise ValueError(f"{found.path} holds parameters but cannot be called, so a copy of them cannot stand in")
    codes = [leaf for leaf in wanted if isinstance(leaves[leaf], QuantizedKernel)]
    if codes:
        raise ValueError(
            f"{found.path}/{codes[0]} is quantized ({leaves[codes[0]].scheme}), and codes cannot be trained; leave the "
            "module out by exclude=, or take it out of what jpeft.quantize is given"
        )
    whole_numbers = [leaf for leaf in wanted if not jnp.issubdtype(leaves[leaf].dtype, jnp.floating)]
    if whole_numbers:
        raise ValueError(
            f"{found.path}/{whole_numbers[0]} is {leaves[whole_numbers[0]].dtype}, of which no copy can be trained"
        )
    trained = {leaf: name for name, adapter in adapters(found.module).items() for leaf in adapter.saved}
    twice = sorted(set(wanted) & set(trained))
    if twice and not head:
        raise ValueError(
            f"{found.path}/{twice[0]} is trained by the adapter {trained[twice[0]]!r} already, whose copy a second one "
            "would hide; leave it out of one of them"
        )
    return {leaf: layers for leaf, layers in wanted.items() if leaf not in trained}


def check_held(model: nnx.Module, everything: list[Found]) -> None:
    """Every parameter is held by a module: what lies in a list or a dict could not be trained, and no error said so."""
    held = {f"{path}/{leaf}".lstrip("/") for f in everything for path, _ in f.places for leaf in own_leaves(f.module)}
    flat = nnx.graph.flatten(model)[1]
    for parts, leaf in zip(flat.paths, flat.leaves, strict=True):  # type: ignore[union-attr]
        path = "/".join(map(str, parts))
        if isinstance(leaf, nnx.Param) and not isinstance(leaf, AdapterParam) and path not in held:
            raise ValueError(f"the parameter {path} is no attribute of a module, so no copy of it can stand in for it")
