# SPDX-License-Identifier: Apache-2.0
"""The optimizer that a configuration describes: AdamW, a learning rate that warms up and decays, and clipping."""

import math
import re

import jax
import optax

from .._masks import optimizer as by_rules
from .sections import Optimizer

#: Leaves that weight decay leaves alone, by the last part of their path: vectors, DoRA's
#: magnitudes, and AdapterFusion's value matrix, which
#: its own regulariser pulls to the identity.
_NOT_DECAYED = re.compile(r"(\w+_)?(bias|scale)|m|value")


def schedule(config: Optimizer, num_updates: int) -> optax.Schedule:
    """Learning rate of every update: linear from 0 over the warm-up, then by `config.schedule` towards 0 at the end.

    As transformers' `get_scheduler` gives it, whose first update has the rate 0 when there is a warm-up.
    """
    warmup = math.ceil(config.warmup * num_updates)
    rest = max(num_updates - warmup, 1)
    decays = {
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.lr, rest),
    }
    if not warmup:
        return decays[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), decays[config.schedule]], [warmup])


def make_optimizer(config: Optimizer, num_updates: int) -> optax.GradientTransformation:
    """Clipping by the norm of the whole trainable tree, then AdamW; with LoRA+, `B` at its own rate."""
    rate = schedule(config, num_updates)
    tx = _adamw(config, rate)
    if config.lora_plus_ratio != 1.0:
        faster = _adamw(config, lambda count: config.lora_plus_ratio * rate(count))
        tx = by_rules({"b": faster, "rest": tx}, rules={"**/B": "b", "**": "rest"})
    return tx if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), tx)


def _adamw(config: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    b1, b2 = config.betas
    return optax.adamw(rate, b1, b2, eps=config.eps, weight_decay=config.weight_decay, mask=_decayed)


def _decayed(tree: dict[str, jax.Array]) -> dict[str, bool]:
    return {path: not _NOT_DECAYED.fullmatch(path.rpartition("/")[2]) for path in tree}
