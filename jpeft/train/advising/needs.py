# SPDX-License-Identifier: Apache-2.0
"""What advice is asked for. This file imports no JAX."""

import dataclasses
import re
from typing import Literal, get_args

Kind = Literal["classification", "generation", "maths", "code"]
Latency = Literal["strict", "relaxed"]
KINDS, LATENCIES = get_args(Kind), get_args(Latency)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclasses.dataclass(frozen=True)
class Needs:
    """A task and its circumstances.

    Attributes:
      model: a preset's name, a Hugging Face folder, or a config.json.
      task: what kind.
      examples: to train on.
      memory: bytes of the device that trains; None where there is enough.
      latency: `strict` where an answer may cost no more than the base's.
      tenants: adapters that are served beside each other on one base.
      storage: bytes for all adapters together; None where there is enough.
      keep_base: whether the base must not change, so that nothing is merged into it and it is not trained itself.
      batch, seq: rows of an update, tokens of a row.
      epochs: passes over the examples.
    """

    model: str
    task: Kind = "generation"
    examples: int = 1000
    memory: float | None = None
    latency: Latency = "relaxed"
    tenants: int = 1
    storage: float | None = None
    keep_base: bool = False
    batch: int = 16
    seq: int = 512
    epochs: int = 3

    def __post_init__(self) -> None:
        for name in ("examples", "tenants", "batch", "seq", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, got {getattr(self, name)}")
        if self.latency == "strict" and self.keep_base and self.tenants == 1:
            raise ValueError(
                "--latency strict and --keep-base collide: what costs nothing in an answer is what was merged into the "
                "base; leave one of them out, or merge into a copy (which is --latency strict alone)"
            )

    @property
    def model_task(self) -> str:
        """PEFT's name of the task."""
        return "SEQ_CLS" if self.task == "classification" else "CAUSAL_LM"

    @property
    def updates(self) -> int:
        """Updates of the training."""
        return max(1, -(-self.examples // self.batch)) * self.epochs

    @property
    def merges(self) -> bool:
        """Whether the adapter will be merged: a strict latency with one tenant."""
        return self.latency == "strict" and self.tenants == 1


def size(text: str) -> float:
    """Bytes of `24GB`, `16GiB` or `800M`.

    Raises:
      ValueError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"a size is written as 24GB, 16GiB or 800MB, got {text!r}")
    return float(found[1]) * _UNITS[found[2] or ""]
