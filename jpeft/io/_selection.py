# SPDX-License-Identifier: Apache-2.0
"""Which modules an adapter_config.json means, by PEFT's rules, and a short way to say a given choice in them.

What is written and read here is the same for every method that sits on modules: `target_modules`, `exclude_modules`,
`layers_to_transform`, `modules_to_save`, and the patterns of values by name.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from .._matching import pattern_matches, pattern_value
from .._method import Adapter
from ._names import HEADS, Names

#: Whether a module of this name is meant by `target_modules` and the other keys of a configuration.
Rule = Callable[[Mapping[str, Any], str], bool]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where an adapter_config.json puts its adapter.

    Attributes:
      adapted: names of the modules that the method acts on; a tied head counts as the embedding.
      targets, layers, modules_to_save: the same for a method of jpeft.
    """

    adapted: frozenset[str]
    targets: list[str]
    layers: list[int] | None
    modules_to_save: list[str]


def adapted_names(adapters: Iterable[Adapter]) -> list[str]:
    """Names of the modules that an adapter acts on, given its parts."""
    sites = [adapter.site for adapter in adapters if adapter.acts]
    return [name for site in sites for name, acts in zip(site.names, site.active, strict=True) if acts]


def read_places(
    config: Mapping[str, Any],
    names: Names,
    among: Collection[str],
    *,
    layered: bool = True,
    ensure: bool | None = None,
) -> Places:
    """Where PEFT puts an adapter of this configuration.

    Args:
      among: names of the modules that the method can act on.
      layered: whether the method has `layers_to_transform`.
      ensure: its `ensure_weight_tying`; None where it has none.

    Raises:
      ValueError: nothing is chosen, or half of a tied table, or a saved module that the model does not have.
    """
    whole = saved_modules(config, names, ensure)
    adapted = tie(_adapted(config, names, among, whole), names.tied, ensure, "target_modules")
    targets, layers = describe(adapted, names.own, layered=layered)
    return Places(frozenset(adapted), targets, layers, sorted({names.paths[name] for name in whole}))


def _adapted(config: Mapping[str, Any], names: Names, among: Collection[str], whole: Sequence[str]) -> set[str]:
    """Names of the modules that PEFT adapts: those that it selects, unless they are trained whole."""
    targets = config.get("target_modules")
    if not targets:
        raise ValueError(f"target_modules is {targets!r}; an adapter that PEFT saved says which modules it is on")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = sorted(names.linear)
    rules = {**config, "target_modules": targets, "modules_to_save": whole}
    adapted = {name for name in among if selected(rules, name)}
    if not adapted:
        raise ValueError(f"target_modules={config['target_modules']!r} is no module of this model that it could act on")
    return adapted


def saved_modules(config: Mapping[str, Any], names: Names, ensure: bool | None) -> list[str]:
    """Hugging Face names of all leaf-owning modules in `modules_to_save`, which PEFT reads as endings of names.

    Raises:
      ValueError: one is none of the model's, or half of a table that is the head too.
    """
    automatic = HEADS.get(config.get("task_type") or "", ())
    known = {*names.paths} | names.repeats
    chosen: set[str] = set()
    for entry in {*(config.get("modules_to_save") or ()), *automatic}:
        roots = {name for name in names.every if name.endswith(entry)}
        if not roots and entry not in automatic:
            raise ValueError(f"modules_to_save names {entry!r}, which this model does not have")
        chosen |= {name for name in known for root in roots if name == root or name.startswith(f"{root}.")}
    return sorted(tie(chosen, names.tied, ensure, "modules_to_save"))


def selected(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT adapts the module `name` under these `target_modules`, `exclude_modules` and layer settings."""
    targets, exclude = config["target_modules"], config.get("exclude_modules") or ()
    if _matches(exclude, name) or _inside(name, config.get("modules_to_save") or ()):
        return False
    if isinstance(targets, str) or name in targets:  # a full name counts in every layer
        return _matches(targets, name)
    return _matches(targets, name) and _in_layers(
        name, config.get("layers_to_transform"), config.get("layers_pattern") or ()
    )


def _matches(pattern: str | Collection[str], name: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in pattern)


def _inside(name: str, modules_to_save: Iterable[str]) -> bool:
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in modules_to_save)


def _in_layers(name: str, layers: int | Collection[int] | None, patterns: str | Collection[str]) -> bool:
    if layers is None or layers == []:
        return True
    containers = [patterns] if isinstance(patterns, str) else patterns
    rules = [rf"(?:^|.*?\.){container}\.(\d+)\." for container in containers] or [r".*?\.[^.]*\.(\d+)\."]
    match = next(filter(None, (re.match(rule, name) for rule in rules)), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def describe(
    adapted: Collection[str], every: Collection[str], *, layered: bool = True, rule: Rule = selected
) -> tuple[list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform` that mean exactly `adapted` among the modules `every`.

    The shortest endings of names where they suffice, alone or, if `layered`, with the layers; else the full names.
    """
    adapted = {*adapted}
    numbers = sorted({int(part) for name in adapted for part in name.split(".") if part.isdigit()})
    for layers in (None, numbers) if layered else (None,):
        meant: dict[str, set[str]] = {}

        def fits(ending: str, layers: Any = layers, meant: dict[str, set[str]] = meant) -> bool:
            if ending not in meant:
                config = {"target_modules": [ending], "layers_to_transform": layers}
                meant[ending] = {name for name in every if rule(config, name)}
            return bool(meant[ending]) and meant[ending] <= adapted

        endings = {next(filter(fits, _endings(name)), None) for name in adapted}
        targets = sorted(ending for ending in endings if ending)
        if {name for ending in targets for name in meant[ending]} == adapted:
            return targets, layers
    return sorted(adapted), None


def _endings(name: str) -> list[str]:
    """The endings of a name that hold no layer number, shortest first: `q_proj`, `self_attn.q_proj`."""
    parts = name.split(".")
    first = max((i + 1 for i, part in enumerate(parts) if part.isdigit()), default=0)
    return [".".join(parts[i:]) for i in range(len(parts) - 1, first - 1, -1)]


def tie(chosen: Collection[str], tied: Mapping[str, tuple[str, ...]], ensure: bool | None, field: str) -> set[str]:
    """`chosen` with a tied head counted as the embedding that it shares its table with.

    Raises:
      ValueError: one of the two is chosen and the other is not, which a model with one table for both cannot do.
    """
    chosen = {*chosen}
    for embedding, heads in tied.items():
        both = {embedding, *heads}
        if not chosen & both:
            continue
        if not (ensure or both <= chosen):
            raise ValueError(
                f"{field} names {', '.join(sorted(chosen & both))} but not {', '.join(sorted(both - chosen))}, and in "
                "this model they are one table (tie_word_embeddings), so that the change would be in both"
                + ("" if ensure is None else "; PEFT keeps them together with ensure_weight_tying=True")
            )
        chosen = chosen - both | {embedding}
    return chosen


def write_pattern(pattern: Mapping[str, Any], default: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`pattern` for a file, in which keys are sorted: itself where sorting changes nothing, else an entry per name.

    Args:
      wanted: the value of every adapted name.
    """
    ordered = dict(sorted(pattern.items()))
    if any(pattern_value(ordered, name, default) != value for name, value in wanted.items()):
        ordered = {name: value for name, value in sorted(wanted.items()) if value != default}
    return {key: number(value) for key, value in ordered.items()}


def read_pattern(pattern: Mapping[str, Any] | None, adapted: Collection[str]) -> dict[str, Any]:
    """The entries of a pattern that are about an adapted module; PEFT lets others stand without effect."""
    items = (pattern or {}).items()
    return {key: value for key, value in items if any(pattern_matches(key, name) for name in adapted)}


def number(value: float) -> float:
    """A whole number as an int, as PEFT writes it."""
    return int(value) if value == int(value) else float(value)
