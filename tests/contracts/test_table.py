# SPDX-License-Identifier: Apache-2.0
"""The table is complete."""

import pytest
from contracts.models import MODELS
from contracts.table import METHODS, Case
from flax import nnx

import jpeft
from jpeft import seams


def test_every_method_is_in_the_table():
    made = [line.make(["a"]) for line in METHODS.values()]
    assert {part.kind for method in made for part in getattr(method, "methods", (method,))} == set(jpeft.METHODS)


def test_every_method_is_in_the_fast_lane():
    assert all({*line.fast} & {*line.on} for line in METHODS.values())


@pytest.mark.parametrize("name", [name for name, line in METHODS.items() if len(line.on) < 3])
def test_a_method_is_refused_where_it_has_no_meaning(name):
    for model in {"foreign", "bert", "llama"} - {*METHODS[name].on}:
        with pytest.raises(ValueError, match=r"\w+ .{20,}"):
            Case(name, model).fresh()


def test_every_kind_of_place_is_in_the_table():
    kinds = {seams.kind(module) for row in MODELS.values() for _, module in nnx.iter_modules(nnx.eval_shape(row.build))}
    assert kinds - {None} == {"projection", "residual", "keys_values", "input"}
