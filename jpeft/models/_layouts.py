# SPDX-License-Identifier: Apache-2.0
"""A checkpoint brought to its table's names: other prefixes, older names, several tensors in one."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from . import _safetensors as safetensors
from ._files import CheckpointError, names
from ._safetensors import Tensor
from ._table import Entry, Joined, Renamed, Rule, rules


def in_layout(entries: Sequence[Entry], tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> tuple[Entry, ...]:
    """The table with its names as the checkpoint has them: with one of the backbone's prefixes, or without."""

    def used(names: Iterable[str]) -> str:
        found = [*names]
        return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in found)), "")

    ours, theirs = used(rule.hf for rule in rules(entries)), used(tensors)

    def rename(hf: str) -> str:
        return theirs + hf.removeprefix(ours) if hf.startswith(ours) and not hf.startswith("...") else hf

    def fitted(entry: Entry) -> Entry:
        if isinstance(entry, Renamed | Joined):
            return entry
        file = {"file": rename(entry.file or entry.hf)} if isinstance(entry, Rule) else {}
        return dataclasses.replace(entry, hf=rename(entry.hf), **file)

    return tuple(map(fitted, entries))


def renamed_tensors(
    tensors: Mapping[str, Tensor], entries: Sequence[Entry], today: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors by the table's names, given those by what files call them, and in its parts."""
    endings = [entry for entry in entries if isinstance(entry, Renamed)]
    joined = [entry for entry in entries if isinstance(entry, Joined)]
    found: dict[str, Tensor] = {}
    twice: list[str] = []
    for key, tensor in tensors.items():
        whole = next((e for e in joined if key.endswith(e.old)), None)
        if key in today:
            parts = {today[key]: tensor}
        elif whole is None:
            parts = {next((key.removesuffix(e.old) + e.new for e in endings if key.endswith(e.old)), key): tensor}
        else:
            parts = _taken_apart(key, tensor, whole)
        twice += {*parts} & {*found}
        found |= parts
    if twice:
        raise CheckpointError(f"the checkpoint has under two names each: {names(twice)}")
    return found


def _taken_apart(key: str, tensor: Tensor, joined: Joined) -> dict[str, Tensor]:
    """What `tensor` holds, each by its own name; itself where its shape is of no such parts."""
    each = "{e}" in joined.parts[0]
    rows = tensor.shape[each : each + 1]
    if not rows or rows[0] % len(joined.parts) or tensor.dtype not in safetensors.FLOATS:
        return {key: tensor}
    start = key.removesuffix(joined.old)
    numbers = range(tensor.shape[0]) if each else (0,)
    shape = (rows[0] // len(joined.parts), *tensor.shape[each + 1 :])
    size = math.prod(shape) * safetensors.FLOATS[tensor.dtype].itemsize
    keys = [start + part.format(e=e) for e in numbers for part in joined.parts]
    places = [tensor.start + i * size for i in range(len(keys) + 1)]
    return {key: tensor._replace(shape=shape, start=places[i], stop=places[i + 1]) for i, key in enumerate(keys)}
