# SPDX-License-Identifier: Apache-2.0
"""Weights read and written by a table, which is total in both directions (`_table.py` says what is in one).

A checkpoint key without an entry, an entry without its key, a leaf that nothing sets and a wrong shape are errors; all
of them are collected and raised as one.
"""

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from . import _safetensors as safetensors
from ._checkpoint import write_checkpoint
from ._files import CheckpointError, names
from ._layouts import in_layout, renamed_tensors
from ._safetensors import Source, Tensor
from ._table import Entry, How, Ignore, Rule, Tied, fill, num_indices, rules

Sharding = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]
#: Reads a leaf; or, given the first layer and the one behind the last, these layers of it.
Read = Callable[..., jax.Array]
_LOG = logging.getLogger("jpeft")
#: Tensors of one leaf that are read at once.
_THREADS = 4


# Reading ------------------------------------------------------------------------------------------------------------


def load_leaves(
    tensors: Mapping[str, Tensor],
    entries: Sequence[Entry],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    sharding: Sharding | None = None,
    *,
    prefixes: Sequence[str] = (),
    droppable: Sequence[str] = (),
    fresh: Sequence[str] = (),
    convert: Callable[[str, jax.ShapeDtypeStruct, Read], Mapping[str, jax.Array]] = lambda path, _, read: {
        path: read()
    },
    codes: Callable[[str, Sequence[Tensor], Sequence[int]], Mapping[str, jax.Array] | None] = lambda *_: None,
) -> dict[str, jax.Array]:
    """Reads every leaf, each device's slice straight to its dtype and place.

    Args:
      tensors: what `open_checkpoint` found.
      entries: the model's table.
      shapes: every leaf of the model, with the dtype wanted.
      sharding: (path, shape) -> where the leaf goes; None puts all on the default device.
      prefixes: what checkpoints with a head put before the backbone's names (`"bert."`); it is added to the table's
        names, taken off them or exchanged to fit the checkpoint.
      droppable: starts of names (after the prefix) that another task's checkpoint may hold; dropped and logged.
      fresh: starts of paths that may be absent from the checkpoint; they are then absent from the result.
      convert: (path, shape, what reads the leaf) -> what is kept of it, by path.
      codes: (path, its tensors, layer axes) -> the same of a leaf whose tensors are codes; None of one in floats.

    Raises:
      CheckpointError: naming every unmapped key, missing key, leaf without a rule, wrong shape and wrong dtype.
    """
    entries = in_layout(entries, tensors, prefixes)
    parts = {rule.path: _parts(rule, shapes[rule.path]) for rule in rules(entries) if rule.path in shapes}
    tensors = renamed_tensors(tensors, entries, {part.file: part.key for leaf in parts.values() for part in leaf})
    for path in [path for path in parts if path.startswith(tuple(fresh))]:
        if not any(part.key in tensors for part in parts[path]):
            del parts[path]
    unmapped = _unmapped(tensors, entries, parts)
    starts = tuple(prefix + start for prefix in ("", *prefixes) for start in droppable)
    dropped = {key for key in unmapped if key.startswith(starts)}
    strays = {
        "keys that the model has no place for": unmapped - dropped,
        "rules for leaves that the model does not have": {rule.path for rule in rules(entries)} - {*shapes},
        "leaves that no rule sets": {*shapes} - {rule.path for rule in rules(entries)},
        "missing keys": {part.key for leaf in parts.values() for part in leaf} - {*tensors},
    }
    problems = [f"{what}: {names(found)}" for what, found in strays.items() if found]
    problems += [
        text for leaf in parts.values() for part in leaf if part.key in tensors for text in _misfit(part, tensors)
    ]
    if problems or (problems := _untied(tensors, entries, parts)):
        raise CheckpointError("the checkpoint does not fit the model\n  " + "\n  ".join(problems))
    if dropped:
        _LOG.warning("dropped weights of another task: %s", names(dropped, len(dropped)))
    kept: dict[str, jax.Array] = {}
    for path, own in parts.items():
        lead = shapes[path].shape[: -len(own[0].shape)] if own[0].shape else shapes[path].shape
        found = codes(path, [tensors[part.key] for part in own], lead)
        if found is None:
            read = functools.partial(_layers, path, own, tensors, shapes[path], sharding)
            found = convert(path, shapes[path], read)
        kept |= found
    return kept


class _Part(NamedTuple):
    """One tensor's share of a leaf: its name, that in a file, how its axes lie, and its shape inside the leaf."""

    key: str
    file: str
    how: How
    shape: tuple[int, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        return self.how.to_hf or tuple(range(len(self.shape)))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.axes)


def _parts(rule: Rule, leaf: jax.ShapeDtypeStruct) -> list[_Part]:
    """The tensors that make up a leaf, layer by layer."""
    lead = num_indices(rule.hf)
    return [
        _Part(fill(rule.hf, *index), fill(rule.file or rule.hf, *index), rule.how, leaf.shape[lead:])
        for index in np.ndindex(leaf.shape[:lead])
    ]


def _unmapped(
    tensors: Mapping[str, Tensor], entries: Sequence[Entry], parts: Mapping[str, Sequence[_Part]]
) -> set[str]:
    known = {part.key for leaf in parts.values() for part in leaf} | {e.hf for e in entries if isinstance(e, Tied)}
    patterns = [re.escape(e.hf) for e in entries if isinstance(e, Ignore)]
    ignored = re.compile("|".join(p.replace(r"\{i\}", r"\d+").replace(r"\.\.\.", ".*") for p in patterns))
    return {key for key in tensors if key not in known and not ignored.fullmatch(key)}


def _misfit(part: _Part, tensors: Mapping[str, Tensor]) -> list[str]:
    tensor = tensors[part.key]
    if tensor.dtype not in safetensors.FLOATS:
        return [f"{part.key} is {tensor.dtype}; a weight is one of {names(safetensors.FLOATS)}"]
    if tensor.shape == part.tensor_shape:
        return []
    return [f"{part.key} is {list(tensor.shape)}, the model needs {list(part.tensor_shape)}"]


def _untied(tensors: Mapping[str, Tensor], entries: Sequence[Entry], parts: Mapping[str, Sequence[_Part]]) -> list[str]:
    pairs = [(e.hf, parts[e.path][0].key) for e in entries if isinstance(e, Tied) and e.hf in tensors]
    return [
        f"{copy} differs from {original}, but the config ties them (tie_word_embeddings)"
        for copy, original in pairs
        if not safetensors.equal(tensors[copy], tensors[original])
    ]


def _layers(
    path: str,
    parts: Sequence[_Part],
    tensors: Mapping[str, Tensor],
    leaf: jax.ShapeDtypeStruct,
    sharding: Sharding | None,
    first: int = 0,
    stop: int | None = None,
) -> jax.Array:
    """A leaf, or some layers of a stack: the entries from `first` to before `stop` of its first axis."""
    if stop is None:
        return _leaf(path, parts, tensors, leaf, sharding)
    each = len(parts) // leaf.shape[0]
    some = jax.ShapeDtypeStruct((stop - first, *leaf.shape[1:]), leaf.dtype)
    return _leaf(path, parts[first * each : stop * each], tensors, some, sharding)


def _leaf(
    path: str,
    parts: Sequence[_Part],
    tensors: Mapping[str, Tensor],
    leaf: jax.ShapeDtypeStruct,
    sharding: Sharding | None,
) -> jax.Array:
    place = None if sharding is None else sharding(path, leaf)
    everything = (slice(None),) * len(leaf.shape)
    indices = [everything] if place is None else place.addressable_devices_indices_map(leaf.shape).values()
    buffers = {_bounds(index, leaf.shape): _buffer(index, leaf) for index in indices}
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [
            pool.submit(job)
            for number, part in enumerate(parts)
            for job in safetensors.reading(tensors[part.key], _targets(part, number, leaf, buffers))
        ]
        for job in jobs:
            job.result()
    if place is None:
        return jax.device_put(buffers[_bounds(everything, leaf.shape)])
    return jax.make_array_from_callback(
        leaf.shape, place, lambda index: buffers[_bounds(index, leaf.shape)], leaf.dtype
    )


_Bounds = tuple[tuple[int, int], ...]


def _bounds(index: tuple[slice, ...] | None, shape: Sequence[int]) -> _Bounds:
    """Where a slice of a leaf starts and stops; devices that hold the same share one buffer."""
    index = (slice(None),) * len(shape) if index is None else index
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _buffer(index: tuple[slice, ...] | None, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    return safetensors.empty([stop - start for start, stop in _bounds(index, leaf.shape)], np.dtype(leaf.dtype))


def _targets(
    part: _Part, number: int, leaf: jax.ShapeDtypeStruct, buffers: Mapping[_Bounds, np.ndarray]
) -> list[tuple[tuple[slice, ...], np.ndarray]]:
    """What of a tensor goes where: slices of it, and the parts of buffers that they are."""
    lead = len(leaf.shape) - len(part.shape)
    row = np.unravel_index(number, leaf.shape[:lead])  # of a stack: its layer, and its expert
    targets = []
    for bounds, buffer in buffers.items():
        outer, inner = bounds[:lead], bounds[lead:]
        if not all(first <= at < last for at, (first, last) in zip(row, outer, strict=True)):
            continue
        own = buffer[*(at - first for at, (first, _) in zip(row, outer, strict=True)), ...]
        targets.append((tuple(slice(*inner[axis]) for axis in part.axes), own.transpose(part.axes)))
    return targets


# Writing ------------------------------------------------------------------------------------------------------------


def save_leaves(
    folder: Path,
    entries: Sequence[Entry],
    leaves: Mapping[str, jax.Array],
    *,
    codes: Mapping[str, Source] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes every leaf under its Hugging Face name, in files of at most `shard_bytes` (or one tensor), with an index.

    One leaf at a time is held in host memory. `codes` are tensors that are written beside them, by name.

    Raises:
      CheckpointError: a leaf without a rule, or a rule without its leaf.
    """
    how = {rule.path: rule for rule in rules(entries)}
    if {*how} != {*leaves}:
        raise CheckpointError(
            f"the table and the model disagree about {names({*how} ^ {*leaves})}; merge or strip adapters, and "
            "dequantize, before saving"
        )
    sources = {key: source for path, leaf in leaves.items() for key, source in _sources(how[path], leaf).items()}
    write_checkpoint(folder, sources | dict(codes or {}), shard_bytes)


def _sources(rule: Rule, leaf: jax.Array) -> dict[str, Source]:
    """What to write for one leaf; its layers share one copy in host memory, gone with the last of them."""
    values: list[np.ndarray] = []
    parts = _parts(rule, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))

    def fetch(row: int) -> np.ndarray:
        if not values:
            values.append(_host(rule.path, leaf))
        array = values[0].reshape(-1, *parts[0].shape)[row]
        if row == len(parts) - 1:
            values.clear()
        return array.transpose(parts[row].axes)

    return {
        part.file: Source(part.tensor_shape, leaf.dtype, functools.partial(fetch, row))
        for row, part in enumerate(parts)
    }


def _host(path: str, leaf: jax.Array) -> np.ndarray:
    """A leaf's values, shard by shard, so that JAX caches no copy of the whole."""
    if not leaf.is_fully_addressable:
        raise ValueError(f"{path} lies on several hosts; gather the model on one before saving it")
    out = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            out[shard.index] = shard.data
    return out
