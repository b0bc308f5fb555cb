# SPDX-License-Identifier: Apache-2.0
"""What trials are made of, read once for all of them: data, bases, and adapters stacked on one base."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._adapt import adapt
from ..._bank import Bank, Own, bank
from ..._fields import Frozen
from ..._graft import ADAPTERS
from ..._partition import Leaves, combine, partition
from .. import config as configuration
from .. import job
from ..config import Config
from ..loop import check_plan

#: Bases that are kept: they differ in their new heads, one for each seed.
_BASES = 4


class Material:
    """Data sets and bases of configurations, as `jpeft train` reads them."""

    def __init__(self) -> None:
        self._datasets: dict[str, job.Dataset] = {}
        self._bases: dict[str, Any] = {}

    def dataset(self, config: Config) -> job.Dataset:
        """What a configuration is trained and judged on. Raises as `job.read_data`."""
        tree = configuration.plain(config)
        drawn = any(source.weight != 1 for source in config.data.sources("train"))
        length = {name: tree["train"][name] for name in ("batch_size", "accumulation", "epochs", "max_steps")}
        read = {name: tree["train"][name] for name in ("objective", *(["seed"] if drawn else []))}
        key = json.dumps([tree["data"], tree["model"], length, read])
        if key not in self._datasets:
            self._datasets[key] = job.read_data(config)
        return self._datasets[key]

    def model(self, config: Config) -> Any:
        """The adapted model before the first update. Raises as `job.build`, and where the method plans otherwise."""
        method, dataset = configuration.method(config.method), self.dataset(config)
        check_plan(method, dataset.num_updates)
        key = json.dumps([dataclasses.asdict(config.model), dataset.label_names, config.train.seed])
        if key not in self._bases:
            if len(self._bases) == _BASES:
                del self._bases[next(iter(self._bases))]
            self._bases[key] = job.load_base(config, dataset.label_names)
        return adapt(self._bases[key], method, key=job.start_key(config))


def stack(models: Sequence[Any]) -> Bank:
    """Adapted models of one make as a bank; their bases may differ in some leaves, as new heads of several seeds do.

    Models that are equal in all but numbers are stacked as they are, of any method; others as `jpeft.bank` pads them.

    Raises:
      ValueError: as `jpeft.bank`.
    """
    parts = [partition(model) for model in models]
    differ = _differ([frozen for _, _, frozen in parts])
    if all(graphdef == parts[0][0] and _shapes(own) == _shapes(parts[0][1]) for graphdef, own, _ in parts):
        trainable = {path: _slots([own[path] for _, own, _ in parts]) for path in parts[0][1]}
        plain = Bank(parts[0][0], trainable, {}, dict(parts[0][2]), tuple(Own(g, _sizes(t | f)) for g, t, f in parts))
        return _apart(plain, parts, differ)
    base = {path: leaf for path, leaf in parts[0][2].items() if ADAPTERS not in path.split("/")}
    shared = [combine(graphdef, own, frozen | base) for graphdef, own, frozen in parts]
    return _apart(bank(shared), parts, [path for path in differ if path in base])


def _apart(made: Bank, parts: Sequence[Any], paths: Sequence[str]) -> Bank:
    """With these leaves of the base as each slot's own."""
    constants = made.constants | {path: _slots([frozen[path] for _, _, frozen in parts]) for path in paths}
    frozen = {path: leaf for path, leaf in made.frozen.items() if path not in paths}
    return dataclasses.replace(made, constants=constants, frozen=frozen)


def _slots(leaves: Sequence[jax.Array]) -> jax.Array:
    """`[slots, ...]`, slot 0 with the first one's."""
    return jnp.stack([leaves[0], *leaves])


def _differ(halves: Sequence[Leaves]) -> list[str]:
    """Leaves that all have in one shape and not in one value."""
    first, *others = halves
    return [
        path
        for path, leaf in first.items()
        if all(path in other and other[path].shape == leaf.shape for other in others)
        and any(other[path] is not leaf and not np.array_equal(other[path], leaf) for other in others)
    ]


def _shapes(leaves: Leaves) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in leaves.items()}


def _sizes(leaves: Leaves) -> Frozen:
    return Frozen({path: leaf.shape for path, leaf in leaves.items() if ADAPTERS in path.split("/")})
