# SPDX-License-Identifier: Apache-2.0
"""The rules: what each says of a candidate for these needs, why, and what was measured.

A rule without a measurement says so: its reason is a formula, or what the method is.
"""

from collections.abc import Callable
from typing import NamedTuple

from . import evidence
from .candidates import Candidate
from .evidence import Fact
from .needs import Needs


class Opinion(NamedTuple):
    """What a rule says.

    Attributes:
      votes: for (positive) or against the candidate; None rules it out.
      reason: why.
      facts: what was measured; none is by reasoning.
    """

    votes: int | None
    reason: str
    facts: tuple[Fact, ...] = ()


Rule = Callable[[Needs, Candidate], Opinion | None]


def latency(needs: Needs, candidate: Candidate) -> Opinion | None:
    """A strict latency with one tenant asks for what can be merged."""
    if not needs.merges:
        return None
    measured = evidence.about("latency", candidate.kind)
    if candidate.quantize:
        return Opinion(-1, "merged, the base is dequantized first, which moves its outputs", measured)
    if candidate.merges:
        return Opinion(1, "merged into the base it costs nothing in an answer", measured)
    return Opinion(None, "it cannot be merged, so every answer pays for it (--latency strict)", measured)


def tenants(needs: Needs, candidate: Candidate) -> Opinion | None:
    """Many tenants share one base, and their rows one batch."""
    if needs.tenants == 1:
        return None
    if not candidate.shares:
        return Opinion(None, f"{needs.tenants} tenants would need {needs.tenants} whole models")
    if candidate.lengthens and needs.latency == "strict":
        return Opinion(-1, "unmerged, it makes every row longer, and answers are to be quick", _step(candidate))
    if candidate.kind == "ia3":
        return Opinion(1, "the smallest adapter of all: one vector a place, and no product more in an answer")
    if candidate.kind in ("lora", "dora"):
        return Opinion(1 if candidate.kind == "lora" else 0, "rows of a batch may use an adapter each (jpeft.bank)")
    return Opinion(0, "rows of a batch may use an adapter each (jpeft.bank)")


def base(needs: Needs, candidate: Candidate) -> Opinion | None:
    """A base that must stay as it is is not trained."""
    if needs.keep_base and candidate.kind == "full":
        return Opinion(None, "it changes the base (--keep-base)")
    return None


def examples(needs: Needs, candidate: Candidate) -> Opinion | None:
    """Few examples go with few parameters, many pay for more."""
    if needs.examples < 500:
        if candidate.kind in ("ia3", "prompt_tuning"):
            return Opinion(1, f"few parameters for few examples ({needs.examples:,})")
        if candidate.kind == "full":
            return Opinion(-2, f"{needs.examples:,} examples for every weight of the base")
    if needs.examples >= 100_000:
        if candidate.kind in ("prompt_tuning", "ia3", "prefix_tuning"):
            return Opinion(-1, f"too few parameters to take in {needs.examples:,} examples")
        if candidate.kind == "full":
            return Opinion(1, f"{needs.examples:,} examples can pay for training everything")
    return None


def task(needs: Needs, candidate: Candidate) -> Opinion | None:
    """Maths and code ask for more than a few vectors; a class for little."""
    if needs.task in ("maths", "code"):
        if candidate.kind in ("lora", "dora"):
            return Opinion(1, "every projection is adapted, at rank 32: long answers need more than queries and values")
        if candidate.kind in ("prompt_tuning", "prefix_tuning", "ia3"):
            return Opinion(-1, f"it steers what the base can do, and {needs.task} asks for more")
    if needs.task == "classification":
        return Opinion(0, "measured on classes", evidence.about("score", candidate.kind))
    return None


def training(needs: Needs, candidate: Candidate) -> Opinion | None:
    """A step's time, where it stands out."""
    del needs
    if candidate.kind in ("prompt_tuning", "full"):
        return Opinion(-1, "its steps are slow", _step(candidate))
    if candidate.kind == "dora":
        return Opinion(-1, "a little more time and memory than LoRA", _step(candidate))
    return None if candidate.kind == "lora" else Opinion(0, "time of a step", _step(candidate))


def quantized(needs: Needs, candidate: Candidate) -> Opinion | None:
    """Codes of four bits are for where the weights do not fit."""
    if candidate.quantize:
        return Opinion(-1, "the base's error of four bits is only worth it where its weights do not fit otherwise")
    return None


#: All of them. A new one is a function above and a name here.
RULES: tuple[Rule, ...] = (latency, tenants, base, examples, task, training, quantized)


def _step(candidate: Candidate) -> tuple[Fact, ...]:
    return evidence.about("step", candidate.kind)
