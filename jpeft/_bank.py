# SPDX-License-Identifier: Apache-2.0
"""Many adapters of one base: stacked, picked by id, and run with another one for every row of a batch.

  bank = jpeft.bank([model_a, model_b])                     # slot 0 is the base, slot 1 model_a, slot 2 model_b
  y = jpeft.apply_bank(bank, ids, lambda model, x: model(x), x)          # row i by the adapter ids[i]

Adapters of different sizes (ranks, numbers of virtual tokens) are padded with zeros to the largest. What they differ
in beyond that, such as alpha, becomes a constant of each slot (`Method.padded`), so that one program runs all of them;
what is padding is multiplied by zero, and has no gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import core
from jaxtyping import Array, Float, Int

from ._fields import Frozen
from ._graft import ADAPTERS
from ._partition import GraphDef, Leaves, combine, partition
from ._scope import scope
from ._slots import check_make, slots


@dataclasses.dataclass(frozen=True)
class Own:
    """One adapter as it was before it came into the bank: its graphdef, and the shapes of its leaves, by path."""

    graphdef: GraphDef
    shapes: Frozen


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("trainable", "constants", "frozen"),
    meta_fields=("graphdef", "own"),
)
@dataclasses.dataclass(frozen=True)
class Bank:
    """Adapters of one base, a pytree: pass it through `jax.jit`, differentiate with respect to `trainable`.

    Attributes:
      graphdef: of the padded model that all slots share.
      trainable: leaves of the adapters by path, `[slots, ...]`.
      constants: what the adapters need and never train, `[slots, ...]`.
      frozen: the base, and constants that all adapters have in common; without a slot axis.
      own: what each adapter was, slot 0 left out.
    """

    graphdef: GraphDef
    trainable: Leaves
    constants: Leaves
    frozen: Leaves
    own: tuple[Own, ...]

    def __len__(self) -> int:
        return len(self.own) + 1

    def __repr__(self) -> str:
        return f"Bank({len(self)} slots, {len(self.trainable)} trainable leaves each)"

    def with_trainable(self, trainable: Leaves) -> "Bank":
        """The same bank with these leaves in the place of its own, as for `jax.grad`."""
        return dataclasses.replace(self, trainable=trainable)

    def combine(self, trainable: Leaves, constants: Leaves) -> Any:
        """The model of one slot, given its leaves as `select` picks them."""
        return combine(self.graphdef, trainable, {**self.frozen, **constants})

    def model(self, slot: int) -> Any:
        """The adapted model of one slot as it came, with its own method and sizes, and the bank's numbers.

        Raises:
          IndexError: there is no such slot, or it is slot 0, which holds no adapter.
        """
        if not 0 < slot < len(self):
            raise IndexError(f"adapters stand in the slots 1 to {len(self) - 1} (0 is the base), not in {slot}")
        own = self.own[slot - 1]
        leaves = {**self.frozen, **{p: v[slot] for half in (self.trainable, self.constants) for p, v in half.items()}}
        leaves |= {path: leaves[path][tuple(map(slice, shape))] for path, shape in own.shapes.items()}
        cut = {path: leaves[path] for path in own.graphdef.paths}
        trained = own.graphdef.trainable
        halves = ({p: v for p, v in cut.items() if (p in trained) == half} for half in (True, False))
        return combine(own.graphdef, *halves)


def bank(adapters: Sequence[Any], frozen: Leaves | None = None) -> Bank:
    """Adapters of one base in one `Bank`: slot 0 is the base without any, slot i the i-th of them.

    They are of the same method (or the same composition) at the same places, and may differ in size and scale: LoRAs in
    rank and alpha, prompts in their number of tokens. Each slot computes exactly what its adapter does alone.

    Args:
      adapters: adapted models, or `(graphdef, trainable)` of `jpeft.partition`.
      frozen: the frozen half that goes with such pairs.

    Raises:
      TypeError: they are no adapted models, or one that is not in a list.
      ValueError: they differ in their places, in an option that one program cannot have twice, or in their base; a
        method cannot be left out in some rows of a batch.

    Example:
      >>> bank = jpeft.bank([model_a, model_b])
    """
    if isinstance(adapters, nnx.Module) or not isinstance(adapters, Iterable):
        raise TypeError(f"bank takes a list of adapted models, got one {type(adapters).__name__}")
    models = [_model(adapter, frozen) for adapter in adapters]
    if not models:
        raise ValueError("a bank needs at least one adapter")
    parts = [partition(slot) for slot in slots(models)]
    check_make([graphdef for graphdef, _, _ in parts[1:]])
    trainable = {path: jnp.stack([own[path] for _, own, _ in parts]) for path in parts[0][1]}
    constants, common = _constants([kept for _, _, kept in parts])
    return Bank(parts[0][0], trainable, constants, common, tuple(map(_own, models)))


def select(bank: Bank, ids: Any) -> tuple[Leaves, Leaves]:
    """`(trainable, constants)` of the slots `ids`: of one, or with the leading axes of an array of them.

    What `bank.combine` takes; with an axis, under a `jax.vmap` over both. The gradient is added into the bank.

    Args:
      ids: slots, 0 for no adapter. Where they are traced they cannot be checked, and the leaves of one that is out of
        range are NaN.

    Raises:
      IndexError: there are no such slots.
      TypeError: they are no integers.

    Example:
      >>> model = bank.combine(*jpeft.select(bank, 2))
    """
    ids = _checked(ids, len(bank))
    halves = (
        {p: leaf.at[ids].get(mode="fill") for p, leaf in half.items()} for half in (bank.trainable, bank.constants)
    )
    trainable, constants = halves
    return trainable, constants


def apply_bank(
    bank: Bank, ids: Int[Any, " batch"], call: Callable[..., Any], *inputs: Any, key: jax.Array | None = None
) -> Any:
    """`call(model, *row)` for every row of a batch, each with the adapter `ids` says; the base is not copied.

    Args:
      bank: as of `jpeft.bank`.
      ids: slot of every row, `[batch]`; 0 for the base alone.
      call: (model, *inputs) -> outputs, as for a batch of one row; trees of arrays with the batch axis first.
      *inputs: of all rows.
      key: turns dropout on; every row draws masks of its own.

    Raises:
      IndexError, TypeError: as `select`.
      ValueError: the inputs have another number of rows.

    Example:
      >>> logits = jpeft.apply_bank(bank, ids, lambda model, tokens: model(tokens), tokens)
    """
    trainable, constants = select(bank, ids)
    rows = {int(leaf.shape[0]) if leaf.ndim else 1 for leaf in jax.tree.leaves(inputs)} | {len(ids)}
    if len(rows) > 1 or jnp.ndim(ids) != 1:
        raise ValueError(
            f"one id for every row: ids has shape {jnp.shape(ids)}, the inputs have "
            f"{sorted({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)})} rows"
        )
    keys = None if key is None else jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(ids)))

    def one(trainable: Leaves, constants: Leaves, key: Any, row: Any) -> Any:
        with scope(key=key):
            out = call(bank.combine(trainable, constants), *jax.tree.map(lambda x: x[None], row))
        return jax.tree.map(lambda y: y[0], out)

    return jax.vmap(one)(trainable, constants, keys, inputs)


def vote(logits: Float[Array, "adapters *batch classes"], how: str = "majority") -> Int[Array, "*batch"]:
    """The class that several adapters agree on, as for an ensemble of prompts (Lester et al. 2021).

    Args:
      logits: of every adapter for the same examples.
      how: `"majority"`: the class that most adapters put first, the likelier one where two have as many; `"mean"`: the
        class with the highest mean probability.

    Raises:
      ValueError: another `how`, or logits without an axis of adapters in front.
    """
    if logits.ndim < 2:
        raise ValueError(f"vote takes logits [adapters, ..., classes], got the shape {[*logits.shape]}")
    if how not in ("majority", "mean"):
        raise ValueError(f"how must be majority or mean, got {how!r}")
    mean = jax.nn.softmax(logits.astype(jnp.float32)).mean(0)
    if how == "mean":
        return mean.argmax(-1)
    votes = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    return jnp.where(votes == votes.max(-1, keepdims=True), mean, -1.0).argmax(-1)


def _model(adapter: Any, frozen: Leaves | None) -> nnx.Module:
    if isinstance(adapter, nnx.Module):
        return adapter
    if isinstance(adapter, tuple) and len(adapter) == 2 and isinstance(adapter[0], GraphDef):
        if frozen is None:
            raise ValueError("pairs (graphdef, trainable) need the frozen half too: bank(pairs, frozen)")
        return combine(*adapter, frozen)
    raise TypeError(f"a bank takes adapted models, or (graphdef, trainable) pairs; got {type(adapter).__name__}")


def _constants(slots: list[Leaves]) -> tuple[Leaves, Leaves]:
    """(adapters' constants, stacked; the base and the constants that are equal in all slots).

    Raises:
      ValueError: the bases differ.
    """
    stacked, common = {}, {}
    for path, value in slots[0].items():
        values = [slot[path] for slot in slots]
        if all(_same(value, other) for other in values):
            common[path] = value
        elif ADAPTERS in path.split("/"):
            stacked[path] = jnp.stack(values)
        else:
            raise ValueError(f"the adapters stand on different bases: {path} differs; load one base for all")
    return stacked, common


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, core.Tracer) or isinstance(b, core.Tracer):
        raise ValueError("a bank is made of arrays, outside of jax.jit")
    return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())


def _own(model: nnx.Module) -> Own:
    graphdef, trainable, frozen = partition(model)
    leaves = {**trainable, **frozen}
    return Own(graphdef, Frozen({p: v.shape for p, v in leaves.items() if ADAPTERS in p.split("/")}))


def _checked(ids: Any, size: int) -> jax.Array:
    """Ids of slots, those out of range beyond the end."""
    found = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(f"ids of a bank's slots are integers, got {found.dtype}")
    if not isinstance(found, core.Tracer):
        wrong = np.asarray(found)[(np.asarray(found) < 0) | (np.asarray(found) >= size)]
        if wrong.size:
            raise IndexError(
                f"the bank has the slots 0 to {size - 1} (0 is the base), got {sorted({*wrong.tolist()})[:5]}"
            )
    return jnp.where(found < 0, size, found)
