# SPDX-License-Identifier: Apache-2.0
"""A kernel that is kept as codes and scales, and reads as the array that they stand for.

The module around it stays what it is and where it is. Its class becomes a subclass that builds the array when it is
called, inside a `jax.checkpoint`: the backward pass builds it again, so that nowhere two layers' arrays exist at once.
Codes get no gradient; that of the input is the array's, exactly.

The leaves, below the kernel's own path, are those of its scheme (`_schemes`).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from . import _fused
from ._projections import Matmul
from ._schemes import FORMATS, SCHEMES, Leaves
from ._scope import made_again


class Quantized(nnx.Variable):
    """A leaf of a quantized kernel; it is frozen."""


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _dequantized(leaves: Leaves, scheme: str, d_in: int, d_out: int, dtype: Any) -> jax.Array:
    return jax.lax.stop_gradient(FORMATS[scheme].dequantize(leaves, d_in, d_out).astype(dtype))


@functools.partial(jax.jit, static_argnums=1)
def _codes(matrix: jax.Array, scheme: str) -> Leaves:
    return SCHEMES[scheme].quantize(matrix)


@functools.partial(jax.jit, static_argnames="scheme")
def rounded(matrix: jax.Array, scheme: str) -> jax.Array:
    """`matrix` `[*lead, d_in, d_out]` quantized and back again, in float32."""
    chosen = SCHEMES[scheme]
    return chosen.dequantize(chosen.quantize(matrix), *matrix.shape[-2:])


class QuantizedKernel(nnx.Module):
    """In the place of a kernel's Param: `[...]`, `shape` and `dtype` are those of the array that it stands for.

    Args:
      leaves: codes and scales, by name.
      scheme: one of `FORMATS`.
      layout: of the kernel, as `Matmul.layout` gives it.
      dtype: of the array that it stands for.
    """

    def __init__(self, leaves: Leaves, scheme: str, layout: tuple[tuple[int, ...], tuple[int, ...], int], dtype: Any):
        self.scheme, self.dtype = scheme, dtype
        self.sizes, self.order, self.inputs = layout
        for name, leaf in leaves.items():
            setattr(self, name, Quantized(leaf))

    @property
    def leaves(self) -> dict[str, Any]:
        """The codes and scales, by name."""
        return {name: leaf[...] for name, leaf in vars(self).items() if isinstance(leaf, Quantized)}

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading (layer) axes."""
        return self.codes.shape[:-2] if hasattr(self, "codes") else self.flat_codes.shape[:-1]  # type: ignore[attr-defined]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *(self.sizes[axis] for axis in self.order))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def fused(self) -> _fused.Matrix | None:
        """What the Pallas kernel reads, if it knows the scheme and the layout."""
        scheme, (d_in, d_out) = FORMATS[self.scheme], self._matrix_sizes
        if scheme.reading is None or not hasattr(self, "codes"):
            return None
        return _fused.Matrix(self.scheme, scheme.reading, scheme.dequantize, d_in, d_out, jnp.dtype(self.dtype).name)

    @property
    def _matrix_sizes(self) -> tuple[int, int]:
        return math.prod(self.sizes[: self.inputs]), math.prod(self.sizes[self.inputs :])

    def __getitem__(self, index: Any) -> jax.Array:
        d_in, d_out = self._matrix_sizes
        matrix = _dequantized(self.leaves, self.scheme, d_in, d_out, jnp.dtype(self.dtype))
        lead = len(self.lead)
        kernel = matrix.reshape(*self.lead, *self.sizes).transpose(*range(lead), *(lead + i for i in self.order))
        return kernel[index]


#: The class attribute by which a quantized class remembers what it was.
_ORIGIN = "__quantized_from__"


@functools.cache
def quantized_type(base: type, kernel: str) -> type:
    """The subclass of `base` that builds its array for as long as a call takes."""

    def __call__(self: Any, *inputs: Any, **options: Any) -> Any:
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
        def run(*inputs: Any) -> Any:
            codes = getattr(self, kernel)
            if _fused.takes(self, base, codes.fused, inputs, options):
                return _fused.linear(self, codes.fused, codes.leaves, *inputs)
            plain = object.__new__(base)  # past NNX, which lets nobody set attributes inside an inner jit
            vars(plain).update(vars(self) | {kernel: nnx.Param(codes[...])})
            return base.__call__(plain, *inputs, **options)

        return run(*jax.tree.map(made_again, inputs))

    def __reduce__(self: Any) -> Any:
        return _rebuild, (base, kernel, dict(vars(self)))

    members = {_ORIGIN: base, "__call__": __call__, "__reduce__": __reduce__, "__module__": base.__module__}
    return type(f"Quantized{base.__name__}", (base,), members)


def _rebuild(base: type, kernel: str, attributes: dict[str, Any]) -> Any:
    module = object.__new__(quantized_type(base, kernel))
    vars(module).update(attributes)
    return module


def origin(module_type: type) -> type:
    """The class before `quantize_module`; the given one where it is none of its making."""
    return vars(module_type).get(_ORIGIN, module_type)


def quantize_module(module: Any, projection: Matmul, scheme: str) -> None:
    """Puts codes and scales in the place of `module`'s kernel, in place."""
    put_codes(module, projection, projection.read(module), scheme)
    become_quantized(module, projection)


def put_codes(module: Any, projection: Matmul, matrix: jax.Array, scheme: str) -> None:
    """Puts the codes of `matrix` in the place of `module`'s kernel, in place; they stand for an array of its dtype."""
    put_leaves(module, projection, _codes(matrix, scheme), scheme)


def put_leaves(module: Any, projection: Matmul, leaves: Leaves, scheme: str) -> None:
    """Puts codes and scales that are there already in the place of `module`'s kernel, in place."""
    kernel = QuantizedKernel(leaves, scheme, projection.layout(module), getattr(module, projection.kernel).dtype)
    setattr(module, projection.kernel, kernel)


def become_quantized(module: Any, projection: Matmul) -> None:
    """Makes a module, in the place of whose kernel there are codes, one that unpacks them."""
    object.__setattr__(module, "__class__", quantized_type(type(module), projection.kernel))
