# SPDX-License-Identifier: Apache-2.0
"""One place of a model where a method acts, in numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Site:
    """One place of a model where a method acts, in numbers: no arrays, so it is part of the static graphdef.

    Attributes:
      path: the module's path in the NNX model, `"layers/attention/query"`.
      names: its name, one per layer of a stack: the Hugging Face module name where the model has a name map, else
        the dotted path.
      active: which of these the method adapts, one bool per name.
      lead: leading (layer) axes of its leaves, `(12,)` in a stack of 12, `()` outside.
      d_in: inputs of the projection seen as a matrix; 0 for a seam without one.
      d_out: outputs, likewise.
      scanned: whether jpeft's own scan runs the stack, so that the scope knows the layer.
      adapter: the adapter's name, which leaf paths and dropout masks depend on.
      seam: kind of the seam; `"model"` for the leaves that all places of an adapter share.
      block: which block of a layer a residual or an attention belongs to (`"attention"`, `"mlp"`, ...), or "".
      heads: key heads of an attention; 0 elsewhere.
      first: places of the adapter before this one, at seams of the same kind, every layer counted.
      members: of the site of the shared leaves, all the others.
      bias: whether the projection has a bias.
      beside: how many of the axes `lead`, the last ones, are of matrices that stand side by side in one call: 1 of
        experts, which have a name each.
    """

    path: str
    names: tuple[str, ...]
    active: tuple[bool, ...]
    lead: tuple[int, ...] = ()
    d_in: int = 0
    d_out: int = 0
    scanned: bool = False
    adapter: str = ""
    seam: str = "projection"
    block: str = ""
    heads: int = 0
    first: int = 0
    members: tuple["Site", ...] = ()
    bias: bool = False
    beside: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """The leading axes that are of layers, of which one runs at a time."""
        return self.lead[: len(self.lead) - self.beside]

    @property
    def together(self) -> tuple[int, ...]:
        """The leading axes that are there while a layer runs."""
        return self.lead[len(self.layers) :]

    def running(self, values: Any, layer: jax.Array | None) -> jax.Array:
        """Of `values`, one per name along their first axis, those of the running layer: `[*together, ...]`."""
        values = jnp.asarray(values)
        return values.reshape(-1, *self.together, *values.shape[1:])[0 if layer is None else layer]
