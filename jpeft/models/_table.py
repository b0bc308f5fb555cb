# SPDX-License-Identifier: Apache-2.0
"""What a weight table says: which Hugging Face tensor is which leaf.

A model's table is a tuple of entries:

  Rule("model.layers.{i}.self_attn.q_proj.weight", "layers/self_attn/q_proj/kernel", TRANSPOSE)
      one tensor is one leaf; with `{i}`, one tensor per layer, stacked on the leaf's first axis, and with `{e}` one per
      expert of a layer, on its second.
  Rule("layers.{i}.mlp.fc1.weight", "layers/mlp/fc1/kernel", TRANSPOSE, "encoder.layer.{i}.intermediate.dense.weight")
      the same, where files keep an older name than transformers' module has; what is read may have either.
  Tied("lm_head.weight", "embed_tokens/embedding")
      a copy of a leaf that a checkpoint may hold; it must agree with it, and is not written.
  Ignore("...rotary_emb.inv_freq")
      a tensor that is no weight. `...` stands for any start.
  Renamed(".gamma", ".weight")
      an ending that some checkpoints use for the table's.
  Joined(".experts.gate_up_proj", (".experts.{e}.w1.weight", ".experts.{e}.w3.weight"))
      an ending of tensors that hold several of the table's, one after another; with `{e}`, for each expert in turn.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class How(NamedTuple):
    """A pair of axis orders: a leaf is `tensor.transpose(to_jax)`, a tensor is `leaf.transpose(to_hf)`.

    None keeps the axes. The layer axis of a stack does not count.
    """

    to_jax: tuple[int, ...] | None = None
    to_hf: tuple[int, ...] | None = None


COPY = How()
#: torch's `Linear.weight` [d_out, d_in] as a kernel [d_in, d_out].
TRANSPOSE = How((1, 0), (1, 0))


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tensor `hf` is the leaf `path`; with `{i}` (and `{e}`) that of layer i (and expert e) is row i (and e).

    Files call it `file`, where that is not what transformers calls it in the model.
    """

    hf: str
    path: str
    how: How = COPY
    file: str = ""


@dataclasses.dataclass(frozen=True)
class Tied:
    """The tensor `hf`, if there, repeats the one of the leaf `path`, as a head or (`head=False`) as another table."""

    hf: str
    path: str
    head: bool = True


@dataclasses.dataclass(frozen=True)
class Ignore:
    """The tensor `hf` is no weight."""

    hf: str


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Some checkpoints end a name in `old` where the table has `new`."""

    old: str
    new: str


@dataclasses.dataclass(frozen=True)
class Joined:
    """Some checkpoints have one tensor, its name ending in `old`, in the place of those that end in `parts`.

    It holds them one after another along its first axis; with `{e}`, its first axis counts experts, and it holds them
    along its second for each.
    """

    old: str
    parts: tuple[str, ...]


Entry = Rule | Tied | Ignore | Renamed | Joined


def module_names(entries: Sequence[Entry], *sizes: int) -> dict[str, tuple[str, ...]]:
    """Hugging Face's names of the modules: NNX path -> one name, or one per layer (and expert) of a stack.

    Covers every module that owns leaves, and those around it as long as both sides call them the same.

    Args:
      entries: the table.
      sizes: how many layers there are, and experts in each.
    """
    found = {}
    for rule in rules(entries):
        path, hf = rule.path.rpartition("/")[0], rule.hf.rpartition(".")[0]
        while path:
            found[path] = tuple(fill(hf, *index) for index in np.ndindex(sizes[: num_indices(hf)]))
            (path, _, name), (hf, _, hf_name) = path.rpartition("/"), hf.rpartition(".")
            if name != hf_name or hf.endswith("{e}"):
                break
    return found


def rules(entries: Sequence[Entry]) -> list[Rule]:
    """The entries that set a leaf."""
    return [entry for entry in entries if isinstance(entry, Rule)]


def num_indices(pattern: str) -> int:
    """How many leading axes of a leaf count tensors of this name: of layers, and of experts in each."""
    return ("{i}" in pattern) + ("{e}" in pattern)


def fill(pattern: str, *index: int) -> str:
    """`pattern` with the numbers of the layer and the expert in the places of `{i}` and `{e}`."""
    return pattern.format(**dict(zip("ie", index, strict=False)))
