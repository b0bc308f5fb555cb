# SPDX-License-Identifier: Apache-2.0
"""Targets that are shared: one module in several places, and in every layer of a stack."""

import jax
import pytest
import subjects
from flax import nnx

from jpeft._stack import stack

KEY = jax.random.key(0)


class Shared(nnx.Module):
    """One module under two names."""

    def __init__(self, rngs):
        self.first = nnx.Dict(up=nnx.Linear(4, 4, rngs=rngs), out=nnx.Linear(4, 4, rngs=rngs))
        self.second = nnx.Dict(up=self.first.up)
        self.head = ("second",)


@pytest.mark.parametrize(
    "selection, left",
    [
        ({"targets": ["first.up"]}, "second/up"),
        ({"targets": r"second\..*"}, "first/up"),
        ({"targets": ["up", "out"], "exclude": ["second.up"]}, "second/up"),
        ({"targets": "all-linear"}, "second/up"),
        ({"targets": ["out"], "modules_to_save": ["first.up"]}, "second/up"),
        ({"targets": ["out"], "modules_to_save": ["second"]}, "first/up"),
    ],
    ids=str,
)
def test_half_of_a_shared_module_is_an_error(selection, left):
    message = f"first/up and second/up are one shared module, but the selection leaves out {left};"
    with pytest.raises(ValueError, match=message):
        subjects.adapted_names(Shared(nnx.Rngs(0)), **selection)


def test_both_halves_of_a_shared_module_are_one_place():
    model = Shared(nnx.Rngs(0))
    assert subjects.adapted_names(model, targets=["up"]) == {"first.up"}
    assert subjects.adapted_names(model, targets=["first.up", "second.up"]) == {"first.up"}
    assert subjects.adapted_names(model, targets=["out"], modules_to_save=["up"]) == {"first.out"}


class SharedLayers(nnx.Module):
    """Two layers that are the same block, as ALBERT's are."""

    def __init__(self, rngs):
        block = subjects.Block(4, rngs)
        self.layers = nnx.List([block, block])


def test_one_of_several_shared_layers_is_an_error():
    model = SharedLayers(nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="layers/0/up and layers/1/up are one shared module, but the selection leaves out"
    ):
        subjects.adapted_names(model, targets=["up"], layers=[1])
    assert subjects.adapted_names(model, targets=["up"], layers=[0, 1]) == {"layers.0.up"}


class SharedInStack(nnx.Module):
    """A module at two places of a stacked layer."""

    def __init__(self, rngs):
        self.blocks = stack(TwicePerLayer, 2, rngs)


class TwicePerLayer(nnx.Module):
    """Its layer."""

    def __init__(self, rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs)
        self.b = self.a


def test_a_shared_module_inside_of_a_stack():
    model = SharedInStack(nnx.Rngs(0))
    assert subjects.adapted_names(model, targets=r"blocks\.\d\.(a|b)") == {"blocks.0.a", "blocks.1.a"}
    assert subjects.adapted_names(model, targets=["a", "b"], layers=[1]) == {"blocks.1.a"}
    with pytest.raises(ValueError, match="blocks/a and blocks/b are one shared module"):
        subjects.adapted_names(model, targets=["a"])
    with pytest.raises(ValueError, match="blocks/a and blocks/b are one shared module"):
        subjects.adapted_names(model, targets=r"blocks\.\d\.a|blocks\.0\.b")
