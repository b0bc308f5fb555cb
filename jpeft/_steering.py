# SPDX-License-Identifier: Apache-2.0
"""Methods that take part in every update, as AdaLoRA does: their share around an optimizer, and in its state."""

from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from ._graft import ADAPTERS, grafts
from ._method import Adapter, Steering
from ._partition import GraphDef, Leaves, combine


class Steered(NamedTuple):
    """State of an optimizer in which methods take part: what each of them knows, by the adapter's name."""

    methods: dict[str, Any]
    inner: Any


def steered(tx: optax.GradientTransformation, model: nnx.Module | GraphDef) -> optax.GradientTransformation:
    """`tx` with what the methods on `model` do to gradients and updates; `tx` itself where none does anything."""
    parts, inner = steerings(model), optax.with_extra_args_support(tx)
    if not parts:
        return tx

    def init(trainable: Leaves) -> Steered:
        return Steered({name: part.init(trainable) for name, part in parts.items()}, inner.init(trainable))

    def update(gradients: Any, state: Any, trainable: Any = None, **extra: Any) -> tuple[Any, Steered]:
        if trainable is None:
            raise ValueError(
                f"the methods {', '.join(parts)} need the parameters: tx.update(gradients, state, trainable)"
            )
        known = dict(state.methods)
        for name, part in parts.items():
            gradients, known[name] = part.gradients(gradients, known[name], trainable)
        updates, rest = inner.update(gradients, state.inner, trainable, **extra)
        for name, part in parts.items():
            updates, known[name] = part.updates(updates, gradients, known[name], trainable)
        return updates, Steered(known, rest)

    return optax.GradientTransformationExtraArgs(init, update)


def check_steered(model: nnx.Module | GraphDef, state: Any) -> None:
    """Raises a ValueError where a method on `model` takes part in updates, and in this optimizer's state does not."""
    found = [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, Steered)) if isinstance(s, Steered)]
    missing = sorted(set(steerings(model)) - {name for state in found for name in state.methods})
    if missing:
        raise ValueError(
            f"the adapter {missing[0]!r} takes part in every update, and this optimizer leaves it out; make it by "
            "jpeft.optimizer(tx, model=model), or with the graphdef as model="
        )


def steerings(model: nnx.Module | GraphDef) -> dict[str, Steering]:
    """What the methods on a model do to its updates, by the adapters' names."""
    if isinstance(model, GraphDef):
        blank = dict.fromkeys(model.paths, 0.0)
        trainable = {path: blank.pop(path) for path in model.trainable}
        model = combine(model, trainable, blank)  # type: ignore[arg-type]
    acting: dict[str, dict[str, Adapter]] = {}
    for path, module in grafts(model):
        for name, adapter in module.adapters.items():
            if adapter.acts:
                place = "/".join(filter(None, (path, ADAPTERS, name)))
                acting.setdefault(name, {})[place] = adapter
    found = {name: next(iter(places.values())).method.steer(places) for name, places in acting.items()}
    return {name: part for name, part in found.items() if part is not None}
