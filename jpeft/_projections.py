# SPDX-License-Identifier: Apache-2.0
"""Projections: modules of the form `y = x @ W`, seen as a matrix `[d_in, d_out]` whatever their kernel's layout is.

What a low-rank method needs of one is small: the matrix, `contract` (the input times another matrix of d_in rows), and
`emit` (d_out columns back into the output's layout). So a method is written once, for all of them.
"""

import abc
import functools
import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ._rows import scale_rows
from ._scope import made_again
from ._stream import token_ways


class Dims(NamedTuple):
    """A projection in numbers: leading (layer) axes, inputs and outputs of its matrix."""

    lead: tuple[int, ...]
    d_in: int
    d_out: int


class Projection(abc.ABC):
    """How methods see one type of module; `kernel` and `bias` name its attributes."""

    kernel: str
    bias: str | None
    #: How many of the leading axes are of matrices that stand side by side in one call, each with rows of its own.
    beside: int = 0

    @abc.abstractmethod
    def dims(self, module: Any) -> Dims:
        """Sizes, from the kernel's shape."""

    @abc.abstractmethod
    def matrix(self, module: Any, kernel: jax.Array) -> jax.Array:
        """`kernel` as `[*lead, d_in, d_out]`."""

    @abc.abstractmethod
    def unmatrix(self, module: Any, matrix: jax.Array) -> jax.Array:
        """The inverse of `matrix`."""

    @abc.abstractmethod
    def contract(self, module: Any, x: jax.Array, matrix: jax.Array) -> jax.Array:
        """The module's input times `matrix` `[d_in, n]` in the kernel's place: `[..., n]`."""

    def expand(self, module: Any, y: jax.Array, matrix: jax.Array) -> jax.Array:
        """What `contract` gave, `[..., n]`, times another matrix `[n, m]`: `[..., m]`."""
        return rows_times(y, matrix)

    @abc.abstractmethod
    def emit(self, module: Any, y: jax.Array) -> jax.Array:
        """`[..., d_out]` in the layout of the module's output."""

    def rows(self, module: Any, x: jax.Array) -> jax.Array:
        """The module's input as `[..., d_in]`, in the order of the matrix's rows.

        Raises:
          ValueError: it is no such row of numbers.
        """
        raise ValueError(f"the input of {type(module).__name__} is not a row of d_in numbers")

    def unrows(self, module: Any, rows: jax.Array) -> jax.Array:
        """The inverse of `rows`."""
        raise ValueError(f"the input of {type(module).__name__} is not a row of d_in numbers")

    def scale_input(self, module: Any, x: jax.Array, scale: jax.Array) -> jax.Array:
        """The module's input `x`, each of its d_in entries times one of `scale` `[d_in]`.

        Raises:
          ValueError: its inputs are no entries of a vector.
        """
        raise ValueError(f"the input of a {type(module).__name__} is no vector that could be scaled entry by entry")

    def scale_output(self, module: Any, y: jax.Array, scale: jax.Array) -> jax.Array:
        """The module's output `y`, each of its d_out entries times one of `scale` `[d_out]`."""
        return scale_rows(y, scale)

    def read(self, module: Any) -> jax.Array:
        """The module's kernel as a matrix, `[*lead, d_in, d_out]`."""
        return self.matrix(module, getattr(module, self.kernel)[...])

    def read_bias(self, module: Any) -> jax.Array | None:
        """The module's bias, in the layout in which it is added to the output; None without one."""
        leaf = getattr(module, self.bias, None) if self.bias else None
        return None if leaf is None else leaf[...]

    def less_bias(self, module: Any, y: jax.Array) -> jax.Array:
        """The module's output `y` less its bias."""
        bias = self.read_bias(module)
        return y if bias is None else y - jnp.broadcast_to(self._bias_along(module, bias, y), y.shape)

    def _bias_along(self, module: Any, bias: jax.Array, y: jax.Array) -> jax.Array:
        """`bias` in a shape that broadcasts to `y`."""
        return bias


class Matmul(Projection):
    """A kernel contracted by an einsum of two operands, input first: `"...i,io->...o"` is `nnx.Linear`.

    Args:
      kernel: attribute that holds the kernel.
      bias: attribute that holds the bias, or None; an attribute that is None counts as no bias.
      equation: the einsum, or a function of the module that gives it. Kernel axes that meet the input are d_in, the
        others d_out; an axis that is in all three has no matrix form and is refused.
    """

    def __init__(
        self, kernel: str = "kernel", bias: str | None = "bias", equation: str | Callable[[Any], str] = "...i,io->...o"
    ):
        self.kernel, self.bias, self._equation = kernel, bias, equation

    def _terms(self, module: Any) -> tuple[str, str, str]:
        equation = self._equation if isinstance(self._equation, str) else self._equation(module)
        if not equation or "->" not in equation or equation.count(",") != 1:
            raise ValueError(
                f"{type(module).__name__} has the equation {equation!r}; a projection needs the form 'x,kernel->y'"
            )
        inputs, out = equation.replace(" ", "").split("->")
        x, w = inputs.split(",")
        batched = [c for c in w if c in x and c in out]
        if batched:
            raise ValueError(
                f"the axes {', '.join(batched)} of {equation!r} are in input, kernel and output at once: "
                f"{type(module).__name__} is many small matrices, which adapters do not handle"
            )
        if len(set(w)) < len(w) or not set(w) <= set(x + out) - {"."}:
            raise ValueError(
                f"the kernel {w!r} of {equation!r} is no plain matrix: each of its axes must be named, once, and stand "
                f"in the input or in the output of {type(module).__name__}"
            )
        return x, w, out

    def _split(self, module: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], str, str, dict[str, int]]:
        x, w, _ = self._terms(module)
        lead = shape[: len(shape) - len(w)]
        sizes = dict(zip(w, shape[len(lead) :], strict=True))
        return lead, "".join(c for c in w if c in x), "".join(c for c in w if c not in x), sizes

    def dims(self, module: Any) -> Dims:
        lead, d_in, d_out, sizes = self._split(module, getattr(module, self.kernel).shape)
        return Dims(lead, math.prod(sizes[c] for c in d_in), math.prod(sizes[c] for c in d_out))

    def matrix(self, module: Any, kernel: jax.Array) -> jax.Array:
        lead, d_in, d_out, sizes = self._split(module, kernel.shape)
        _, w, _ = self._terms(module)
        kernel = jnp.einsum(f"...{w}->...{d_in}{d_out}", kernel)
        return kernel.reshape(*lead, math.prod(sizes[c] for c in d_in), math.prod(sizes[c] for c in d_out))

    def unmatrix(self, module: Any, matrix: jax.Array) -> jax.Array:
        shape = getattr(module, self.kernel).shape
        lead, d_in, d_out, sizes = self._split(module, shape)
        _, w, _ = self._terms(module)
        matrix = matrix.reshape(*lead, *(sizes[c] for c in d_in + d_out))
        return jnp.einsum(f"...{d_in}{d_out}->...{w}", matrix)

    def layout(self, module: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Sizes of the matrix's axes, d_in's first; which of them each axis of the kernel is; how many are d_in's."""
        _, d_in, d_out, sizes = self._split(module, getattr(module, self.kernel).shape)
        _, w, _ = self._terms(module)
        return tuple(sizes[c] for c in d_in + d_out), tuple((d_in + d_out).index(c) for c in w), len(d_in)

    def contract(self, module: Any, x: jax.Array, matrix: jax.Array) -> jax.Array:
        x_axes, kept, d_in, sizes = self._input(module)
        if x_axes == kept + d_in:
            return rows_times(x.reshape(*x.shape[: x.ndim - len(d_in)], -1), matrix)
        weight = matrix.reshape(*(sizes[c] for c in d_in), matrix.shape[-1])
        taken = "".join(self._terms(module))
        rank = next(c for c in string.ascii_letters if c not in taken)
        return jnp.einsum(f"{x_axes},{d_in}{rank}->{kept}{rank}", x, weight)

    def rows(self, module: Any, x: jax.Array) -> jax.Array:
        x_axes, kept, d_in, _ = self._input(module)
        x = jnp.einsum(f"{x_axes}->{kept}{d_in}", x)
        return x.reshape(*x.shape[: x.ndim - len(d_in)], -1)

    def unrows(self, module: Any, rows: jax.Array) -> jax.Array:
        x_axes, kept, d_in, sizes = self._input(module)
        return jnp.einsum(f"{kept}{d_in}->{x_axes}", rows.reshape(*rows.shape[:-1], *(sizes[c] for c in d_in)))

    def _input(self, module: Any) -> tuple[str, str, str, dict[str, int]]:
        """The input's axes, those that the output keeps, those that the kernel meets, and sizes of the kernel's."""
        x_axes, _, out = self._terms(module)
        _, d_in, d_out, sizes = self._split(module, getattr(module, self.kernel).shape)
        return x_axes, "".join(c for c in out if c not in d_out), d_in, sizes

    def emit(self, module: Any, y: jax.Array) -> jax.Array:
        _, _, out = self._terms(module)
        _, _, d_out, sizes = self._split(module, getattr(module, self.kernel).shape)
        kept = "".join(c for c in out if c not in d_out)
        y = y.reshape(*y.shape[:-1], *(sizes[c] for c in d_out))
        return jnp.einsum(f"{kept}{d_out}->{out}", y)

    def _bias_along(self, module: Any, bias: jax.Array, y: jax.Array) -> jax.Array:
        _, _, out = self._terms(module)
        _, _, d_out, sizes = self._split(module, getattr(module, self.kernel).shape)
        first, _, last = out.rpartition("...")
        middle = (1,) * (y.ndim - len(first + last))
        first, last = (tuple(sizes[c] if c in d_out else 1 for c in part) for part in (first, last))
        return bias.reshape(*first, *middle, *last)

    def scale_input(self, module: Any, x: jax.Array, scale: jax.Array) -> jax.Array:
        return self._scaled(module, x, scale, 0)

    def scale_output(self, module: Any, y: jax.Array, scale: jax.Array) -> jax.Array:
        return self._scaled(module, y, scale, 2)

    def _scaled(self, module: Any, x: jax.Array, vector: jax.Array, term: int) -> jax.Array:
        """`x` times `[d_in]` along the input's axes, or `[d_out]` along the output's: of `nh` in `...hn`."""
        axes = self._terms(module)[term]
        _, d_in, d_out, sizes = self._split(module, getattr(module, self.kernel).shape)
        own, named = (d_out if term else d_in), axes.replace("...", "")
        ordered = "".join(c for c in axes if c in own)
        vector = jnp.einsum(f"{own}->{ordered}", vector.reshape([sizes[c] for c in own]))
        if axes == f"...{ordered}":
            return scale_rows(x, vector)
        shape = [sizes[c] if c in own else 1 for c in named]
        at = max(axes.find("..."), 0)
        return x * vector.reshape(shape[:at] + [1] * (x.ndim - len(named)) + shape[at:])


def rows_times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix`, `[..., n] @ [n, m]`, as a product of two plain matrices, whose gradients XLA computes faster.

    The checkpoint computes nothing again: it makes the backward pass keep `x` itself, which other layers keep too, and
    not its flat copy. Rows whose tokens a mesh splits stay apart: laid end to end, all of them would be gathered.
    """
    return _rows_times(made_again(x), matrix)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _rows_times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    if x.ndim == 3 and token_ways(x) > 1:
        return x @ matrix
    return (x.reshape(-1, matrix.shape[0]) @ matrix).reshape(*x.shape[:-1], matrix.shape[1])


class Lookup(Projection):
    """A table of rows read by integer ids: a one-hot input times the table."""

    def __init__(self, kernel: str = "embedding"):
        self.kernel, self.bias = kernel, None

    def dims(self, module: Any) -> Dims:
        *lead, d_in, d_out = getattr(module, self.kernel).shape
        return Dims(tuple(lead), d_in, d_out)

    def matrix(self, module: Any, kernel: jax.Array) -> jax.Array:
        return kernel

    def unmatrix(self, module: Any, matrix: jax.Array) -> jax.Array:
        return matrix

    def contract(self, module: Any, x: jax.Array, matrix: jax.Array) -> jax.Array:
        return held(jnp.take(matrix, x, axis=0), x, module)

    def emit(self, module: Any, y: jax.Array) -> jax.Array:
        return y


def held(rows: Float[Array, "*batch d"], ids: Any, table: Any) -> Float[Array, "*batch d"]:
    """`rows`, looked up at `ids`, without a gradient at the row that the table does not train, if it names one.

    The row alone: what is the same for all tokens, as a LoRA's B, learns of the places where that token stands.
    """
    pad = getattr(table, "untrained_row", None)
    return rows if pad is None else jnp.where((jnp.asarray(ids) == pad)[..., None], jax.lax.stop_gradient(rows), rows)


class Convolution(Projection):
    """A kernel `[*window, d_in, d_out]` slid over the input, as `nnx.Conv`; the window counts into d_in."""

    def __init__(self, kernel: str = "kernel", bias: str | None = "bias"):
        self.kernel, self.bias = kernel, bias

    def dims(self, module: Any) -> Dims:
        if module.feature_group_count != 1:
            raise ValueError(
                f"a convolution with feature_group_count={module.feature_group_count} is many small matrices, "
                "which adapters do not handle"
            )
        if module.mask is not None:
            raise ValueError("a convolution with a mask has no low-rank change that keeps the mask")
        shape = getattr(module, self.kernel).shape
        window = len(module.kernel_size)
        lead = shape[: len(shape) - window - 2]
        return Dims(lead, math.prod(shape[len(lead) : -1]), shape[-1])

    def matrix(self, module: Any, kernel: jax.Array) -> jax.Array:
        lead, d_in, d_out = self.dims(module)
        return kernel.reshape(*lead, d_in, d_out)

    def unmatrix(self, module: Any, matrix: jax.Array) -> jax.Array:
        return matrix.reshape(getattr(module, self.kernel).shape)

    def contract(self, module: Any, x: jax.Array, matrix: jax.Array) -> jax.Array:
        kernel = matrix.reshape(*getattr(module, self.kernel).shape[:-1], matrix.shape[-1])
        window = object.__new__(nnx.Conv)  # past NNX, which lets nobody set attributes inside an inner jit
        vars(window).update(vars(module), kernel=nnx.Param(kernel), use_bias=False, bias=None)
        vars(window).update(dtype=None, preferred_element_type=None)  # in the adapter's precision, not the base's
        return nnx.Conv.__call__(window, x)

    def emit(self, module: Any, y: jax.Array) -> jax.Array:
        return y


def _linear_general(module: Any) -> str:
    """The einsum of `nnx.LinearGeneral`, whose contracted axes must be the last ones, in order."""
    num_in = len(module.axis)
    if module.batch_axis or sorted(module.axis) != list(range(-num_in, 0)) or list(module.axis) != sorted(module.axis):
        raise ValueError(
            f"LinearGeneral with axis={module.axis}, batch_axis={dict(module.batch_axis)} has no matrix form; "
            "adapters need the contracted axes to be the last ones, in order, and no batch axis"
        )
    letters = "abcdefghijklmnop"
    d_in, d_out = letters[:num_in], letters[num_in : num_in + len(module.out_features)]
    return f"...{d_in},{d_in}{d_out}->...{d_out}"


_PROJECTIONS: dict[type, Projection] = {
    nnx.Linear: Matmul(),
    nnx.LinearGeneral: Matmul(equation=_linear_general),
    nnx.Einsum: Matmul(equation=lambda module: module.einsum_str),
    nnx.Embed: Lookup(),
    nnx.Conv: Convolution(),
}


def register(module_type: type, projection: Projection) -> None:
    """Tells jpeft how to see a module type of your own; subclasses are covered too.

    Example:
      >>> class Dense(nnx.Module):
      ...     def __init__(self, w):
      ...         self.w = nnx.Param(w)
      ...     def __call__(self, x):
      ...         return x @ self.w[...]
      >>> jpeft.register(Dense, jpeft.seams.Matmul(kernel="w", bias=None))
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nnx.Module)):
        raise TypeError(f"register takes a subclass of nnx.Module, got {module_type!r}")
    if not isinstance(projection, Projection):
        raise TypeError(f"register takes a jpeft.seams.Projection (Matmul, Lookup, Convolution), got {projection!r}")
    _PROJECTIONS[module_type] = projection


def projection(module: Any) -> Projection:
    """How methods see `module`; its type, or one that it inherits from, must be registered."""
    found = registered(module)
    if found is None:
        raise TypeError(f"{type(module).__name__} is no projection that jpeft knows; tell it by jpeft.register")
    return found


def registered(module: Any) -> Projection | None:
    return next((_PROJECTIONS[t] for t in type(module).__mro__ if t in _PROJECTIONS), None)
