# SPDX-License-Identifier: Apache-2.0
"""Weight tables: which Hugging Face tensor is which leaf, read in both directions and total in both.

A model's table is a tuple of entries:

  Rule("model.layers.{i}.self_attn.q_proj.weight", "layers/self_attn/q_proj/kernel", TRANSPOSE)
      one tensor is one leaf; with `{i}`, one tensor per layer, stacked on the leaf's first axis, and with `{e}` one per
      expert of a layer, on its second.
  Rule("layers.{i}.mlp.fc1.weight", "layers/mlp/fc1/kernel", TRANSPOSE, "encoder.layer.{i}.intermediate.dense.weight")
      the same, where files keep an older name than transformers' module has; what is read may have either.
  Tied("lm_head.weight", "embed_tokens/embedding")
      a copy of a leaf that a checkpoint may hold; it must agree with it, and is not written.
  Ignore("...rotary_emb.inv_freq")
      a tensor that is no weight. `...` stands for any start.
  Renamed(".gamma", ".weight")
      an ending that some checkpoints use for the table's.
  Joined(".experts.gate_up_proj", (".experts.{e}.w1.weight", ".experts.{e}.w3.weight"))
      an ending of tensors that hold several of the table's, one after another; with `{e}`, for each expert in turn.

A checkpoint key without an entry, an entry without its key, a leaf that nothing sets and a wrong shape are errors; all
of them are collected and raised as one.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from . import _safetensors as safetensors
from ._checkpoint import write_checkpoint
from ._files import CheckpointError, names
from ._safetensors import Source, Tensor

_LOG = logging.getLogger("jpeft")


class How(NamedTuple):
    """A pair of axis orders: a leaf is `tensor.transpose(to_jax)`, a tensor is `leaf.transpose(to_hf)`.

    None keeps the axes. The layer axis of a stack does not count.
    """

    to_jax: tuple[int, ...] | None = None
    to_hf: tuple[int, ...] | None = None


COPY = How()
#: torch's `Linear.weight` [d_out, d_in] as a kernel [d_in, d_out].
TRANSPOSE = How((1, 0), (1, 0))


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tensor `hf` is the leaf `path`; with `{i}` (and `{e}`) that of layer i (and expert e) is row i (and e).

    Files call it `file`, where that is not what transformers calls it in the model.
    """

    hf: str
    path: str
    how: How = COPY
    file: str = ""


@dataclasses.dataclass(frozen=True)
class Tied:
    """The tensor `hf`, if there, repeats the one of the leaf `path`, as a head or (`head=False`) as another table."""

    hf: str
    path: str
    head: bool = True


@dataclasses.dataclass(frozen=True)
class Ignore:
    """The tensor `hf` is no weight."""

    hf: str


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Some checkpoints end a name in `old` where the table has `new`."""

    old: str
    new: str


@dataclasses.dataclass(frozen=True)
class Joined:
    """Some checkpoints have one tensor, its name ending in `old`, in the place of those that end in `parts`.

    It holds them one after another along its first axis; with `{e}`, its first axis counts experts, and it holds them
    along its second for each.
    """

    old: str
    parts: tuple[str, ...]


Entry = Rule | Tied | Ignore | Renamed | Joined
Sharding = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]


def module_names(entries: Sequence[Entry], *sizes: int) -> dict[str, tuple[str, ...]]:
    """Hugging Face's names of the modules: NNX path -> one name, or one per layer (and expert) of a stack.

    Covers every module that owns leaves, and those around it as long as both sides call them the same.

    Args:
      entries: the table.
      sizes: how many layers there are, and experts in each.
    """
    found = {}
    for rule in rules(entries):
        path, hf = rule.path.rpartition("/")[0], rule.hf.rpartition(".")[0]
        while path:
            found[path] = tuple(fill(hf, *index) for index in np.ndindex(sizes[: num_indices(hf)]))
            (path, _, name), (hf, _, hf_name) = path.rpartition("/"), hf.rpartition(".")
            if name != hf_name or hf.endswith("{e}"):
                break
    return found


def rules(entries: Sequence[Entry]) -> list[Rule]:
    """The entries that set a leaf."""
    return [entry for entry in entries if isinstance(entry, Rule)]


def num_indices(pattern: str) -> int:
    """How many leading axes of a leaf count tensors of this name: of layers, and of experts in each."""
    return ("{i}" in pattern) + ("{e}" in pattern)


def fill(pattern: str, *index: int) -> str:
    """`pattern` with the numbers of the layer and the expert in the places of `{i}` and `{e}`."""
    return pattern.format(**dict(zip("ie", index, strict=False)))


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
    convert: Callable[[str, jax.Array], Mapping[str, jax.Array]] = lambda path, leaf: {path: leaf},
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
      convert: (path, leaf) -> what is kept of it, by path; a leaf is read when the one before is converted.

    Raises:
      CheckpointError: naming every unmapped key, missing key, leaf without a rule, wrong shape and wrong dtype.
    """
    entries = _in_layout(entries, tensors, prefixes)
    parts = {rule.path: _parts(rule, shapes[rule.path]) for rule in rules(entries) if rule.path in shapes}
    tensors = _renamed(tensors, entries, {part.file: part.key for leaf in parts.values() for part in leaf})
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
    for path in parts:
        kept |= convert(path, _leaf(path, parts[path], tensors, shapes[path], sharding))
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


def _in_layout(entries: Sequence[Entry], tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> tuple[Entry, ...]:
    """The table with its names as the checkpoint has them: with one of the backbone's prefixes, or without."""

    def used(names: Iterable[str]) -> str:
        found = [*names]
        return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in found)), "")

    ours, theirs = used(rule.hf for rule in rules(entries)), used(tensors)

    def rename(hf: str) -> str:
        return theirs + hf.removeprefix(ours) if hf.startswith(ours) and not hf.startswith("...") else hf

    def renamed(entry: Entry) -> Entry:
        if isinstance(entry, Renamed | Joined):
            return entry
        file = {"file": rename(entry.file or entry.hf)} if isinstance(entry, Rule) else {}
        return dataclasses.replace(entry, hf=rename(entry.hf), **file)

    return tuple(map(renamed, entries))


def _renamed(tensors: Mapping[str, Tensor], entries: Sequence[Entry], today: Mapping[str, str]) -> dict[str, Tensor]:
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


def _leaf(
    path: str,
    parts: Sequence[_Part],
    tensors: Mapping[str, Tensor],
    leaf: jax.ShapeDtypeStruct,
    sharding: Sharding | None,
) -> jax.Array:
    lead = len(leaf.shape) - len(parts[0].shape)
    places = np.arange(len(parts)).reshape(leaf.shape[:lead])

    def values(index: tuple[slice, ...]) -> np.ndarray:
        out = np.empty([len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)], leaf.dtype)
        rows, inner = out.reshape(-1, *out.shape[lead:]), index[lead:]
        for n, place in enumerate(places[index[:lead]].ravel()):
            part, row = parts[place], rows[n, ...]  # of a scalar, too, a view
            safetensors.read(tensors[part.key], tuple(inner[axis] for axis in part.axes), row.transpose(part.axes))
        return out

    if sharding is None:
        return jax.device_put(values((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding(path, leaf), _once(values), leaf.dtype)


def _once(values: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """`values`, called once per distinct slice: devices that replicate one share it."""
    cache: dict[Any, np.ndarray] = {}

    def cached(index: Any) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in cache:
            cache[key] = values(index)
        return cache[key]

    return cached


# Writing ------------------------------------------------------------------------------------------------------------


def save_leaves(
    folder: Path,
    entries: Sequence[Entry],
    leaves: Mapping[str, jax.Array],
    *,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes every leaf under its Hugging Face name, in files of at most `shard_bytes` (or one tensor), with an index.

    One leaf at a time is held in host memory.

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
    write_checkpoint(folder, sources, shard_bytes)


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
