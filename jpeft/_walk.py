# SPDX-License-Identifier: Apache-2.0
"""The modules of a model, by path and by name: what targets are matched against and what `sites` lists."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from flax import nnx

from . import seams
from ._graft import ADAPTERS, base_type


@dataclasses.dataclass(frozen=True)
class Found:
    """One module of a model.

    Attributes:
      path: its first NNX path, `"layers/attention/query"`.
      module: the object itself.
      names: one name per layer of its stack: Hugging Face's where the model maps it, else the dotted path.
      aliases: every other path at which the same object stands.
      lead: leading (layer) axes of its leaves.
      scanned: whether jpeft's own scan runs the stack.
    """

    path: str
    module: Any
    names: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    lead: tuple[int, ...] = ()
    scanned: bool = False


@dataclasses.dataclass(frozen=True)
class Seam:
    """One place where a method may act, as `jpeft.sites` lists it.

    Attributes:
      path: NNX path of the module.
      kind: `"projection"`, `"residual"`, `"keys_values"` or `"input"`.
      type: name of the module's class.
      names: its name in every layer of its stack.
      lead: leading (layer) axes.
      d_in, d_out: sizes of a projection's matrix; 0 elsewhere.
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
    adapters: tuple[str, ...] = ()
    refused: str = ""


def modules(model: nnx.Module) -> list[Found]:
    """Every module of `model` once, children after parents, adapters left out."""
    paths: dict[int, list[tuple[Any, ...]]] = {}
    objects: dict[int, Any] = {}
    stacks: dict[int, int | None] = {}
    for path, module, stack in _walk(model, (), None, ()):
        paths.setdefault(id(module), []).append(path)
        objects[id(module)], stacks[id(module)] = module, stack
    mapped = getattr(model, "module_names", dict)()
    return [_found(objects[i], found, mapped, stacks[i]) for i, found in paths.items()]


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
        adapters = tuple(getattr(found.module, ADAPTERS, ()))
        d_in, d_out, refused = 0, 0, ""
        if kind == "projection":
            try:
                _, d_in, d_out = dims(found)
            except ValueError as error:
                refused = str(error)
        listed.append(Seam(found.path, kind, module_type, found.names, found.lead, d_in, d_out, adapters, refused))
    return listed


def dims(found: Found) -> seams.Dims:
    """Sizes of the projection `found`; ValueError where it has no matrix form."""
    return seams.projection(found.module).dims(found.module)


def own_leaves(module: Any) -> dict[str, nnx.Variable]:
    """The parameters that `module` itself owns, by attribute."""
    return {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}


def _walk(
    module: Any, path: tuple[Any, ...], stack: int | None, parents: tuple[int, ...]
) -> Iterator[tuple[tuple[Any, ...], Any, int | None]]:
    """(path, module, size of the scanned stack around it) at every path, shared modules more than once."""
    stack = getattr(module, "stack_size", stack)
    yield path, module, stack
    for name, child in nnx.iter_children(module):
        if isinstance(child, nnx.Module) and name != ADAPTERS and id(child) not in parents:
            yield from _walk(child, (*path, name), stack, (*parents, id(module)))


def _found(module: Any, paths: list[tuple[Any, ...]], mapped: dict[str, tuple[str, ...]], stack: int | None) -> Found:
    path, *others = ["/".join(map(str, p)) for p in paths]
    lead = (stack,) if stack is not None else _lead(module)
    names = mapped.get(path) or _layer_names(paths[0], math.prod(lead) if lead else None)
    return Found(path, module, tuple(names), tuple(others), lead, stack is not None)


def _lead(module: Any) -> tuple[int, ...]:
    if seams.kind(module) != "projection":
        return ()
    try:
        return seams.projection(module).dims(module).lead
    except ValueError:
        return ()


def _layer_names(path: tuple[Any, ...], num_layers: int | None) -> tuple[str, ...]:
    """The dotted path; in a stack once per layer, the index behind the first part: `blocks.3.up`."""
    parts = [str(part) for part in path]
    if num_layers is None:
        return (".".join(parts),)
    return tuple(".".join([parts[0], str(i), *parts[1:]]) for i in range(num_layers))
