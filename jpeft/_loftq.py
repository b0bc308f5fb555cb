# SPDX-License-Identifier: Apache-2.0
"""LoftQ: a quantized base and LoRA factors that together start as near to the float base as they can.

Li et al. 2023, https://arxiv.org/abs/2310.08659, algorithm 1: from A B = 0, each iteration quantizes what the factors
leave of the kernel, and takes the principal part of the error that this makes:

    Q <- q(W - s A B)        s A B <- U S V, the first `rank` singular triples of W - Q

with A = U sqrt(S / s), B = sqrt(S / s) V. (PEFT leaves out s, so that there alpha must be the rank.)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import seams
from ._adapt import adapt
from ._fields import whole
from ._graft import adapters, base_type, rebase
from ._method import Method, wide
from ._quantize import to_quantize
from ._quantized import put_codes, quantized_type, rounded
from ._walk import modules


def loftq(
    model: nnx.Module,
    method: Method,
    scheme: str = "nf4",
    iterations: int = 1,
    *,
    key: jax.Array,
    name: str | None = None,
    targets: Any = None,
    exclude: Any = (),
) -> Any:
    """`model` quantized and adapted at once, so that the factors start with what quantization takes away.

    A new model: what `jpeft.adapt(jpeft.quantize(model, scheme), method, key=key)` gives, with other numbers. Kernels
    that are quantized and not adapted are as there, and so is the start of places that are adapted and not quantized.
    The base alone, with its adapter left out, is further from the float model than a plainly quantized one.

    Args:
      model: a float model, without adapters.
      method: a `jpeft.LoRA` with the default `init`; its `alpha` and ranks count.
      scheme, targets, exclude: what is quantized, and how; as of `jpeft.quantize`.
      iterations: of the algorithm; each takes a singular value decomposition of every adapted kernel.
      key, name: as of `jpeft.adapt`.

    Raises:
      ValueError: as `jpeft.quantize` and `jpeft.adapt`; a method without plain factors A and B; a rank larger than a
        kernel's; a method that adapts no quantized kernel.

    Example:
      >>> model = jpeft.loftq(model, jpeft.LoRA(rank=16, alpha=16, targets="all-linear"), "nf4", 5, key=key)
    """
    whole("loftq", "iterations", iterations)
    if not isinstance(method, Method):
        raise TypeError(f"loftq takes one jpeft method, a LoRA, got {type(method).__name__}; adapt with others later")
    chosen = {found.path for found in to_quantize(model, scheme, targets, exclude)}
    started = adapt(model, method, key=key, name=name)
    name, together = name or method.kind, 0
    for found in modules(started):
        if found.path not in chosen:
            continue
        module, projection = found.module, seams.projection(found.module)
        matrix, adapter = projection.read(module), adapters(module).get(name)
        if adapter is not None and adapter.acts:
            matrix = _start(adapter, matrix, scheme, iterations)
            together += 1
        put_codes(module, projection, matrix, scheme)  # type: ignore[arg-type]
        rebase(module, quantized_type(base_type(module), projection.kernel))
    if not together:
        raise ValueError(
            f"no kernel is both quantized and adapted: {type(method).__name__} acts beside none of {', '.join(chosen)}"
        )
    return started


def _start(adapter: Any, matrix: jax.Array, scheme: str, iterations: int) -> jax.Array:
    """Sets A and B of `adapter`, in place; returns the matrix to quantize."""
    method, site = adapter.method, adapter.site
    leaves = {name for name, leaf in vars(adapter).items() if isinstance(leaf, nnx.Variable)} - {"layer_index"}
    if leaves != {"A", "B"} or getattr(method, "init", "default") != "default":
        raise ValueError(
            f"loftq sets a start of plain factors A and B, of a jpeft.LoRA with the default init; got {method}, with "
            f"{', '.join(sorted(leaves)) or 'no leaves'}"
        )
    table = np.asarray(method.table(site))
    if table.shape[-1] > min(site.d_in, site.d_out):
        raise ValueError(f"{site.path} is {site.d_in} x {site.d_out}, which holds no start of rank {table.shape[-1]}")
    scale = jnp.asarray(table, jnp.float32).reshape(*site.lead, -1)
    left, a, b = _alternated(matrix.astype(wide(matrix.dtype)), scale, scheme, iterations)
    for leaf, value in (("A", a), ("B", b)):
        variable = getattr(adapter, leaf)
        variable.set_value(value.astype(variable.dtype))
    return left


@functools.partial(jax.jit, static_argnums=(2, 3))
def _alternated(
    matrix: jax.Array, scale: jax.Array, scheme: str, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is quantized at last, and the factors, of a matrix `[*lead, d_in, d_out]`; scale is `[*lead, rank]`."""
    left, u, v = matrix, jnp.zeros(()), jnp.zeros(())
    for i in range(iterations):
        left = matrix - jnp.matmul(u, v, precision="highest") if i else matrix
        u, values, v = jnp.linalg.svd(matrix - rounded(left, scheme), full_matrices=False)
        root = jnp.sqrt(values[..., : scale.shape[-1]]) * (scale > 0)  # nothing where a rank is padding
        u, v = u[..., : scale.shape[-1]] * root[..., None, :], v[..., : scale.shape[-1], :] * root[..., None]
    share = 1 / jnp.sqrt(jnp.where(scale > 0, scale, 1))
    return left, u * share[..., None, :], v * share[..., None]
