# SPDX-License-Identifier: Apache-2.0
"""What a traced function computes, and what its derivative keeps, by shape: nothing is compiled or run."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from ..._grouped import BY_BLOCKS


def product_flops(fn: Callable[..., Any], *arguments: Any) -> float:
    """Products and sums of all matrix products of `fn`, two for each pair of factors; elementwise work is left out.

    A loop's body counts as often as it runs (one of unknown length, as `while_loop`, once), of a branch the largest.
    XLA's own count (`cost_analysis`) takes a loop's body once, whatever its length.
    """
    return _flops(jax.make_jaxpr(fn)(*arguments).jaxpr)


@dataclasses.dataclass(frozen=True)
class Kept:
    """An array that a derivative keeps.

    Attributes:
      shape, dtype: its own.
      gathered: it is what attention has gathered along `sequence`: keys or values of all tokens.
      in_parts: its examples are the parts of rows, a device along `sequence` has one of each: `[batch·ways, ...]`.
      on_host: it lies in the host's memory until the backward pass fetches it.
    """

    shape: tuple[int, ...]
    dtype: Any
    gathered: bool
    in_parts: bool
    on_host: bool = False


def kept(fn: Callable[..., Any], *arguments: Any) -> list[Kept]:
    """The arrays that the derivative of a scalar `fn` with respect to its first argument keeps from the forward pass.

    What is one of the arguments is left out: it is there anyway. So is what is another one over again, as the same
    array in the same other dtype, of which the compiler makes one.
    """

    def residuals(first: Any, *rest: Any) -> Any:
        return jax.tree.leaves(jax.vjp(lambda x: fn(x, *rest), first)[1])

    jaxpr = jax.make_jaxpr(residuals)(*arguments).jaxpr
    given = {id(variable) for variable in (*jaxpr.invars, *jaxpr.constvars)}
    made = {id(out): (equation, i) for equation in jaxpr.eqns for i, out in enumerate(equation.outvars)}
    found = {_origin(v, made): v for v in jaxpr.outvars if not isinstance(v, core.Literal) and id(v) not in given}
    specs = ((v.aval, _spec(v, made)) for v in found.values())
    return [
        Kept(x.shape, x.dtype, spec[1:2] == (None,), spec != () and "sequence" in (spec[0] or ()), _on_host(x))
        for x, spec in specs
    ]


def _on_host(aval: Any) -> bool:
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def _spec(variable: Any, made: dict[int, tuple[Any, int]]) -> tuple[Any, ...]:
    """How a variable was told to lie that is, in another dtype or order, an array of four axes; () where it was not."""
    equation, index = made.get(id(variable), (None, 0))
    if equation is None or isinstance(variable, core.Literal):
        return ()
    if equation.primitive.name == "sharding_constraint":
        return tuple(getattr(equation.params["sharding"], "spec", ())) if variable.aval.ndim == 4 else ()
    if equation.primitive.name in (*_COPIES, "transpose"):
        return _spec(equation.invars[0], made)
    body = next(_inner(equation), None)
    if body is None or (equation.primitive.name == "scan" and index < equation.params["num_carry"]):
        return ()
    return _spec(
        body.outvars[index], {id(out): (inner, i) for inner in body.eqns for i, out in enumerate(inner.outvars)}
    )


def _origin(variable: Any, made: dict[int, tuple[Any, int]]) -> tuple[Any, ...]:
    """What a variable is a copy of, in another dtype or shape, and which; through a scan, what its body's is."""
    equation, index = made.get(id(variable), (None, 0))
    if equation is None or isinstance(variable, core.Literal):
        return (id(variable),)
    if equation.primitive.name in _COPIES:
        return (*_origin(equation.invars[0], made), str(variable.aval))
    if equation.primitive.name == "scan":
        body = equation.params["jaxpr"].jaxpr
        inside = {id(out): (inner, i) for inner in body.eqns for i, out in enumerate(inner.outvars)}
        return (id(equation), index if index < equation.params["num_carry"] else _origin(body.outvars[index], inside))
    return (id(variable),)


def products(jaxpr: core.Jaxpr) -> Iterator[tuple[Any, int]]:
    """Every matrix product of a program, and how often it runs; of a conditional those of all branches."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _PRODUCTS:
            yield equation, 1
        for inner in _inner(equation):
            yield from ((product, n * _times(equation)) for product, n in products(inner))


def _flops(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = _name(equation)
        if name in BY_BLOCKS:
            total += _of_experts(equation)
            continue
        if name in _PRODUCTS:
            total += _PRODUCTS[name](equation)
        inner = [_flops(found) for found in _inner(equation)]
        total += (max(inner, default=0.0) if name == "cond" else sum(inner)) * _times(equation)
    return total


def _name(equation: Any) -> str:
    """The primitive's, or that of the function that has a rule of its own under `jax.vmap`."""
    name = equation.primitive.name
    return equation.params["call"].jaxpr.debug_info.func_name if name == "custom_vmap_call" else name


def _inner(equation: Any) -> Iterator[core.Jaxpr]:
    """The programs inside of an equation; of a custom derivative, that of the function."""
    for name, value in equation.params.items():
        for found in value if isinstance(value, (tuple, list)) else (value,):
            found = getattr(found, "jaxpr", found)
            if hasattr(found, "eqns") and not name.startswith(("jvp", "fwd", "bwd")):
                yield found


def _times(equation: Any) -> int:
    if equation.primitive.name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    return equation.params["length"] if equation.primitive.name == "scan" else 1


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _ragged(equation: Any) -> float:
    left, right = (v.aval.shape for v in equation.invars[:2])
    return 2.0 * math.prod(left) * right[-1]


def _of_experts(equation: Any) -> float:
    """Each row with one expert's matrix; or the products of rows and rows, each for one expert."""
    rows, other = (v.aval.shape for v in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    return 2.0 * math.prod(rows) * (out[-1] if len(out) == 2 else other[-1])


def _convolution(equation: Any) -> float:
    layout = equation.params["dimension_numbers"].rhs_spec  # (out, in, *space)
    kernel = equation.invars[1].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[axis] for axis in layout[1:])


#: What gives the array that it was given, written otherwise.
_COPIES = ("convert_element_type", "reshape", "copy", "squeeze", "expand_dims")

_PRODUCTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "ragged_dot": _ragged,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolution,
}
