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
from typing import Any

import jax
import jax.numpy as jnp

from .._partition import Leaves
from ..models import CheckpointError
from .config import Config
from .job import Dataset, Parts
from .readers import called

#: May differ without a word: where things lie, and what is only shown.
FREE = ("out", "compilation_cache", "logging.", "train.save_every", "train.keep")
#: May differ, and is said: on other machines results are equal up to rounding, not bit for bit.
STATED = ("mesh", "processes", "device", "version.", "train.on_nan", "train.max_skips")
_VERSIONS = ("jpeft", "jax", "jaxlib", "flax", "optax")
_ABSENT = "(nothing)"


def identity(config: Config, dataset: Dataset, parts: Parts) -> dict[str, Any]:
    """What a run is, by dotted names: the configuration's keys, digests, versions, devices; plain JSON."""
    found = flat(dataclasses.asdict(config)) | {
        "data files": list(dataset.digests.values()),
        called(dataset.reader): dataset.reader.digest,
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


def compare(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What is another and may be, a line each.

    Raises:
      CheckpointError: what may not; a line each.
    """
    refused, stated = [], []
    for name in {**saved, **here}:
        was, now = saved.get(name, _ABSENT), here.get(name, _ABSENT)
        if was == now or name.startswith(FREE):
            continue
        line = f"{name}: {_brief(was)} in the checkpoint, {_brief(now)} now"
        (stated if name.startswith(STATED) else refused).append(line)
    if refused:
        raise CheckpointError(
            "the run cannot be resumed, for it would be another one:\n  " + "\n  ".join(refused) + "\n"
            "Take these back, or begin a new run with another out="
        )
    return stated


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
