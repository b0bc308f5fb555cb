# SPDX-License-Identifier: Apache-2.0
"""The modules of a model, by path and by name: what targets are matched against and what `sites` lists."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from . import seams
from ._graft import ADAPTERS, adapters, base_type, is_grafted
from ._quantized import QuantizedKernel

#: The stacks around a module: of each, how many parts its own path has, and how many layers it holds.
Stacks = tuple[tuple[int, int], ...]

#: Leading axes of the projections, by path.
Leads = dict[tuple[Any, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Found:
    """One module of a model.

    Attributes:
      path: its first NNX path, `"layers/attention/query"`.
      module: the object itself.
      names: one name per layer of its stack (of experts, per expert of each): Hugging Face's where the model maps it,
        else the dotted path.
      aliases: every other path at which the same object stands, with its names there.
      lead: leading (layer) axes of its leaves.
      scanned: whether jpeft's own scan runs the stack.
    """

    path: str
    module: Any
    names: tuple[str, ...]
    aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    lead: tuple[int, ...] = ()
    scanned: bool = False

    @property
    def places(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(path, names) of every place at which it stands."""
        return ((self.path, self.names), *self.aliases)


@dataclasses.dataclass(frozen=True)
class Seam:
    """One place where a method may act, as `jpeft.sites` lists it.

    Attributes:
      path: NNX path of the module.
      kind: `"projection"`, `"residual"`, `"keys_values"` or `"input"`.
      type: name of the module's class.
      names: its name in every layer of its stack.
      lead: leading (layer) axes.
      d_in, d_out: what goes in and comes out: sizes of a projection's matrix, the width of the stream, ...
      block: which block of a layer a residual or an attention belongs to; "" elsewhere.
      adapters: names of the adapters that it carries.
      refused: why no method can act on this projection, or "".
    """

    path: str
    kind: str
    type: str
    names: tuple[str, ...]
    lead: tuple[int, ...] = ()
    d_in: int = 0
    d_out: int = 0
    block: str = ""
    adapters: tuple[str, ...] = ()
    refused: str = ""


def modules(model: nnx.Module) -> list[Found]:
    """Every module of `model` once, children after parents, adapters left out."""
    places: dict[int, list[tuple[tuple[Any, ...], Stacks]]] = {}
    objects: dict[int, Any] = {}
    for path, module, stacks in _walk(model, (), (), ()):
        places.setdefault(id(module), []).append((path, stacks))
        objects[id(module)] = module
    mapped = model.module_names() if hasattr(model, "module_names") else {}  # type: ignore[attr-defined]
    known = {
        path: lead
        for i, at in places.items()
        for path, stacks in at
        if (lead := _own_lead(objects[i], stacks)) is not None
    }
    outside = {path: known[path] for at in places.values() for path, stacks in at if path in known and not stacks}
    return [_found(objects[i], found, mapped, known, outside) for i, found in places.items()]


def sites(model: nnx.Module) -> list[Seam]:
    """The places of `model` where a method may act, in the order of the model.

    Example:
      >>> [site.path for site in jpeft.sites(model) if site.kind == "projection"]
    """
    listed = []
    for found in modules(model):
        kind = seams.kind(found.module)
        if kind is None:
            continue
        module_type = base_type(found.module).__name__
        carried = tuple(adapters(found.module))
        sizes, refused = seams.Sizes(found.lead, 0, 0), ""
        try:
            sizes = seam_sizes(found)
        except ValueError as error:
            refused = str(error)
        listed.append(
            Seam(
                found.path, kind, module_type, found.names, found.lead, sizes.d_in, sizes.d_out, sizes.block, carried,
                refused,
            )
        )  # fmt: skip
    return listed


def seam_sizes(found: Found) -> seams.Sizes:
    """Sizes of the seam `found`; ValueError, with its path, where it is a projection without a matrix form."""
    try:
        return seams.sizes(found.module, found.lead)
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from error


def own_leaves(module: Any) -> dict[str, Any]:
    """The parameters that `module` itself owns, by attribute; a quantized kernel is one of them."""
    return {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param | QuantizedKernel)}


def _walk(
    node: Any, path: tuple[Any, ...], stacks: Stacks, parents: tuple[int, ...]
) -> Iterator[tuple[tuple[Any, ...], Any, Stacks]]:
    """(path, module, scanned stacks around it) at every path, shared modules more than once."""
    if isinstance(node, QuantizedKernel):
        return  # a leaf of the module around it
    if isinstance(node, nnx.Module):
        size = vars(node).get("stack_size")
        stacks = stacks if size is None else (*stacks, (len(path), size))
        yield path, node, stacks
    for name, child in _children(node):
        if id(child) not in parents:
            yield from _walk(child, (*path, name), stacks, (*parents, id(node)))


def _children(node: Any) -> list[tuple[Any, Any]]:
    """What NNX sees directly below `node`: modules, and the plain lists and dicts that may hold some."""
    below = nnx.graph.get_node_impl(node).node_dict(node)  # type: ignore[union-attr]
    hidden = ADAPTERS if isinstance(node, nnx.Module) and is_grafted(node) else None
    return [(name, child) for name, child in below.items() if nnx.graph.is_node(child) and name != hidden]


def _found(
    module: Any,
    places: list[tuple[tuple[Any, ...], Stacks]],
    mapped: dict[str, tuple[str, ...]],
    known: Leads,
    outside: Leads,
) -> Found:
    path, stacks = places[0]
    scanned = tuple(size for _, size in stacks)
    lead = known[path] if path in known else scanned or _lead_beside(path, outside)
    named = []
    for path, around in places:
        joined = "/".join(map(str, path))
        named.append((joined, tuple(mapped.get(joined) or _layer_names(path, lead, around))))
    (path, names), *aliases = named
    layers = lead[: len(lead) - seams.beside(module)]
    return Found(path, module, names, tuple(aliases), lead, len(scanned) == 1 and layers == scanned)


def _own_lead(module: Any, stacks: Stacks) -> tuple[int, ...] | None:
    """Leading axes of a projection's leaves, which its own shape tells; None of anything else."""
    if seams.kind(module) != "projection":
        return None
    try:
        return seams.projection(module).dims(module).lead
    except ValueError:
        return tuple(size for _, size in stacks)


def _lead_beside(path: tuple[Any, ...], outside: Leads) -> tuple[int, ...]:
    """Leading axes of a module that is in no stack of jpeft's: of the nearest projections that are in none either."""
    for depth in range(len(path), -1, -1):
        beside = [lead for other, lead in outside.items() if other[:depth] == path[:depth]]
        if beside:
            return min(beside, key=len)
    return ()


def _layer_names(path: tuple[Any, ...], lead: tuple[int, ...], stacks: Stacks) -> tuple[str, ...]:
    """The dotted path, once per layer: the index stands behind the stack's own path, `blocks.3.up`.

    Of a stack that jpeft did not build only the size is known, so its index stands behind the first part.
    """
    behind = [depth for depth, _ in stacks]
    if len(behind) != len(lead):
        behind = [min(1, len(path))] * len(lead)
    names = []
    for index in np.ndindex(*lead):
        parts = [str(part) for part in path]
        for depth, i in reversed(list(zip(behind, index, strict=True))):
            parts.insert(depth, str(i))
        names.append(".".join(parts))
    return tuple(names)
