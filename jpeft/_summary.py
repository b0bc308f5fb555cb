# SPDX-License-Identifier: Apache-2.0
"""How much an adapted model trains, and how much of the base that changes: two different numbers."""

import dataclasses
import math
from typing import Any

from flax import nnx

from ._graft import grafts
from ._method import Adapter, AdapterParam
from ._quantized import Quantized, QuantizedKernel


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapter of a model, over all its seams.

    Attributes:
      name: the adapter's name.
      method: the method with its options.
      seams: how many places it acts at, every layer of a stack counted.
      trainable: parameters that are trained, padding left out.
      changed: parameters of the base whose effective value differs once merged.
      bytes: memory of its trainable leaves.
    """

    name: str
    method: Any
    seams: int
    trainable: int
    changed: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `jpeft.summary` gives; printed, a table.

    Attributes:
      rows: one per adapter, and per method where an adapter is of two (`LoRA(trainable_token_indices=...)`).
      base: parameters (`nnx.Param`) of the base model, not its statistics or caches; the denominator of `percent`. A
        quantized kernel counts as the weights that it stands for.
      base_bytes: their memory, of codes and scales where they are quantized.
      trainable, changed, bytes: sums over the rows; what two adapters change counts for each of them.
      percent: 100 * trainable / base.
    """

    rows: tuple[Row, ...]
    base: int
    base_bytes: int

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.rows)

    @property
    def changed(self) -> int:
        return sum(row.changed for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def percent(self) -> float:
        return 100.0 * self.trainable / self.base if self.base else 0.0

    def __str__(self) -> str:
        lines = [f"{'adapter':<12}{'places':>8}{'trainable':>14}{'% of base':>11}{'changed':>14}{'bytes':>14}"]
        rows = [(r.name, r.seams, r.trainable, r.changed, r.bytes) for r in self.rows]
        rows.append(("all", sum(r.seams for r in self.rows), self.trainable, self.changed, self.bytes))
        for name, places, trainable, changed, size in rows:
            share = 100.0 * trainable / self.base if self.base else 0.0
            lines.append(f"{name:<12}{places:>8,}{trainable:>14,}{share:>11.4f}{changed:>14,}{size:>14,}")
        lines.append(f"base: {self.base:,} parameters, {self.base_bytes:,} bytes")
        lines += [f"{row.name}: {row.method}" for row in self.rows]
        return "\n".join(lines)


def summary(model: nnx.Module) -> Summary:
    """Counts of an adapted model: trainable and changed parameters, memory, the base's size.

    Works on shapes, so a model built under `jax.eval_shape` counts too.

    Example:
      >>> print(jpeft.summary(model))
    """
    rows: dict[tuple[str, str], Row] = {}
    for _, module in grafts(model):
        for name, adapter in module.adapters.items():
            at = name, adapter.method.kind
            row, more = rows.get(at), _row(name, adapter)
            rows[at] = more if row is None else added(row, more)
    base = [leaf for leaf in _leaves(model) if isinstance(leaf, nnx.Param) and not isinstance(leaf, AdapterParam)]
    codes = [leaf for leaf in _leaves(model) if isinstance(leaf, Quantized)]
    unpacked = [module for _, module in nnx.iter_modules(model) if isinstance(module, QuantizedKernel)]
    size, memory = sum(map(_size, [*base, *unpacked])), sum(map(_bytes, [*base, *codes]))
    return Summary(tuple(rows.values()), size, memory)


def _row(name: str, adapter: Adapter) -> Row:
    size = sum(_bytes(leaf) for leaf in _leaves(adapter) if isinstance(leaf, AdapterParam))
    counted = adapter.acts or (adapter.site.seam == "model" and size > 0)  # else shared by places that were taken over
    trainable, changed = adapter.method.count(adapter.site) if counted else (0, 0)
    for leaf, layers in adapter.saved_layers.items():
        own = _size(adapter.saved[leaf]) * sum(layers) // len(layers)
        trainable, changed = trainable + own, changed + own
    acting = adapter.site.active if adapter.acts else tuple(map(any, zip(*adapter.saved_layers.values(), strict=True)))
    places = 0 if adapter.site.seam == "model" else sum(acting)
    return Row(name, adapter.method, places, trainable, changed, size)


def added(a: Row, b: Row) -> Row:
    """The numbers of both, as `a`'s."""
    added = {f: getattr(a, f) + getattr(b, f) for f in ("seams", "trainable", "changed", "bytes")}
    return dataclasses.replace(a, **added)


def _leaves(node: Any) -> list[Any]:
    return nnx.graph.flatten(node)[1].leaves  # type: ignore[union-attr]


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape)


def _bytes(leaf: Any) -> int:
    return _size(leaf) * leaf.dtype.itemsize
