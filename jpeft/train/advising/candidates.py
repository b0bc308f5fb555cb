# SPDX-License-Identifier: Apache-2.0
"""What may be advised: a method with the options that its paper and the guides start from."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from .needs import Needs

Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method.

    Attributes:
      name: what it is called.
      kind: of `jpeft.METHODS`.
      options: (needs) -> the method's options beside its kind.
      rate: learning rate to begin with.
      merges: whether it can become part of the base's weights, and then costs nothing.
      lengthens: whether it makes every row longer.
      shares: whether rows of one batch may use different adapters of one base.
      quantize: scheme of the base.
    """

    name: str
    kind: str
    options: Callable[[Needs], Options]
    rate: float
    merges: bool = True
    lengthens: bool = False
    shares: bool = True
    quantize: str | None = None

    def method(self, needs: Needs) -> dict[str, Any]:
        """As a configuration has it."""
        return {"kind": self.kind, **self.options(needs)}


def rank(needs: Needs) -> int:
    """Of a low-rank method: 8, half of it for few examples, 16 for many, and 32 for maths and code."""
    if needs.task in ("maths", "code"):
        return 32
    return 4 if needs.examples < 500 else 8 if needs.examples < 20_000 else 16


def _low_rank(needs: Needs) -> Options:
    found: dict[str, Any] = {"rank": rank(needs), "alpha": 2 * rank(needs)}
    return found | {"targets": "all-linear"} if needs.task in ("maths", "code") else found


def _nothing(needs: Needs) -> Options:
    del needs
    return {}


def _virtual(needs: Needs) -> Options:
    return {"num_tokens": 10 if needs.examples < 500 else 20}


#: In the order in which ties are settled.
CANDIDATES: tuple[Candidate, ...] = (
    Candidate("LoRA", "lora", _low_rank, 2e-4),
    Candidate("QLoRA", "lora", _low_rank, 2e-4, quantize="nf4_double"),
    Candidate("DoRA", "dora", _low_rank, 2e-4),
    Candidate("(IA)³", "ia3", _nothing, 5e-3),
    Candidate("Pfeiffer's adapters", "pfeiffer", lambda needs: {"reduction_factor": 16}, 1e-3, merges=False),
    Candidate("prefix tuning", "prefix_tuning", _virtual, 1e-2, merges=False),
    Candidate("prompt tuning", "prompt_tuning", _virtual, 3e-2, merges=False, lengthens=True),
    Candidate("full fine-tuning", "full", _nothing, 2e-5, shares=False),
)
