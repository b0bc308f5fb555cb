# SPDX-License-Identifier: Apache-2.0
"""What makes a run this run: a flat table, saved with every checkpoint and compared before one is resumed from.

What decides a loss (data, template, seed, sizes, method, the base's own values) must be the same. What may round
otherwise (the mesh, versions, the kind of device) may be another, and is said.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .._partition import Leaves
from ..models import CheckpointError
from .config import Config
from .job import Dataset, Parts
from .readers import called

#: May differ without a word: where things are written, and what is only shown.
FREE = ("out", "compilation_cache", "data.cache", "logging.", "train.save_every", "train.keep")
_PLACE = "path of "
#: May differ, and is said: on other machines results are equal up to rounding, not bit for bit; and where the base, the
#: data and the template lie, which are known by their digests.
STATED = ("mesh", "uneven", "processes", "device", "version.", "train.on_nan", "train.max_skips", _PLACE)
_VERSIONS = ("jpeft", "jax", "jaxlib", "flax", "optax")
_ABSENT = "(nothing)"


def identity(config: Config, dataset: Dataset, parts: Parts) -> dict[str, Any]:
    """What a run is, by dotted names: the configuration's keys, digests, versions, devices; plain JSON."""
    found = options(config) | {
        "data files": list(dataset.digests.values()),
        called(dataset.reader): dataset.reader.digest,
        **dataset.known_by,
        "labels": list(dataset.label_names or ()),
        "rows": len(dataset.train.examples) * dataset.train.examples.per_example,  # of a stream, of its first window
        "batches an epoch": dataset.train.buckets.num_batches,
        "updates": dataset.num_updates,
        "base": fingerprint(parts.frozen),
        "processes": jax.process_count(),
        "device": jax.devices()[0].device_kind,
    }
    versions = {f"version.{name}": importlib.metadata.version(name) for name in _VERSIONS}
    return json.loads(json.dumps(found | versions))


def options(config: Config) -> dict[str, Any]:
    """A configuration by dotted names, with what is only a place apart from what is done with what lies there."""
    tree = dataclasses.asdict(config)
    places = {"path of the base": tree["model"].pop("path")}
    for split in ("train", "eval"):
        sources = [dataclasses.asdict(source) for source in config.data.sources(split)]
        places[f"path of data.{split}"] = [source.pop("path") for source in sources]
        tree["data"][split] = sources
    if config.data.template is not None and Path(config.data.template).is_file():
        places["path of data.template"] = tree["data"].pop("template")
    return json.loads(json.dumps(flat(tree) | places))


def check_finished(saved: Config, here: Config) -> None:
    """Refuses what is asked of a finished run that is another one, or on data that lies elsewhere and is not read.

    Raises:
      CheckpointError: a line for each key that decides a loss and differs.
    """
    refused, stated = _differences(options(saved), options(here), "in the finished run")
    refused += [line for line in stated if line.startswith(_PLACE)]
    if refused:
        raise CheckpointError(
            f"{here.out} holds a finished run, which is another one:\n  " + "\n  ".join(refused) + "\n"
            "--overwrite replaces it, and out= names another folder"
        )


def compare(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What is another and may be, a line each.

    Raises:
      CheckpointError: what may not; a line each.
    """
    refused, stated = _differences(saved, here, "in the checkpoint")
    if refused:
        raise CheckpointError(
            "the run cannot be resumed, for it would be another one:\n  " + "\n  ".join(refused) + "\n"
            "Take these back, or begin a new run with another out="
        )
    return stated


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any], where: str) -> tuple[list[str], list[str]]:
    """What is another and may not be, and what may, a line each."""
    refused, stated = [], []
    for name in {**saved, **here}:
        was, now = saved.get(name, _ABSENT), here.get(name, _ABSENT)
        if was == now or name.startswith(FREE):
            continue
        line = f"{name}: {_brief(was)} {where}, {_brief(now)} now"
        (stated if name.startswith(STATED) else refused).append(line)
    return refused, stated


def fingerprint(frozen: Leaves) -> str:
    """A digest of the frozen leaves' names, types and values, computed where they lie; the same on every mesh."""
    names = sorted(frozen)
    sums = jax.device_get(jax.jit(_sums)({name: frozen[name] for name in names}))
    described = [(name, str(frozen[name].dtype), [*frozen[name].shape], int(sums[name])) for name in names]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict with dotted names."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {name: value for key, inner in tree.items() for name, value in flat(inner, f"{prefix}{key}.").items()}


def _sums(frozen: Leaves) -> dict[str, jax.Array]:
    return {name: _sum(leaf) for name, leaf in frozen.items()}


def _sum(leaf: jax.Array) -> jax.Array:
    """Sum of all elements' bits, each times an odd number of its own place, modulo 2^32: in any order the same."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        width = leaf.dtype.itemsize
        bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width])
    else:
        bits = leaf
    place = jnp.ones(bits.shape, jnp.uint32)
    for dim in range(bits.ndim):
        place = place * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    return jnp.sum((bits.astype(jnp.uint32) + jnp.uint32(1)) * (2 * place + 1), dtype=jnp.uint32)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
