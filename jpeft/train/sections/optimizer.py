# SPDX-License-Identifier: Apache-2.0
"""The section `optimizer`: the update rule and its rate."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ._checks import FORBID, positive, shares

#: What each rule takes of `Optimizer`'s options, with its value where None is given.
RULES: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8},
    "adafactor": {},
    "lion": {"betas": (0.9, 0.99)},
    "sgd": {"momentum": 0.9},
    "muon": {"momentum": 0.95, "betas": (0.9, 0.999), "eps": 1e-8},
}
#: The same of the schedules.
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "constant": {},
    "linear": {"min_lr": 0.0},
    "cosine": {"min_lr": 0.0},
    "wsd": {"min_lr": 0.0, "decay": 0.1},
    "polynomial": {"min_lr": 0.0, "power": 2.0},
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Leaves with a rate or decay of their own.

    Attributes:
      match: pattern of paths, as of `jpeft.mask`: `**/B`, `**/query/**`, `classifier/**`.
      lr: their highest learning rate; None is that of all.
      weight_decay: theirs, biases and norms among them included; None is that of all.
    """

    __pydantic_config__: ClassVar = FORBID
    match: str
    lr: float | None = None
    weight_decay: float | None = None


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule and its learning rate.

    Attributes:
      name: `adamw`, `adafactor` (without a rate of its own), `lion`, `sgd` (with momentum), or `muon`, which
        orthogonalises the updates of matrices and leaves vectors and embeddings to AdamW.
      lr: highest learning rate.
      schedule: `constant`; down to `min_lr` at the end by `linear`, `cosine` or `polynomial`; or `wsd`: constant until
        the last updates, then linear.
      warmup: updates in which the rate rises from 0: their number, or a share of all, below 1.
      min_lr: rate at the end; None is 0.
      decay: of `wsd`, the updates in which it falls, as number or share; None is 0.1.
      power: of `polynomial`; None is 2.
      weight_decay: biases and norms have none.
      betas: of `adamw`, of `lion`, and of what `muon` leaves to AdamW; None is the rule's own: 0.9 and 0.999, of `lion`
        0.9 and 0.99.
      eps: of `adamw`, and of what `muon` leaves to it; None is 1e-8.
      momentum: of `sgd` and `muon`; None is the rule's own, 0.9 and 0.95.
      clip: largest norm of the gradient of the whole trainable tree; None does not clip.
      lora_plus_ratio: LoRA+ (Hayou et al. 2024): the rate of B over that of A.
      groups: leaves with a rate or decay of their own, `{match, lr, weight_decay}`; the first that matches counts.
      offload: keep the rule's state (of AdamW two numbers a trained one) in the host's memory, pinned; every update
        fetches it and puts it back, for runs whose state would not fit the device beside the rest.
    """

    __pydantic_config__: ClassVar = FORBID
    name: Literal["adamw", "adafactor", "lion", "sgd", "muon"] = "adamw"
    lr: float = 1e-4
    schedule: Literal["constant", "linear", "cosine", "wsd", "polynomial"] = "linear"
    warmup: int | float = 0.0
    min_lr: float | None = None
    decay: int | float | None = None
    power: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None
    clip: float | None = 1.0
    lora_plus_ratio: float = 1.0
    groups: tuple[Group, ...] = ()
    offload: bool = False

    def value(self, option: str) -> Any:
        """An option that not every rule or schedule takes: as given, or the rule's own value."""
        given = getattr(self, option)
        return {**RULES[self.name], **SCHEDULES[self.schedule]}[option] if given is None else given

    def wrong(self) -> list[str]:
        """What cannot be, a line each."""
        groups = {f"optimizer.groups.{i}": group for i, group in enumerate(self.groups)}
        lines = positive(
            {f"optimizer.{key}": getattr(self, key) for key in ("lr", "eps", "clip", "power", "lora_plus_ratio")}
            | {f"{where}.lr": group.lr for where, group in groups.items()}
        )
        part = {"optimizer.betas": None if self.betas is None else max(self.betas, key=abs)}
        part["optimizer.momentum"] = self.momentum
        lines += shares({key: value for key, value in part.items() if value is not None})
        least = {"optimizer.weight_decay": self.weight_decay, "optimizer.min_lr": self.min_lr}
        least |= {f"{where}.weight_decay": group.weight_decay for where, group in groups.items()}
        lines += [f"{key} must not be negative, got {x}" for key, x in least.items() if x is not None and not x >= 0]
        for key in ("warmup", "decay"):
            given = getattr(self, key)
            if given is not None and not (0 <= given < 1 or (given >= 1 and float(given).is_integer())):
                lines.append(f"optimizer.{key} is a share in [0, 1) or a whole number of updates, got {given}")
        if self.min_lr is not None and self.min_lr > self.lr:
            lines.append(f"optimizer.min_lr={self.min_lr} is above optimizer.lr={self.lr}")
        lines += [
            f"{where} changes nothing; give it lr, weight_decay or both"
            for where, group in groups.items()
            if group.lr is None and group.weight_decay is None
        ]
        return lines + _not_taken(self, "name", RULES) + _not_taken(self, "schedule", SCHEDULES)


def _not_taken(options: Optimizer, chooser: str, table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Options that are given, and that the chosen rule or schedule has no use for."""
    chosen = getattr(options, chooser)
    known = dict.fromkeys(key for takes in table.values() for key in takes)
    return [
        f"optimizer.{key} is for optimizer.{chooser}={' or '.join(n for n, takes in table.items() if key in takes)}, "
        f"got {chosen}"
        for key in known
        if getattr(options, key) is not None and key not in table[chosen]
    ]
