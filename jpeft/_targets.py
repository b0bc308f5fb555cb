# SPDX-License-Identifier: Apache-2.0
"""Which modules a method is grafted onto: PEFT's rules, made loud.

A string is a regular expression that must match a whole name; a list matches names that are equal or end in
`.suffix`; `"all-linear"` is every matmul but the task's head. A list entry that holds a `/` is read as an NNX path.
Unlike PEFT, a selection that does not mean what it says (an entry without a match, a layer that does not exist, an
exclusion of nothing, half of a shared module) is an error.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable

from flax import nnx

from . import seams
from ._method import Method, Targets
from ._walk import Found, dims, modules, own_leaves

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Planned:
    """What one module gets: the layers in which the method acts, and the leaves of which it trains a copy."""

    found: Found
    active: tuple[bool, ...]
    saved: dict[str, tuple[bool, ...]]


def plan(model: nnx.Module, method: Method) -> list[Planned]:
    """Every module that `method` touches, in the model's order; a ValueError where the selection is wrong."""
    everything = modules(model)
    asked = method.select(getattr(getattr(model, "config", None), "model_type", None))
    heads = tuple(getattr(model, "head", ()))
    saved = _saved_modules(everything, asked, heads, getattr(model, "task", None))
    active = _active(everything, asked, method.seam, heads, saved)
    _check_sharing(everything, asked, active)
    planned = []
    for found in everything:
        acts = active.get(found.path, (False,) * len(found.names))
        leaves = _saved_leaves(found, acts, _inside(found.path, saved), asked.bias)
        if any(acts) or leaves:
            planned.append(Planned(found, acts, leaves))
    return planned


def matches(pattern: str | tuple[str, ...], name: str, path: str) -> bool:
    """PEFT's rule: a string is a full regular expression, a tuple holds exact names or dotted suffixes."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None or re.fullmatch(pattern, path) is not None
    return any(_entry_matches(entry, name, path) for entry in pattern)


def nearest(wanted: str, names: Iterable[str], count: int = 6) -> str:
    """The names most like `wanted`, by their last part or whole, as a phrase for an error."""
    names = sorted(set(names))
    by_last = {_last(name): name for name in reversed(names)}
    close = [by_last[part] for part in difflib.get_close_matches(_last(wanted), list(by_last), count, 0.5)]
    close = close or difflib.get_close_matches(wanted, names, count, 0.5) or list(by_last.values())[::-1]
    return ", ".join(close[:count]) or "none"


def _last(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _entry_matches(entry: str, name: str, path: str) -> bool:
    if "/" in entry:
        return path == entry or path.endswith("/" + entry)
    return name == entry or name.endswith("." + entry)


def _active(
    everything: list[Found], asked: Targets, seam: str, heads: tuple[str, ...], saved: frozenset[str]
) -> dict[str, tuple[bool, ...]]:
    """For every module in which the method acts, the layers in which it does."""
    if asked.targets is None:
        return {}
    fitting = [f for f in everything if seams.kind(f.module) == seam and not _inside(f.path, saved)]
    candidates = [name for found in fitting for name in found.names]
    if asked.targets == ALL_LINEAR:
        matched = {f.path: (True,) * len(f.names) for f in fitting if _is_linear(f) and not _inside(f.path, heads)}
    else:
        matched = {f.path: _match_layers(asked.targets, f) for f in fitting}
        _check_entries(asked.targets, fitting, everything, seam, candidates, saved)
    matched = _within_layers(matched, asked.layers, fitting)
    matched = _without(matched, asked.exclude, fitting, candidates)
    active = {path: layers for path, layers in matched.items() if any(layers)}
    if not active:
        raise ValueError(f"targets={asked.targets!r} matches no {seam} of the model; nearest: "
                         f"{nearest(str(asked.targets), candidates)}")  # fmt: skip
    for found in fitting:
        if found.path in active and seam == "projection":
            dims(found)  # raises where it has no matrix
    return active


def _match_layers(pattern: str | tuple[str, ...], found: Found) -> tuple[bool, ...]:
    aliased = any(matches(pattern, alias.replace("/", "."), alias) for alias in found.aliases)
    return tuple(aliased or matches(pattern, name, found.path) for name in found.names)


def _is_linear(found: Found) -> bool:
    return seams.kind(found.module) == "projection" and isinstance(seams.projection(found.module), seams.Matmul)


def _inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def _check_entries(
    targets: str | tuple[str, ...],
    fitting: list[Found],
    everything: list[Found],
    seam: str,
    candidates: list[str],
    saved: frozenset[str],
) -> None:
    """Every entry of a list must match something; says what it matched instead."""
    for entry in (targets,) if isinstance(targets, str) else targets:
        pattern = entry if isinstance(targets, str) else (entry,)
        if any(any(_match_layers(pattern, found)) for found in fitting):
            continue
        other = next((f for f in everything if any(_match_layers(pattern, f))), None)
        if other is not None and _inside(other.path, saved):
            raise ValueError(
                f"target {entry!r} is in modules_to_save already, which trains all of {other.path}; name it once"
            )
        if other is not None:
            raise ValueError(
                f"target {entry!r} matches {other.path}, a {type(other.module).__name__}, which is no {seam}; "
                f"nearest: {nearest(entry, candidates)}"
            )
        raise ValueError(f"target {entry!r} matches no {seam} of the model; nearest: {nearest(entry, candidates)}")


def _layer_of(name: str) -> int | None:
    """The first numbered part of a name: `encoder.layer.3.attention` is layer 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _within_layers(
    matched: dict[str, tuple[bool, ...]], layers: tuple[int, ...] | None, fitting: list[Found]
) -> dict[str, tuple[bool, ...]]:
    if layers is None:
        return matched
    names = {found.path: found.names for found in fitting}
    there = {_layer_of(n) for path, acts in matched.items() for n, act in zip(names[path], acts, strict=True) if act}
    missing = [layer for layer in layers if layer not in there]
    if missing:
        known = sorted(layer for layer in there if layer is not None)
        raise ValueError(f"layers={list(layers)}: the targets stand in layers {known}, and not in {missing}")
    return {
        path: tuple(act and _layer_of(name) in layers for name, act in zip(names[path], acts, strict=True))
        for path, acts in matched.items()
    }


def _without(
    matched: dict[str, tuple[bool, ...]], exclude: str | tuple[str, ...], fitting: list[Found], candidates: list[str]
) -> dict[str, tuple[bool, ...]]:
    for entry in (exclude,) if isinstance(exclude, str) else exclude:
        pattern = entry if isinstance(exclude, str) else (entry,)
        if not any(any(_match_layers(pattern, found)) for found in fitting):
            raise ValueError(f"exclude {entry!r} matches nothing; nearest: {nearest(entry, candidates)}")
    if not exclude:
        return matched
    excluded = {found.path: _match_layers(exclude, found) for found in fitting}
    return {
        path: tuple(act and not out for act, out in zip(acts, excluded[path], strict=True))
        for path, acts in matched.items()
    }


def _saved_modules(everything: list[Found], asked: Targets, heads: tuple[str, ...], task: str | None) -> frozenset[str]:
    """Paths of the modules trained whole: those asked for, and the fresh head of a classification task."""
    if asked.modules_to_save is None:
        return frozenset(heads if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else ())
    paths = set()
    for entry in asked.modules_to_save:
        found = [f for f in everything if (f.path and any(_match_layers((entry,), f))) or f.path == entry]
        if not found:
            raise ValueError(
                f"modules_to_save entry {entry!r} matches no module; "
                f"nearest: {nearest(entry, [n for f in everything for n in f.names])}"
            )
        if not all(any(_match_layers((entry,), f)) for f in found):
            raise ValueError(f"modules_to_save entry {entry!r} matches only some layers of a stack")
        paths |= {f.path for f in found}
    return frozenset(paths)


def _saved_leaves(found: Found, acts: tuple[bool, ...], whole: bool, bias: str) -> dict[str, tuple[bool, ...]]:
    """The module's own leaves of which a copy is trained, each with the layers in which it stands in."""
    leaves = own_leaves(found.module)
    everywhere = (True,) * len(found.names)
    if whole:
        if leaves and not callable(found.module):
            raise ValueError(f"{found.path} holds parameters but cannot be called, so modules_to_save cannot train it")
        return dict.fromkeys(leaves, everywhere)
    name = (seams.kind(found.module) == "projection" and seams.projection(found.module).bias) or "bias"
    if name not in leaves or bias == "none":
        return {}
    layers = everywhere if bias == "all" else acts
    return {name: layers} if any(layers) else {}


def _check_sharing(everything: list[Found], asked: Targets, active: dict[str, tuple[bool, ...]]) -> None:
    """Half of a shared module cannot be adapted, nor a kernel that another module reads too."""
    owners: dict[int, list[str]] = {}
    for found in everything:
        for leaf in own_leaves(found.module).values():
            owners.setdefault(id(leaf), []).append(found.path)
    for found in everything:
        if found.path not in active:
            continue
        places = (found.path, *found.aliases)
        if asked.targets is not None and asked.targets != ALL_LINEAR:
            left = [p for p in places if not matches(asked.targets, p.replace("/", "."), p)]
            if found.aliases and left:
                raise ValueError(
                    f"{' and '.join(places)} are one shared module, but the targets leave out {', '.join(left)}; "
                    "an adapter acts at both, so name both"
                )
        shared = next((owners[id(v)] for v in own_leaves(found.module).values() if len(owners[id(v)]) > 1), None)
        if shared:
            raise ValueError(
                f"{' and '.join(shared)} share one parameter, so an adapter on {found.path} would change them all when "
                "merged; share the module instead of the parameter, or choose another target"
            )
