# SPDX-License-Identifier: Apache-2.0
"""PEFT's rules of which modules an adapter_config.json means, and a short way to say a given choice in them."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ._names import HEADS, Names


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


def describe(adapted: Collection[str], every: Collection[str]) -> tuple[list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform` that mean exactly `adapted` among the modules `every`.

    The shortest endings of names where they suffice, alone or with the layers; else the full names.
    """
    adapted = {*adapted}
    numbers = sorted({int(part) for name in adapted for part in name.split(".") if part.isdigit()})
    for layers in (None, numbers):
        meant: dict[str, set[str]] = {}

        def fits(ending: str, layers: Any = layers, meant: dict[str, set[str]] = meant) -> bool:
            if ending not in meant:
                config = {"target_modules": [ending], "layers_to_transform": layers}
                meant[ending] = {name for name in every if selected(config, name)}
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


def tie(chosen: Collection[str], tied: Mapping[str, tuple[str, ...]], ensure: bool, field: str) -> set[str]:
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
                "this model they are one table (tie_word_embeddings), so that the change would be in both; PEFT keeps "
                "them together with ensure_weight_tying=True"
            )
        chosen = chosen - both | {embedding}
    return chosen


def saved_modules(config: Mapping[str, Any], names: Names, ensure: bool) -> list[str]:
    """Hugging Face names of all leaf-owning modules in `modules_to_save`, which PEFT reads as endings of names.

    Raises:
      ValueError: one is none of the model's, or half of a table that is the head too.
    """
    automatic = HEADS.get(config.get("task_type") or "", ())
    known = {*names.paths} | {head for heads in names.tied.values() for head in heads}
    chosen: set[str] = set()
    for entry in {*(config.get("modules_to_save") or ()), *automatic}:
        roots = {name for name in names.every if name.endswith(entry)}
        if not roots and entry not in automatic:
            raise ValueError(f"modules_to_save names {entry!r}, which this model does not have")
        chosen |= {name for name in known for root in roots if name == root or name.startswith(f"{root}.")}
    return sorted(tie(chosen, names.tied, ensure, "modules_to_save"))
