# SPDX-License-Identifier: Apache-2.0
"""Reading what JAX traced."""

import math
from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those inside of others included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(getattr(value, "jaxpr", value))


def sizes(jaxpr: Any) -> Iterator[int]:
    """How many numbers each thing has that is computed."""
    return (math.prod(out.aval.shape) for equation in equations(jaxpr) for out in equation.outvars)
