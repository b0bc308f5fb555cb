# SPDX-License-Identifier: Apache-2.0
"""Candidates in order of what the rules say, those that fit the memory, and those that are out."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ..planning.devices import Chip, Machine
from ..planning.estimate import Estimate, estimate
from ..planning.request import Request
from .candidates import CANDIDATES, Candidate
from .needs import Needs
from .rules import RULES, Opinion

#: How many are advised.
BEST = 3
#: Bytes of a trained number in a file.
FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Choice:
    """A candidate that fits.

    Attributes:
      candidate: which.
      opinions: what the rules say of it, without those that have nothing to say.
      plan: of its step; the batch is what fits, and `accumulation` makes up for the rest.
      needs: what it was chosen for.
    """

    candidate: Candidate
    opinions: tuple[Opinion, ...]
    plan: Estimate
    needs: Needs

    @property
    def stored(self) -> int:
        """Bytes of all tenants' adapters."""
        return self.needs.tenants * self.plan.trainable * FLOAT32

    @property
    def configuration(self) -> Mapping[str, Any]:
        """For `jpeft train`, with the data's file still to be named."""
        request, needs = self.plan.request, self.needs
        found: dict[str, Any] = {
            "model": {
                "path": needs.model,
                "task": needs.model_task,
                "dtype": request.dtype,
                "remat": request.remat,
                **({} if request.quantize is None else {"quantize": request.quantize}),
            },
            "data": {"train": "train.jsonl", "max_length": needs.seq},
            "method": self.candidate.method(needs),
            "optimizer": {"lr": self.candidate.rate, "schedule": "cosine", "warmup": 0.05},
            "train": {"epochs": needs.epochs, "batch_size": request.batch, "accumulation": request.accumulation},
            "out": f"runs/{self.candidate.kind}",
        }
        return found


@dataclasses.dataclass(frozen=True)
class Advice:
    """What is advised.

    Attributes:
      needs: for what.
      choices: the best first.
      out: what is not possible, and why.
    """

    needs: Needs
    choices: tuple[Choice, ...]
    out: Mapping[str, str]


def advise(needs: Needs) -> Advice:
    """The best candidates that fit.

    Raises:
      ValueError: the demands leave nothing; the message says which of them collide.
    """
    out: dict[str, str] = {}
    choices: list[Choice] = []
    refused: list[ValueError] = []
    possible = [*ordered(needs, out)]
    for candidate, opinions in possible:
        if len(choices) == BEST:
            break
        try:
            plan = fitting(needs, candidate)
        except ValueError as error:  # one method's prompt may be too long for the model where the others serve
            out[candidate.name] = str(error)
            refused.append(error)
            continue
        choice = Choice(candidate, opinions, plan, needs)
        if plan.fits is False:
            out[candidate.name] = f"its step takes {_gb(plan.memory.total)} of {_gb(needs.memory or 0)} (--memory)"
        elif needs.storage is not None and choice.stored > needs.storage:
            out[candidate.name] = (
                f"{needs.tenants} adapters take {_gb(choice.stored)} of {_gb(needs.storage)} (--storage)"
            )
        else:
            choices.append(choice)
    if refused and len(refused) == len(possible) and len({str(error) for error in refused}) == 1:
        raise refused[0]  # the model itself, and not a method, is not what was asked for
    if not choices:
        raise ValueError(
            f"--model {needs.model} and {_demands(out)} collide; nothing is left:\n  "
            + "\n  ".join(f"{name}: {why}" for name, why in out.items())
        )
    return Advice(needs, tuple(choices), out)


def ordered(needs: Needs, out: dict[str, str]) -> Iterator[tuple[Candidate, tuple[Opinion, ...]]]:
    """Candidates with the most votes first; those that a rule forbids go to `out`."""
    found = []
    for candidate in CANDIDATES:
        opinions = tuple(opinion for rule in RULES if (opinion := rule(needs, candidate)) is not None)
        forbidden = [opinion.reason for opinion in opinions if opinion.votes is None]
        if forbidden:
            out[candidate.name] = forbidden[0]
        else:
            found.append((sum(opinion.votes or 0 for opinion in opinions), candidate, opinions))
    for _, candidate, opinions in sorted(found, key=lambda each: -each[0]):
        yield candidate, opinions


def fitting(needs: Needs, candidate: Candidate) -> Estimate:
    """The plan of the largest batch that fits, recomputing before halving; the least of all where none does."""

    def planned(rows: int, remat: str) -> Estimate:
        request = Request(
            model=needs.model,
            method=candidate.method(needs),
            machine=Machine(Chip("the device", "cuda", needs.memory, None, None, "its rates are not known"), 1),
            task=needs.model_task,
            batch=rows,
            seq=needs.seq,
            accumulation=-(-needs.batch // rows),
            remat=remat,
            quantize=candidate.quantize,
        )
        return estimate(request)

    rows = needs.batch
    plan = planned(rows, "none")
    if plan.fits is not False:
        return plan
    least = planned(1, "full")
    if least.fits is False:
        return least
    while True:
        plan = planned(rows, "full")
        if plan.fits is not False:
            return plan
        rows = max(1, rows // 2)
        plan = planned(rows, "none")
        if plan.fits is not False:
            return plan


def _demands(out: Mapping[str, str]) -> str:
    said = " ".join(out.values())
    named = [flag for flag in ("--memory", "--storage", "--latency strict", "--keep-base") if flag in said]
    return " and ".join(named) or "these demands"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
