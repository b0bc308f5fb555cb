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
from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from . import seams
from ._copies import COPIES, Layers, check_held, leaves_of, saved_leaves
from ._graft import adapters, base_type
from ._matching import layer_of, matches, pattern_matches
from ._method import Method, Targets
from ._walk import Found, modules, own_leaves, seam_sizes

ALL_LINEAR = "all-linear"

#: The tasks of which the head is trained whole unless `modules_to_save` is `()`.
TRAINED_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE", "IMAGE_CLS")


@dataclasses.dataclass(frozen=True)
class Planned:
    """What one module gets: the layers in which the method acts, the leaves of which it trains a copy, and the names
    of the adapters that it takes over.
    """

    found: Found
    active: tuple[bool, ...]
    saved: Layers
    absorbed: tuple[str, ...] = ()


def plan(model: nnx.Module, method: Method) -> list[Planned]:
    """Every module that `method` touches, in the model's order; a ValueError where the selection is wrong."""
    everything = modules(model)
    asked = method.select(getattr(getattr(model, "config", None), "model_type", None))
    asked = asked if isinstance(asked, tuple) else (asked,)
    heads = _heads(model)
    default = heads if asked[0].modules_to_save is None else _paths(model, "head")
    saved = _saved_modules(everything, asked[0], default, getattr(model, "task", None))
    active: Layers = {}
    copied: dict[str, Layers] = {}
    absorbed: dict[str, tuple[str, ...]] = {}
    for part in asked:
        _check_expressions(part)
        found = _active(everything, part, heads, saved)
        if part.seam in COPIES:
            for module in everything:
                layers = found.get(module.path)
                copied.setdefault(module.path, {}).update({n: layers for n in leaves_of(module, part.seam) if layers})
            continue
        _check_patterns(part.patterns, [n for f in everything for n in _named(f.names, found.get(f.path, ()))])
        _check_grouped(method, everything, found)
        active |= found
        absorbed |= dict.fromkeys(found, part.absorb)
    planned = []
    for found in everything:
        acts = active.get(found.path, (False,) * len(found.names))
        whole, head = _inside(found.path, saved), _inside(found.path, heads)
        leaves = saved_leaves(found, acts, copied.get(found.path, {}), whole, head, asked[0].bias)
        if any(acts) or leaves:
            planned.append(Planned(found, acts, leaves, absorbed.get(found.path, ())))
    if not planned:
        raise ValueError(f"{method} would train nothing: the model has no part that it selects, and no new head")
    _check_sharing(everything, planned)
    if any(part.seam == "parameter" for part in asked):
        check_held(model, everything)
    return planned


def _check_grouped(method: Method, everything: list[Found], active: Layers) -> None:
    """Experts are for methods that know of them."""
    for found in everything:
        if found.path in active and seams.beside(found.module) and not method.grouped:
            raise ValueError(
                f"{found.path} are experts: of their matrices, which stand side by side, each acts on the tokens sent "
                f"to it, and {type(method).__name__} is about one matrix for all tokens; exclude= them, or adapt them "
                "by LoRA"
            )


def chosen(model: nnx.Module, asked: Targets) -> list[Found]:
    """The modules that a selection means, by the rules of methods, where it cannot mean some layers of a stack alone.

    Raises:
      ValueError: the selection is wrong, or it means some layers alone.
    """
    everything = modules(model)
    _check_expressions(asked)
    active = _active(everything, asked, _heads(model), frozenset())
    for path, layers in active.items():
        if not all(layers):
            raise ValueError(f"targets={asked.targets!r} matches some layers of the stack {path} alone; name them all")
    return [found for found in everything if found.path in active]


def _heads(model: Any) -> tuple[str, ...]:
    """Paths of the task's output layers, and of those before them that pretrained models have not."""
    return _paths(model, "head") + _paths(model, "before_head")


def _paths(model: Any, name: str) -> tuple[str, ...]:
    """What the model tells by an attribute, which may as well be a module of somebody's own."""
    paths = getattr(model, name, ())
    return paths if isinstance(paths, tuple) and all(isinstance(path, str) for path in paths) else ()


def nearest(wanted: str, names: Iterable[str], count: int = 6) -> str:
    """The names most like `wanted`, by their last part or whole, as a phrase for an error."""
    names = sorted(set(names))
    by_last = {_last(name): name for name in reversed(names)}
    close = [by_last[part] for part in difflib.get_close_matches(_last(wanted), list(by_last), count, 0.5)]
    close = close or difflib.get_close_matches(wanted, names, count, 0.5) or list(by_last.values())[::-1]
    return ", ".join(close[:count]) or "none"


def _last(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _active(everything: list[Found], asked: Targets, heads: tuple[str, ...], saved: frozenset[str]) -> Layers:
    """For every module in which the method acts, the layers in which it does."""
    if asked.targets is None:
        return {}
    fitting = _fitting(everything, asked, saved)
    if asked.optional and not any(any(_match_layers(asked.targets, found)) for found in fitting):
        return {}
    asked = _counted(asked, fitting)
    candidates = [name for found in fitting for name in found.names]
    _check_entries(asked, fitting, everything, candidates, saved)
    _check_layers(asked, fitting)
    _check_exclude(asked.exclude, everything, candidates)
    active = {}
    for found in fitting:
        layers = {
            path: tuple(_selects(asked, found, path, name, heads) for name in names) for path, names in found.places
        }
        _check_places(layers)
        if any(layers[found.path]):
            active[found.path] = layers[found.path]
    if not active:
        raise ValueError(
            f"targets={asked.targets!r} matches no {_what(asked)} of the model that is not left out again by exclude= "
            f"or modules_to_save=; nearest: {nearest(str(asked.targets), candidates)}"
        )
    for found in fitting:
        if found.path in active and asked.seam not in COPIES:
            seam_sizes(found)  # raises where a projection has no matrix
    return active


def _fitting(everything: list[Found], asked: Targets, saved: frozenset[str]) -> list[Found]:
    """The modules at which the method could act: of its kind of seam, and carrying what it takes over."""
    if asked.seam in COPIES:
        here = [f for f in everything if leaves_of(f, asked.seam) and not _inside(f.path, saved)]
        here = [f for f in here if asked.last != 0 or all(layer_of(name) is None for name in f.names)]
        if not here:
            raise ValueError(f"the method trains what a {_what(asked)} holds, and the model has none")
        return here
    here = [found for found in everything if seams.kind(found.module) == asked.seam]
    if asked.seam != "projection":
        blocks = sorted({found.module.block for found in here})
        here = [found for found in here if asked.blocks is None or found.module.block in asked.blocks]
        if not here:
            wanted = "" if asked.blocks is None else f" of a block {' or '.join(asked.blocks)}"
            raise ValueError(
                f"the method acts at a {seams.KINDS[asked.seam]}{wanted}, and the model has none"
                + (f" (only of {', '.join(blocks)})" if blocks else "; the models of jpeft.models have them")
            )
        first = next((block for block in asked.prefer if block in blocks), None)
        here = [found for found in here if first is None or found.module.block == first]
    if asked.absorb:
        here = _carrying(everything, here, asked)
    return [found for found in here if not _inside(found.path, saved)]


def _carrying(everything: list[Found], here: list[Found], asked: Targets) -> list[Found]:
    """Those of `here` that carry all the adapters to be taken over; no place may carry some of them alone."""
    wanted = {*asked.absorb}
    together = [found for found in here if wanted <= {*adapters(found.module)}]
    if not together:
        carried = sorted({name for found in everything for name in adapters(found.module)})
        raise ValueError(
            f"no {asked.seam} of the model carries the adapters {', '.join(asked.absorb)} together; it has "
            f"{', '.join(carried) or 'none'}"
        )
    for found in everything:
        acting = sorted(name for name in wanted & {*adapters(found.module)} if adapters(found.module)[name].acts)
        if acting and found not in together:
            raise ValueError(
                f"{found.path} carries {', '.join(acting)} of the adapters {', '.join(asked.absorb)}, which cannot be "
                "taken over there; adapters that are taken over together must stand at the same places"
            )
    return together


def _selects(asked: Targets, found: Found, path: str, name: str, heads: tuple[str, ...]) -> bool:
    """Whether the method acts on `found` at one of its places, in one layer."""
    if matches(asked.exclude, name, path):
        return False
    if asked.targets == ALL_LINEAR:
        return _is_linear(found) and not _inside(path, heads) and _in_layers(asked, name)
    return matches(asked.targets, name, path) and _in_layers(asked, name)  # type: ignore[arg-type]


def _in_layers(asked: Targets, name: str) -> bool:
    if layer_of(name) in asked.leave_out:
        return False
    if asked.layers is None or layer_of(name) in asked.layers:
        return True
    return isinstance(asked.targets, tuple) and name in asked.targets  # a name in full says its layer itself


def _check_places(layers: Mapping[str, tuple[bool, ...]]) -> None:
    """A shared module is adapted at all its places or at none."""
    if len(set(layers.values())) > 1:
        left = [path for path, acts in layers.items() if not all(acts)]
        raise ValueError(
            f"{' and '.join(layers)} are one shared module, but the selection leaves out {', '.join(left)}; an adapter "
            "acts at every place, so select all of them or none"
        )


def _match_layers(pattern: str | tuple[str, ...], found: Found) -> tuple[bool, ...]:
    """The layers of `found` in which the pattern matches it at any of its places."""
    hits = [[matches(pattern, name, path) for name in names] for path, names in found.places]
    return tuple(map(any, zip(*hits, strict=True)))


def _named(names: tuple[str, ...], acts: tuple[bool, ...]) -> list[str]:
    return [name for name, act in zip(names, acts, strict=False) if act]


def _is_linear(found: Found) -> bool:
    return seams.kind(found.module) == "projection" and isinstance(seams.projection(found.module), seams.Matmul)


def _inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def _check_entries(
    asked: Targets, fitting: list[Found], everything: list[Found], candidates: list[str], saved: frozenset[str]
) -> None:
    """Every entry of a list must match something, and nothing with parameters that the method does not fit."""
    targets, seam = asked.targets, asked.seam
    for entry in () if targets in (None, ALL_LINEAR) else (targets,) if isinstance(targets, str) else targets:
        pattern = entry if isinstance(targets, str) else (entry,)
        matched = [found for found in everything if any(_match_layers(pattern, found))]
        fit = [found for found in matched if found in fitting]
        odd = [f for f in matched if seam == "projection" and _is_odd(f, asked.exclude, saved)]
        if fit and not odd:
            continue
        other = next(iter(odd or matched), None)
        if other is not None and _inside(other.path, saved):
            raise ValueError(
                f"target {entry!r} is in modules_to_save already, which trains all of {other.path}; name it once"
            )
        if other is not None:
            raise ValueError(
                f"target {entry!r} matches {other.path}, a {base_type(other.module).__name__}, which is no "
                f"{_what(asked)}; nearest: {nearest(entry, candidates)}"
            )
        raise ValueError(
            f"target {entry!r} matches no {_what(asked)} of the model; nearest: {nearest(entry, candidates)}"
        )


def _what(asked: Targets) -> str:
    return COPIES.get(asked.seam, asked.seam) + (" outside of the layers" if asked.last == 0 else "")


def _is_odd(found: Found, exclude: str | tuple[str, ...], saved: frozenset[str]) -> bool:
    """Whether it holds parameters, below the root, and is no projection: matched, yet nothing that could be adapted."""
    if not found.path or not own_leaves(found.module) or seams.kind(found.module) == "projection":
        return False
    return not _inside(found.path, saved) and not all(_match_layers(exclude, found))


def _check_layers(asked: Targets, fitting: list[Found]) -> None:
    """Every layer asked for must have a target in it."""
    if asked.layers is None and not asked.leave_out:
        return
    names = [name for found in fitting for _, names in found.places for name in names]
    if asked.targets != ALL_LINEAR:
        names = [n for f in fitting for path, named in f.places for n in named if matches(asked.targets, n, path)]  # type: ignore[arg-type]
    known = {layer for layer in map(layer_of, names) if layer is not None}
    for field, layers in (("layers", asked.layers), ("leave_out", asked.leave_out)):
        missing = [layer for layer in layers or () if layer not in known]
        if missing or asked.layers == ():
            raise ValueError(
                f"{field}={list(layers or ())}: the targets stand in layers {sorted(known)}, not in {missing}"
            )


def _check_exclude(exclude: str | tuple[str, ...], everything: list[Found], candidates: list[str]) -> None:
    for entry in (exclude,) if isinstance(exclude, str) else exclude:
        pattern = entry if isinstance(exclude, str) else (entry,)
        if not any(any(_match_layers(pattern, found)) for found in everything):
            raise ValueError(f"exclude {entry!r} matches nothing; nearest: {nearest(entry, candidates)}")


def _check_expressions(asked: Targets) -> None:
    """Strings, and the keys of patterns, are regular expressions; a glob is not."""
    for pattern in (asked.targets, asked.exclude, *asked.patterns):
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            raise ValueError(
                f"{pattern!r} is read as a regular expression, and is not a valid one ({error}); names go in a list"
            ) from error


def _check_patterns(patterns: tuple[str, ...], adapted: list[str]) -> None:
    for key in patterns:
        if not any(pattern_matches(key, name) for name in adapted):
            raise ValueError(
                f"the key {key!r} of rank_pattern or alpha_pattern (or the pattern of feedforward) matches the end of "
                f"no adapted module's name; nearest: {nearest(key, adapted)}"
            )


def _saved_modules(everything: list[Found], asked: Targets, heads: tuple[str, ...], task: str | None) -> frozenset[str]:
    """Paths of the modules trained whole: those asked for, and (unless that is `()`) a classification task's head."""
    entries = asked.modules_to_save
    paths = set(heads if task in TRAINED_HEADS and entries != () else ())
    for entry in entries or ():
        found = {
            path: [matches((entry,), name, path) for name in names]
            for module in everything
            for path, names in module.places
        }
        matched = {path: hits for path, hits in found.items() if any(hits)}
        if not matched:
            raise ValueError(
                f"modules_to_save entry {entry!r} matches no module; "
                f"nearest: {nearest(entry, [n for f in everything for n in f.names])}"
            )
        partly = [path for path, hits in matched.items() if not all(hits)]
        if partly:
            raise ValueError(f"modules_to_save entry {entry!r} matches only some layers of the stack {partly[0]}")
        paths |= set(matched)
    for module in everything:
        _check_places({path: (_inside(path, paths),) for path, _ in module.places})
    return frozenset(paths)


def _counted(asked: Targets, fitting: list[Found]) -> Targets:
    """`asked` with the indices of the last layers, where it asks for these."""
    if not asked.last:
        return asked
    pattern: Any = ".*" if asked.targets == ALL_LINEAR else asked.targets
    named = [n for f in fitting for path, ns in f.places for n in ns if matches(pattern, n, path)]
    stacks: dict[str, set[int]] = {}
    for numbered in filter(None, (re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", name) for name in named)):
        stacks.setdefault(numbered[1] or "the model", set()).add(int(numbered[2]))
    if len(stacks) != 1:
        what = f"layers in {', '.join(sorted(stacks))}: name one of these stacks by targets=" if stacks else "no layers"
        raise ValueError(f"the last {asked.last} layers are asked for, and the model has {what}")
    ((stack, layers),) = stacks.items()
    if asked.last > len(layers):
        raise ValueError(f"the last {asked.last} layers are asked for, and {stack} has {len(layers)}")
    return dataclasses.replace(asked, layers=tuple(sorted(layers)[-asked.last :]))


def _check_sharing(everything: list[Found], planned: list[Planned]) -> None:
    """A parameter that another module reads too cannot be changed through one of them."""
    owners: dict[int, list[str]] = {}
    for found in everything:
        for leaf in own_leaves(found.module).values():
            owners.setdefault(id(leaf), []).append(found.path)
    for plan in planned:
        leaves = own_leaves(plan.found.module)
        touched = leaves if any(plan.active) else plan.saved
        for name in touched:
            shared = owners[id(leaves[name])]
            if len(shared) > 1:
                raise ValueError(
                    f"{' and '.join(shared)} share one parameter, {name}, so an adapter on {plan.found.path} would "
                    "change them all when merged; share the module instead of the parameter, or choose another target"
                )
