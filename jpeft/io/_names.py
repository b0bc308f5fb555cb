# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's names for what a model is made of, as an adapter's file needs them: read off its weight table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import models, seams
from .._walk import Found, modules
from ..models._families import FAMILIES
from ..models._table import Entry, Rule, Tied, fill, num_indices, rules

#: The tasks whose output layer PEFT trains and saves whole, and what it calls that layer.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

#: The tasks that PEFT has no name for. Its users give no task_type, and the head in `modules_to_save`.
UNNAMED = ("MULTIPLE_CHOICE",)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor lies: the leaf's path, its index there, and the order of axes that makes it one."""

    path: str
    index: tuple[int, ...]
    axes: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of one model.

    Attributes:
      found: every module by its path.
      tensors: where every Hugging Face tensor lies; a tied one lies in the leaf that it repeats.
      tied: for a module whose table is a head too, the head's names: `{"model.embed_tokens": ("lm_head",)}`.
      copied: modules whose table Hugging Face reads through copies of it alone, so that an adapter on the module itself
        would do nothing there; with the names of the copies.
      paths: the path of the module that every leaf-owning Hugging Face module is (a layer of).
      every: all module names, with those of the containers around them.
      heads: paths of the task's own output layers.
      config: of the model.
      task: of the model.
      entries: its table of weights.
    """

    found: Mapping[str, Found]
    tensors: Mapping[str, Place]
    tied: Mapping[str, tuple[str, ...]]
    copied: Mapping[str, tuple[str, ...]]
    paths: Mapping[str, str]
    every: frozenset[str]
    heads: tuple[str, ...]
    config: Any
    task: str
    entries: tuple[Entry, ...]

    @property
    def task_type(self) -> str | None:
        """PEFT's type of the task; None of a task that it has no name for, and of a model that reads no tokens.

        PEFT's types call their models with tokens.
        """
        named = self.task not in UNNAMED and FAMILIES[self.config.model_type].reads == "input_ids"
        return self.task if named else None

    @property
    def auto_mapping(self) -> dict[str, str]:
        """The class of the model in transformers, which PEFT writes down where there is no type of task."""
        model_type = self.config.model_type
        folder = model_type.replace("-", "_")
        return {
            "base_model_class": str(FAMILIES[model_type].architecture(self.task)),
            "parent_library": f"transformers.models.{folder}.modeling_{folder}",
        }

    @property
    def shared(self) -> dict[str, tuple[str, ...]]:
        """For a module whose table stands elsewhere too, all the other names: of its copies, and of the heads."""
        return {name: self.copied.get(name, ()) + self.tied.get(name, ()) for name in {*self.tied, *self.copied}}

    @property
    def repeats(self) -> frozenset[str]:
        """Names of the heads that repeat an embedding's table."""
        return frozenset(head for heads in self.tied.values() for head in heads)

    @property
    def own(self) -> frozenset[str]:
        """All module names but those of `repeats`."""
        return self.every - self.repeats

    @property
    def matrices(self) -> frozenset[str]:
        """Names of the modules that multiply by a matrix of their own; heads tied to an embedding are none of them."""
        kinds = {path for path, found in self.found.items() if isinstance(seams.registered(found.module), seams.Matmul)}
        return frozenset(name for name, path in self.paths.items() if path in kinds)

    @property
    def linear(self) -> frozenset[str]:
        """Names of the modules that "all-linear" means: every matrix but the output layers'."""
        return frozenset(name for name in self.matrices if self.head_of(self.paths[name]) is None)

    def head_of(self, path: str) -> str | None:
        """The output layer that the module at `path` is, or is a part of; None of any other module."""
        return next((head for head in self.heads if path == head or path.startswith(f"{head}/")), None)

    @property
    def projections(self) -> frozenset[str]:
        """Names of the modules that a low-rank method can adapt, and of the heads tied to one of them."""
        kinds = {path for path, found in self.found.items() if seams.kind(found.module) == "projection"}
        own = {name for name, path in self.paths.items() if path in kinds}
        return frozenset(own.union(*(self.tied[name] for name in own & self.tied.keys())))

    def is_in_out(self, name: str) -> bool:
        """Whether Hugging Face stores the module's kernel as `[d_in, d_out]`, as GPT-2's `Conv1D` does."""
        place = self.tensors.get(f"{name}.weight")
        return place is not None and place.axes is None and place.path.endswith("/kernel")


def names_of(model: Any) -> Names:
    """The names of `model`.

    Raises:
      ValueError: it is none of the zoo's, so that nothing says what its modules are called elsewhere.
    """
    entries = models.weights(model)
    found = {f.path: f for f in modules(model)}
    tensors: dict[str, Place] = {}
    for rule in rules(entries):
        tensors |= _places(rule, found)
    paths = {tensor.rpartition(".")[0]: place.path.rpartition("/")[0] for tensor, place in tensors.items()}
    tied: dict[str, tuple[str, ...]] = {}
    copied: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        if isinstance(entry, Tied):
            original, place = next((t, p) for t, p in tensors.items() if p.path == entry.path)
            module, head = original.rpartition(".")[0], entry.hf.rpartition(".")[0]
            tensors[entry.hf] = place
            group = tied if entry.head else copied
            group[module] = (*group.get(module, ()), head)
    repeats = {head for heads in tied.values() for head in heads}
    every = {
        ".".join(parts[:n])
        for name in {*paths} | repeats
        for parts in [name.split(".")]
        for n in range(1, 1 + len(parts))
    }
    heads = tuple(model.head)
    return Names(found, tensors, tied, copied, paths, frozenset(every), heads, model.config, model.task, entries)


def _places(rule: Rule, found: Mapping[str, Found]) -> dict[str, Place]:
    lead = found[rule.path.rpartition("/")[0]].lead[: num_indices(rule.hf)]
    return {fill(rule.hf, *index): Place(rule.path, index, rule.how.to_hf) for index in np.ndindex(lead)}
