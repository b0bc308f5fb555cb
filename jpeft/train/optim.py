# SPDX-License-Identifier: Apache-2.0
"""The optimizer that a configuration describes: a rule of optax's by group of leaves, a learning rate, and clipping."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import optax

from .._masks import mask
from .sections import Optimizer

#: Leaves that weight decay leaves alone, by the last part of their path: vectors, DoRA's magnitudes, and
#: AdapterFusion's value matrix, which its own regulariser pulls to the identity.
_NOT_DECAYED = re.compile(r"(\w+_)?(bias|scale)|m|value")
#: Leaves that are matrices in their last two axes, or stacks of them; all others are vectors, tables and tensors.
_MATRIX = re.compile(r"[ABRW]\d?|w[12](_[ab])?|down|up|(\w+_)?kernel")
#: Tables of vectors that are of one kind: matrices for Adafactor, whose moments they share; none for Muon.
_TABLE = re.compile(r"embedding|prompt")


def schedule(config: Optimizer, num_updates: int) -> optax.Schedule:
    """Learning rate of every update: linear from 0 over the warm-up, then by `config.schedule` to `min_lr` at the end.

    As transformers' `get_scheduler` gives it, whose first update has the rate 0 when there is a warm-up.

    Raises:
      ValueError: the warm-up, or the decay of `wsd`, does not fit into the run.
    """
    warmup = _updates("warmup", config.warmup, num_updates)
    rest = max(num_updates - warmup, 1)
    after = _after_warmup(config, num_updates, rest)
    return (
        after if not warmup else optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), after], [warmup])
    )


def _after_warmup(config: Optimizer, num_updates: int, rest: int) -> optax.Schedule:
    if config.schedule == "constant":
        return optax.constant_schedule(config.lr)
    lr, least = config.lr, config.value("min_lr")
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(lr, rest, alpha=least / lr)
    if config.schedule == "polynomial":
        return optax.polynomial_schedule(lr, least, config.value("power"), rest)
    if config.schedule == "linear":
        return optax.linear_schedule(lr, least, rest)
    falls = _updates("decay", config.value("decay"), num_updates)
    if falls > rest:
        raise ValueError(
            f"optimizer.warmup and optimizer.decay take {num_updates - rest} and {falls} updates; this run makes "
            f"{num_updates}"
        )
    fall = optax.linear_schedule(lr, least, max(falls, 1))
    return optax.join_schedules([optax.constant_schedule(lr), fall], [rest - falls])


def _updates(name: str, given: float, num_updates: int) -> int:
    """A number of updates, of itself or as a share of all."""
    count = math.ceil(given * num_updates) if given < 1 else int(given)
    if count > num_updates:
        raise ValueError(f"optimizer.{name} is {count} updates, and this run makes {num_updates}")
    return count


@dataclasses.dataclass(frozen=True, order=True)
class _Kind:
    """What leaves with the same treatment have in common: their group (-1 is none), LoRA+'s B, and Muon's matrices."""

    group: int
    faster: bool
    matrix: bool


def make_optimizer(config: Optimizer, num_updates: int) -> optax.GradientTransformation:
    """Clipping by the norm of the whole trainable tree, then the rule, at each group's own rate and decay.

    The numbers `lr`, `weight_decay` and `clip` may be traced, as those of many adapters that are trained at once.

    Raises:
      ValueError: at once, the schedule does not fit the run; by `init`, a group or Muon finds no leaf.
    """
    rate, ratio = schedule(config, num_updates), config.lora_plus_ratio
    rules = {}
    for index in range(-1, len(config.groups)):
        group = config.groups[index] if index >= 0 else None
        relative = 1.0 if group is None or group.lr is None else group.lr / config.lr
        own = None if group is None else group.weight_decay
        for faster in (False, True):
            scaled = _times(rate, relative * (ratio if faster else 1.0))
            for matrix in (False, True) if config.name == "muon" else (False,):
                rules[_Kind(index, faster, matrix)] = _rule(config, scaled, own, matrix)
    tx = optax.partition(rules, lambda tree: _kinds(config, tree))
    return tx if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), tx)


def _times(rate: optax.Schedule, factor: Any) -> optax.Schedule:
    return rate if isinstance(factor, float) and factor == 1.0 else lambda count: factor * rate(count)


def _kinds(config: Optimizer, tree: Mapping[str, Any]) -> dict[str, _Kind]:
    """The kind of every leaf."""
    groups = dict.fromkeys(tree, -1)
    for index, group in reversed([*enumerate(config.groups)]):
        try:
            groups |= {path: index for path, hit in mask(tree, group.match).items() if hit}
        except ValueError as error:
            raise ValueError(f"optimizer.groups.{index}.match: {error}") from error
    kinds = {
        path: _Kind(
            group,
            config.lora_plus_ratio != 1.0 and _name(path) == "B",
            config.name == "muon" and leaf.ndim >= 2 and _MATRIX.fullmatch(_name(path)) is not None,
        )
        for (path, group), leaf in zip(groups.items(), tree.values(), strict=True)
    }
    if config.name == "muon" and not any(kind.matrix for kind in kinds.values()):
        raise ValueError(
            f"optimizer.name=muon is for matrices, and none of the {len(tree)} trained leaves is one (the first is "
            f"{next(iter(tree))}); take adamw"
        )
    return kinds


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _rule(
    config: Optimizer, rate: optax.Schedule, own_decay: float | None, matrix: bool
) -> optax.GradientTransformation:
    """The rule of one kind of leaves. Decay is that of AdamW: times the rate, and apart from the gradient."""
    decay, decayed = (config.weight_decay, _decayed) if own_decay is None else (own_decay, None)
    direction = _muon(config) if matrix else _direction(config)
    return optax.chain(*direction, optax.add_decayed_weights(decay, decayed), optax.scale_by_learning_rate(rate))


def _direction(config: Optimizer) -> tuple[optax.GradientTransformation, ...]:
    if config.name == "sgd":
        return (optax.trace(config.value("momentum")),)
    if config.name == "lion":
        return (optax.scale_by_lion(*config.value("betas")),)
    if config.name == "adafactor":
        return (_by_matrix(optax.chain(_FACTORED, optax.clip_by_block_rms(1.0))),)
    return (optax.scale_by_adam(*config.value("betas"), eps=config.value("eps")),)


def _muon(config: Optimizer) -> tuple[optax.GradientTransformation, ...]:
    """Muon at AdamW's rates: an update's root mean square is 0.2 (Liu et al. 2025, "Muon is scalable")."""
    from optax.contrib import MuonDimensionNumbers, scale_by_muon

    def axes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), tree)

    def sized(leaf: jax.Array) -> jax.Array:
        return leaf * (0.2 * max(leaf.shape[-2:]) ** 0.5)

    muon = scale_by_muon(beta=config.value("momentum"), weight_dimension_numbers=axes)
    return muon, optax.stateless(lambda updates, _: jax.tree.map(sized, updates))


#: Adafactor's second moments, as rows and columns of a matrix however small.
_FACTORED = optax.scale_by_factored_rms(min_dim_size_to_factor=1)


def _by_matrix(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on every matrix of a stack, and on every vector of one, by itself; it must keep no counts of leaves."""

    def parts(path: str, leaf: Any) -> jax.Array:
        rank = 2 if _MATRIX.fullmatch(_name(path)) or _TABLE.fullmatch(_name(path)) else 1
        return leaf.reshape(-1, *leaf.shape[max(leaf.ndim - rank, 0) :])

    def init(params: Any) -> Any:
        return {path: jax.vmap(tx.init)(parts(path, leaf)) for path, leaf in _leaves(params).items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        found, new = dict(updates), {}
        for path, leaf in _leaves(updates).items():
            own = None if params is None else parts(path, params[path])
            part: Any
            part, new[path] = jax.vmap(tx.update)(parts(path, leaf), state[path], own)
            found[path] = part.reshape(leaf.shape)
        return found, new

    return optax.GradientTransformation(init, update)


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that belong to another kind."""
    return {path: leaf for path, leaf in tree.items() if not isinstance(leaf, optax.MaskedNode)}


def _decayed(tree: Mapping[str, Any]) -> dict[str, bool]:
    return {path: not _NOT_DECAYED.fullmatch(_name(path)) for path in tree}
