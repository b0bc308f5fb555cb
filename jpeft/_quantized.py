# SPDX-License-Identifier: Apache-2.0
"""A kernel that is kept as codes and scales, and reads as the array that they stand for.

The module around it stays what it is and where it is. Its class becomes a subclass that builds the array when it is
called, inside a `jax.checkpoint`: the backward pass builds it again, so that nowhere two layers' arrays exist at once.
Codes get no gradient; that of the input is the array's, exactly.

The leaves of a kernel seen as a matrix `[d_in, d_out]`, below its own path, after the layer axes:

  int8             codes [d_in, d_out] int8; scales [1, d_out] float32
  nf4              codes [d_in / 2, d_out] uint8, row 2 i in the high half of row i and 2 i + 1 in the low one;
                   scales [d_in / 64, d_out] float32. Transposed they are bitsandbytes' bytes of torch's [d_out, d_in].
                   Where 64 does not divide d_in a block runs from one column into the next, so both are left as they
                   are there: flat_codes [ceil(d_in d_out / 2)], flat_scales [ceil(d_in d_out / 64)].
  nf4_double       the same, with scales or flat_scales as uint8 codes, whose values scale_largest
                   [ceil(blocks / 256)] and scale_mean [], both float32, give.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from . import _fused, _nf4
from ._method import wide
from ._projections import Matmul

Leaves = dict[str, jax.Array]


class Quantized(nnx.Variable):
    """A leaf of a quantized kernel; it is frozen."""


class Scheme(NamedTuple):
    """`quantize`: a matrix `[*lead, d_in, d_out]` -> leaves by name; `dequantize`: they, d_in, d_out -> the matrix.

    `reading`: how the Pallas kernel reads leaves of the name `codes`; None for a scheme that it does not know.
    """

    quantize: Callable[[jax.Array], Leaves]
    dequantize: Callable[[Mapping[str, jax.Array], int, int], jax.Array]
    reading: _fused.Reading | None = None


def _to_int8(matrix: jax.Array) -> Leaves:
    """Every column over its largest magnitude, times 127, rounded (Dettmers et al. 2022, without outliers)."""
    matrix = matrix.astype(jnp.float32)
    largest = jnp.abs(matrix).max(-2, keepdims=True)
    codes = jnp.round(matrix * (127 / jnp.where(largest > 0, largest, 1)))
    return {"codes": codes.astype(jnp.int8), "scales": largest / 127}


def _from_int8(leaves: Mapping[str, jax.Array], d_in: int, d_out: int) -> jax.Array:
    return leaves["codes"].astype(wide(leaves["scales"].dtype)) * leaves["scales"]


def _to_nf4(matrix: jax.Array) -> Leaves:
    *lead, d_in, d_out = matrix.shape
    codes, scale = _nf4.quantize(jnp.swapaxes(matrix, -1, -2).reshape(*lead, -1))
    if d_in % _nf4.BLOCK:
        return {"flat_codes": codes, "flat_scales": scale}
    return {"codes": _in_columns(codes, d_out), "scales": _in_columns(scale, d_out)}


def _from_nf4(leaves: Mapping[str, jax.Array], d_in: int, d_out: int) -> jax.Array:
    if "flat_codes" in leaves:
        codes, scale = leaves["flat_codes"], leaves["flat_scales"]
        flat = _nf4.dequantize(codes, scale.astype(wide(scale.dtype)), d_in * d_out)
        return jnp.swapaxes(flat.reshape(*flat.shape[:-1], d_out, d_in), -1, -2)
    codes, scale = leaves["codes"], leaves["scales"].astype(wide(leaves["scales"].dtype))
    codes = jnp.stack([codes >> 4, codes & 15], -2)  # [*lead, d_in / 2, 2, d_out]
    values = _nf4.values(codes.reshape(*scale.shape[:-1], _nf4.BLOCK, d_out)) * scale[..., None, :]
    return values.reshape(*scale.shape[:-2], d_in, d_out)


def _to_nf4_double(matrix: jax.Array) -> Leaves:
    leaves = _to_nf4(matrix)
    name = "scales" if "scales" in leaves else "flat_scales"
    flat = leaves[name] if name == "flat_scales" else _flat(leaves[name])
    codes, largest, mean = _nf4.quantize_scales(flat)
    codes = codes if name == "flat_scales" else _in_columns(codes, matrix.shape[-1])
    return {**leaves, name: codes, "scale_largest": largest, "scale_mean": mean}


def _from_nf4_double(leaves: Mapping[str, jax.Array], d_in: int, d_out: int) -> jax.Array:
    if "scales" in leaves:
        return _from_nf4({**leaves, "scales": _scales(leaves, d_out)}, d_in, d_out)
    scale = _nf4.dequantize_scales(leaves["flat_scales"], leaves["scale_largest"], leaves["scale_mean"])
    return _from_nf4({**leaves, "flat_scales": scale}, d_in, d_out)


def _scales(leaves: Mapping[str, jax.Array], d_out: int) -> jax.Array:
    """The scales of `nf4_double`, where they stand in columns."""
    found = _nf4.dequantize_scales(_flat(leaves["scales"]), leaves["scale_largest"], leaves["scale_mean"])
    return _in_columns(found, d_out)


def _in_columns(flat: jax.Array, d_out: int) -> jax.Array:
    """`[*lead, d_out n]`, one column after another, as `[*lead, n, d_out]`."""
    return jnp.swapaxes(flat.reshape(*flat.shape[:-1], d_out, -1), -1, -2)


def _flat(columns: jax.Array) -> jax.Array:
    """The inverse of `_in_columns`."""
    return jnp.swapaxes(columns, -1, -2).reshape(*columns.shape[:-2], -1)


_NF4 = _fused.Reading(lambda leaves, d_out: (leaves["codes"], leaves["scales"]), _nf4.pairs)
_INT8 = _NF4._replace(values=lambda codes: (codes.astype(jnp.float32),))

#: `scheme=` by name.
SCHEMES: Mapping[str, Scheme] = {
    "nf4": Scheme(_to_nf4, _from_nf4, _NF4),
    "nf4_double": Scheme(
        _to_nf4_double,
        _from_nf4_double,
        _NF4._replace(columns=lambda leaves, d_out: (leaves["codes"], _scales(leaves, d_out))),
    ),
    "int8": Scheme(_to_int8, _from_int8, _INT8),
}


def check_scheme(scheme: Any) -> None:
    """Raises a ValueError unless `scheme` is the name of one."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _dequantized(leaves: Leaves, scheme: str, d_in: int, d_out: int, dtype: Any) -> jax.Array:
    return jax.lax.stop_gradient(SCHEMES[scheme].dequantize(leaves, d_in, d_out).astype(dtype))


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
      matrix: the kernel as `[*lead, d_in, d_out]`.
      scheme: one of `SCHEMES`.
      layout: of the kernel, as `Matmul.layout` gives it.
      dtype: of the array that it stands for.
    """

    def __init__(
        self, matrix: jax.Array, scheme: str, layout: tuple[tuple[int, ...], tuple[int, ...], int], dtype: Any
    ):
        self.scheme, self.dtype = scheme, dtype
        self.sizes, self.order, self.inputs = layout
        for name, leaf in _codes(matrix, scheme).items():
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
        scheme, (d_in, d_out) = SCHEMES[self.scheme], self._matrix_sizes
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

        return run(*inputs)

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
    object.__setattr__(module, "__class__", quantized_type(type(module), projection.kernel))


def put_codes(module: Any, projection: Matmul, matrix: jax.Array, scheme: str) -> None:
    """Puts the codes of `matrix` in the place of `module`'s kernel, in place; they stand for an array of its dtype."""
    kernel = QuantizedKernel(matrix, scheme, projection.layout(module), getattr(module, projection.kernel).dtype)
    setattr(module, projection.kernel, kernel)
