# SPDX-License-Identifier: Apache-2.0
"""What was measured, as sentences with the page that tells how. benchmarks/evidence.py writes the file."""

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple


class Fact(NamedTuple):
    """A sentence with its figures, and the page that it is from."""

    said: str
    page: str

    def __str__(self) -> str:
        return f"{self.said} ({self.page})"


@functools.cache
def facts() -> Mapping[str, Fact]:
    """All facts by name: `step/KIND`, `score/STUDY/TASK/KIND`, `latency/STUDY/TASK/KIND`, `collapse/STUDY`."""
    text = resources.files(__package__).joinpath("evidence.json").read_text(encoding="utf-8")
    return {name: Fact(**values) for name, values in json.loads(text).items()}


def about(group: str, kind: str) -> tuple[Fact, ...]:
    """The facts of a group that are of one kind of method."""
    return tuple(fact for name, fact in facts().items() if name.split("/")[0] == group and name.split("/")[-1] == kind)


def group(name: str) -> tuple[Fact, ...]:
    """All facts of a group."""
    return tuple(fact for key, fact in facts().items() if key.split("/")[0] == name)
