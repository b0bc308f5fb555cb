# SPDX-License-Identifier: Apache-2.0
"""What a plan is asked for. This file imports no JAX."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ..sections import Optimizer
from ..sections.model import SEEING
from .devices import Machine

#: Tokens of a micro-batch that the program's 32-bit indices can tell apart.
MAX_TOKENS = 2**31 - 1
#: Tasks of which it is known what a batch holds.
TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", *SEEING)


@dataclasses.dataclass(frozen=True)
class Request:
    """A training step on a machine.

    Attributes:
      model: a preset's name, a Hugging Face folder, or a config.json.
      method: `{"kind": ..., **its options}`, as in a run's configuration; or several, for a hybrid.
      machine: the devices.
      mesh: such as `"fsdp=4,tensor=2"`; None is `fsdp` over all of them, within each slice.
      uneven: of weights with an axis that the mesh does not divide: `refuse`, or `whole` on every device.
      task: one of `TASKS`, or any other where `arrays` says what a batch holds.
      batch: rows of one micro-batch, over all devices.
      seq: tokens of a row; of an image those that its model makes of it (`subject.of_images`).
      target_seq: tokens of a row's target, for `SEQ_2_SEQ_LM`; None is as many as of the row.
      accumulation: micro-batches of an update.
      dtype: of the base.
      remat: what a layer keeps for the backward pass.
      quantize: a scheme of `jpeft.quantize`, or None.
      generate: tokens of a row, prompt included, that a cache of keys and values is to hold; 0 for none.
      share: of a chip's peak that products are expected to reach.
      optimizer: the rule, and whether its state lies in the host's memory.
      ema: whether a moving average of what is trained is kept.
      dropout: whether there is a key for it.
      labels: of a classifier; None is the model's own number.
      arrays: name, shape of one micro-batch and dtype of what a batch holds; of ids, mask and labels where left out.
      sums: the loss, as of `make_step`; the task's own where left out.
    """

    model: str
    method: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    machine: Machine
    mesh: str | None = None
    uneven: Literal["refuse", "whole"] = "refuse"
    task: str = "CAUSAL_LM"
    batch: int = 1
    seq: int = 512
    target_seq: int | None = None
    accumulation: int = 1
    dtype: str = "bfloat16"
    remat: str = "none"
    quantize: str | None = None
    generate: int = 0
    share: float = 0.4
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    ema: bool = False
    dropout: bool = False
    labels: int | None = None
    arrays: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    sums: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty; give a preset's name, a Hugging Face folder or a config.json")
        if self.mesh == "":
            raise ValueError("mesh is empty; give axes such as fsdp=4,tensor=2, or leave it out")
        for name in ("batch", "seq", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.target_seq is not None and (self.task != "SEQ_2_SEQ_LM" or self.target_seq < 1):
            raise ValueError(
                f"target_seq is 1 or more, and of SEQ_2_SEQ_LM; got {self.target_seq} for the task {self.task}"
            )
        if self.task not in TASKS and not self.arrays:
            raise ValueError(f"a plan knows the tasks {', '.join(TASKS)}; got {self.task!r}")
        if self.batch * self.seq > MAX_TOKENS:
            raise ValueError(
                f"{self.batch} rows of {self.seq} tokens are {self.batch * self.seq} in one micro-batch; indices of "
                f"32 bits count up to {MAX_TOKENS}: take a smaller batch or seq, or more accumulation"
            )
        if self.generate < 0:
            raise ValueError(f"generate must be 0 or more, got {self.generate}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is the part of the peak that is reached, in (0, 1]; got {self.share}")

    def __hash__(self) -> int:
        return hash(repr(self))  # the options of a method may be lists

    @property
    def axes(self) -> str:
        """The mesh, written out."""
        within = "fsdp=-1" if self.machine.count > self.machine.slices else "fsdp=1"
        return self.mesh or (f"dcn.data={self.machine.slices}," if self.machine.slices > 1 else "") + within

    @property
    def parts(self) -> tuple[Mapping[str, Any], ...]:
        """The method, or what a hybrid is made of."""
        return (self.method,) if isinstance(self.method, Mapping) else tuple(self.method)

    @property
    def full(self) -> bool:
        """Whether all of the base is trained."""
        return any(part["kind"] == "full" for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens of an update."""
        return self.batch * self.seq * self.accumulation

    def but(self, **changes: Any) -> "Request":
        """This with something else."""
        return dataclasses.replace(self, **changes)
