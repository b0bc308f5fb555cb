# SPDX-License-Identifier: Apache-2.0
"""What the tests of the zoo know of a family."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jpeft.models._families import FAMILIES


@dataclasses.dataclass(frozen=True)
class Subject:
    """One family.

    Attributes:
      config: a tiny one, two layers deep, without dropout.
      variants: what is changed of it: every attribute that changes what the model computes; `base` is first.
      classes: transformers' class for every task.
      rates: the attributes that are dropout rates, and a task in which each acts.
      perturbed: for each field of our Config that changes the program, another value; the task it counts in; and, if
        it needs them, what other fields are then.
      causal: whether a token sees no later one.
      silent: fields of our Config that change no program.
      smooth: what is changed of `config` where roundings may change no choice that the model makes.
      converted: whether a checkpoint's names are others than those of transformers' modules.
    """

    config: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    classes: Mapping[str, Any]
    rates: Mapping[str, str]
    perturbed: Mapping[str, tuple[Any, ...]]
    causal: bool = False
    silent: tuple[str, ...] = ("initializer_range", "model_type", "hf")
    smooth: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    converted: bool = False

    @property
    def decodes(self) -> bool:
        """Whether it is an encoder with a decoder beside it."""
        return "SEQ_2_SEQ_LM" in self.classes

    def changed(self, attributes: Mapping[str, Any]) -> "Subject":
        """The family with other attributes in its config."""
        return dataclasses.replace(self, config={**self.config, **attributes})

    @property
    def vocab(self) -> int:
        return self.config["vocab_size"]

    @property
    def reads(self) -> str:
        """The first argument of a call."""
        return FAMILIES[self.config["model_type"]].reads
