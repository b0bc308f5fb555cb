# SPDX-License-Identifier: Apache-2.0
"""Which trials are trained together: those whose compiled step is the same but for numbers.

Numbers are the seed, the learning rate, the weight decay, the clipping norm, and whatever a bank pads or keeps as a
constant of each slot: ranks, alphas, numbers of virtual tokens, sizes of bottlenecks. Whether a bank takes two methods
is asked of the bank itself, by shape, so nothing here names a method.

Each trial is to be what `jpeft train` alone would make of it, so three things keep trials apart that a step could hold
together: an optimizer that looks at whole matrices would see the padding; dropout is drawn by place, so rows must not
grow by another's virtual tokens; and with several widths of rows the seeds differ in the order of widths.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..._graft import grafts
from ..._partition import combine, partition
from ..._slots import check_make, slots
from .. import config as configuration
from .. import job
from ..config import Config
from ..packing import Packs
from .space import Trial

#: Optimizers that treat every number by itself, and so do not see padding.
_BY_NUMBER = ("adamw", "lion", "sgd")
#: Seams at which an adapter makes what is attended to longer.
_LONGER = ("keys_values", "input")


def numbers(config: Config) -> dict[str, float]:
    """What the optimizers of trials that are trained together may differ in: options of `optimizer_of`."""
    own = {"lr": config.optimizer.lr, "weight_decay": config.optimizer.weight_decay}
    return own if config.optimizer.clip is None else own | {"clip": config.optimizer.clip}


def chunks(trials: Sequence[Trial], limit: int, dataset: Callable[[Config], job.Dataset]) -> list[list[Trial]]:
    """Trials that are trained together, at most `limit` at once, in lots of nearly one size.

    Args:
      trials: in any order.
      limit: trials at once.
      dataset: what a configuration is trained on.
    """
    groups: dict[str, list[list[Trial]]] = {}
    for trial in trials:
        same = groups.setdefault(_fixed(trial.config), [])
        place = next((group for group in same if _fit(group[0].config, trial.config, dataset)), None)
        if place is None:
            same.append([trial])
        else:
            place.append(trial)
    out = []
    for group in (group for same in groups.values() for group in same):
        for lot in _by_seed(group, dataset(group[0].config)):
            parts = -(-len(lot) // limit)
            size = -(-len(lot) // parts)
            out += [lot[i : i + size] for i in range(0, len(lot), size)]
    return out


def one_width(dataset: job.Dataset) -> bool:
    """Whether all batches have one shape, whatever their order."""
    buckets = dataset.train.buckets
    return isinstance(buckets, Packs) or len(buckets.widths) == 1


def _by_seed(group: list[Trial], dataset: job.Dataset) -> list[list[Trial]]:
    drawn = any(source.weight != 1 for source in group[0].config.data.sources("train"))  # rows differ by seed, too
    if one_width(dataset) and not drawn:
        return [group]
    seeds = dict.fromkeys(trial.seed for trial in group)
    return [[trial for trial in group if trial.seed == seed] for seed in seeds]


def _fixed(config: Config) -> str:
    """What trials that are trained together have in common, but for the method."""
    tree = configuration.plain(config)
    for name in numbers(config):
        del tree["optimizer"][name]
    del tree["out"], tree["method"], tree["train"]["seed"]
    return json.dumps(tree, sort_keys=True)


def _fit(a: Config, b: Config, dataset: Callable[[Config], job.Dataset]) -> bool:
    """Whether two configurations with the same `_fixed` can be trained together."""
    if a.method == b.method:
        return True
    return _take(_text(a), _text(b), dataset(a).label_names)


def _text(config: Config) -> str:
    """A configuration with numbers that are the same for all."""
    optimizer = dataclasses.replace(config.optimizer, min_lr=None, **dict.fromkeys(numbers(config), 1.0))
    train = dataclasses.replace(config.train, seed=0)
    return json.dumps(configuration.plain(dataclasses.replace(config, optimizer=optimizer, train=train)))


@functools.lru_cache(maxsize=256)
def _take(a: str, b: str, names: tuple[str, ...] | None) -> bool:
    """Whether a bank takes the two methods, and trains each as it would be alone."""
    configs = [configuration.parse(json.loads(text)) for text in (a, b)]
    models = [job.by_shape(config, names) for config in configs]
    parts = [partition(model) for model in models]
    graphdefs, leaves = [part[0] for part in parts], [part[1:] for part in parts]
    if _same_shapes(*parts):
        return True
    if any(config.optimizer.name not in _BY_NUMBER for config in configs):
        return False
    if configs[0].train.dropout and _longer(models[0]) != _longer(models[1]):
        return False

    def joint(leaves: Any) -> Any:
        made = [combine(graphdef, *own) for graphdef, own in zip(graphdefs, leaves, strict=True)]
        check_make([partition(slot)[0] for slot in slots(made)][1:])
        return leaves[0][0]

    try:
        jax.eval_shape(joint, leaves)
    except ValueError:
        return False
    return True


def _same_shapes(a: Any, b: Any) -> bool:
    shapes = [{path: leaf.shape for half in part[1:] for path, leaf in half.items()} for part in (a, b)]
    return a[0] == b[0] and shapes[0] == shapes[1]


def _longer(model: Any) -> list[Any]:
    """The methods that make what is attended to longer, and where they stand."""
    return [
        (path, name, adapter.method)
        for path, module in grafts(model)
        for name, adapter in module.adapters.items()
        if adapter.site.seam in _LONGER
    ]
