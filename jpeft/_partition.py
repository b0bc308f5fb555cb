# SPDX-License-Identifier: Apache-2.0
"""A model as three values: a static graphdef, and two flat dicts of arrays, trainable and frozen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from ._method import AdapterParam

#: Arrays by their paths; of a model by shape (`nnx.eval_shape`), what stands in their place.
Leaves = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GraphDef:
    """The static part of a partitioned model: hashable, equal for models of the same make.

    Attributes:
      nnx: NNX's own graphdef.
      paths: path of every leaf, in NNX's order.
      trainable: the paths among them that are trained.
    """

    nnx: nnx.GraphDef
    paths: tuple[str, ...]
    trainable: frozenset[str]

    def __repr__(self) -> str:
        return f"GraphDef({len(self.trainable)} trainable of {len(self.paths)} leaves)"


def partition(model: nnx.Module) -> tuple[GraphDef, Leaves, Leaves]:
    """Splits a model into `(graphdef, trainable, frozen)`.

    `trainable` holds the adapters' leaves, `frozen` all the rest, each as `{"layers/attn/q_proj/kernel": array}`.
    A model without adapters has an empty `trainable`. `combine` is the inverse.

    Example:
      >>> graphdef, trainable, frozen = jpeft.partition(model)
      >>> def loss(trainable, frozen, batch):
      ...     return my_loss(jpeft.combine(graphdef, trainable, frozen), batch)
      >>> grads = jax.grad(loss)(trainable, frozen, batch)
    """
    graphdef, flat = nnx.graph.flatten(model)
    paths = tuple("/".join(map(str, path)) for path in flat.paths)
    if len(set(paths)) != len(paths):
        raise ValueError("two leaves of the model have the same path once joined by '/'; rename one of its attributes")
    leaves = dict(zip(paths, flat.leaves, strict=True))
    trainable = frozenset(path for path, leaf in leaves.items() if isinstance(leaf, AdapterParam))
    values = {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in leaves.items()}
    return (
        GraphDef(graphdef, paths, trainable),
        {path: value for path, value in values.items() if path in trainable},
        {path: value for path, value in values.items() if path not in trainable},
    )


def combine(graphdef: GraphDef, trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
    """The model of which these are the parts; call it inside the function that `jax.jit` traces.

    What stands in an array's place, as a shape or None, stands there in the model.

    Raises:
      ValueError: leaves are missing, or are none of this model's.
    """
    _check(graphdef.trainable, trainable, "trainable")
    _check(set(graphdef.paths) - graphdef.trainable, frozen, "frozen")
    leaves = {**frozen, **trainable}
    return nnx.graph.unflatten(graphdef.nnx, [leaves[path] for path in graphdef.paths])


def _check(expected: Any, given: Mapping[str, Any], half: str) -> None:
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or extra:
        said = [f"{len(paths)} {word} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
                for word, paths in (("missing", missing), ("unknown", extra)) if paths]  # fmt: skip
        raise ValueError(
            f"the {half} leaves are not this graphdef's: {' and '.join(said)}; take both from one partition"
        )
