# SPDX-License-Identifier: Apache-2.0
"""The table is complete."""

from contracts.table import METHODS, MODELS
from flax import nnx

import jpeft
from jpeft import seams


def test_every_method_is_in_the_table():
    assert {make(["a"]).kind for make in METHODS.values()} == set(jpeft.METHODS)


def test_every_kind_of_place_is_in_the_table():
    kinds = {seams.kind(module) for row in MODELS.values() for _, module in nnx.iter_modules(row.build())}
    assert kinds - {None} == {"projection", "residual", "keys_values", "input"}
