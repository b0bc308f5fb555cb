# SPDX-License-Identifier: Apache-2.0
"""Advice in lines, and as plain values."""

from typing import Any

import yaml

from ..planning import report as plans
from . import evidence
from .advice import Advice, Choice

#: Updates that a small rate may be too small for.
FEW = 300


def lines(advice: Advice) -> str:
    """For a person: the best with its plan and its configuration, the others in short, and what is out."""
    needs, (best, *others) = advice.needs, advice.choices
    out = [f"advised: {best.candidate.name}", *_reasons(best), "", plans.lines(best.plan, None), ""]
    if needs.tenants > 1:
        out += [f"{needs.tenants:,} adapters take {best.stored / 1e6:,.1f} MB", ""]
    if needs.updates < FEW:
        out += [f"{needs.updates:,} updates are few: try rates of ten times this one beside it, and look at what is"]
        out += ["predicted, not at the score alone"]
        out += [f"  measured: {fact}" for fact in evidence.group("collapse")] + [""]
    out += ["configuration (name your data):", "", configuration(best)]
    for choice in others:
        size = f"{choice.plan.memory.total / 1e9:.1f} GB"
        out += [f"or: {choice.candidate.name} ({choice.plan.trainable:,} trained, {size})", *_reasons(choice), ""]
    if advice.out:
        out += ["not:", *(f"  {name}: {why}" for name, why in advice.out.items())]
    return "\n".join(out).rstrip()


def configuration(choice: Choice) -> str:
    """A file for `jpeft train`."""
    return yaml.safe_dump(dict(choice.configuration), sort_keys=False)


def values(advice: Advice) -> dict[str, Any]:
    """For a program."""
    return {
        "advised": [
            {
                "name": choice.candidate.name,
                "reasons": [
                    {"votes": o.votes, "reason": o.reason, "measured": [fact._asdict() for fact in o.facts]}
                    for o in choice.opinions
                ],
                "configuration": dict(choice.configuration),
                "plan": plans.values(choice.plan, None),
                "stored_bytes": choice.stored,
            }
            for choice in advice.choices
        ],
        "out": dict(advice.out),
    }


def _reasons(choice: Choice) -> list[str]:
    found = []
    for opinion in choice.opinions:
        if not opinion.facts and not opinion.votes:
            continue
        mark = "+" if (opinion.votes or 0) > 0 else "-" if (opinion.votes or 0) < 0 else " "
        found.append(f"  {mark} {opinion.reason}" + ("" if opinion.facts else " (by reasoning)"))
        found += [f"      measured: {fact}" for fact in opinion.facts]
    return found
