# SPDX-License-Identifier: Apache-2.0
"""Quantized bases: `quantize` and `dequantize`, each giving a new model. What the codes are is in `_quantized`."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from . import seams
from ._fields import names
from ._graft import adapters, base_type, grafts, rebase
from ._method import Targets
from ._quantized import QuantizedKernel, origin, quantize_module
from ._schemes import check_scheme
from ._targets import ALL_LINEAR, chosen
from ._walk import Found, modules, own_leaves


def quantize(model: nnx.Module, scheme: str = "nf4", targets: Any = None, exclude: Any = ()) -> Any:
    """`model` with codes and scales in the place of kernels: a new model, to be adapted.

    A call builds each kernel when it needs it, in the dtype that it had; every layer of a stack has codes of its own.
    Methods that act beside a kernel (LoRA and its like) work as ever, those that train a copy of it are refused, and
    `jpeft.merge` gives a float model.

    Args:
      model: any model, without adapters.
      scheme: `"nf4"` (4.5 bits per weight) and `"nf4_double"` (4.127, by double quantization), `"fp4"` and
        `"fp4_double"`, as in bitsandbytes; `"int8"` (8 bits and a scale per output); `"int4_128"`, `"int4_64"`,
        `"int4_32"` (groups of so many inputs), with a zero of their own as `"int4_128_asymmetric"`; `"fp8_e4m3"`,
        `"fp8_e5m2"` (a scale per output), with one scale as `"fp8_e4m3_tensor"`.
      targets: which matrix products, by the rules of `jpeft.LoRA`; None for all but the task's head.
      exclude: names left out of `targets`, by the same rules.

    Raises:
      ValueError: an unknown scheme, or one that this device has no numbers for; a selection that matches nothing, in
        part, or something that is no matrix product; a kernel that is quantized already, shared, or not finite; a model
        with adapters.

    Example:
      >>> model = jpeft.quantize(model, "nf4_double")
      >>> model = jpeft.adapt(model, jpeft.LoRA(rank=16, targets="all-linear"), key=key)
    """
    model = nnx.clone(model)
    for found in to_quantize(model, scheme, targets, exclude):
        quantize_module(found.module, seams.projection(found.module), scheme)  # type: ignore[arg-type]
    return model


def to_quantize(model: nnx.Module, scheme: str, targets: Any, exclude: Any) -> list[Found]:
    """The modules of `model` of which `quantize` quantizes the kernels; its errors."""
    check_scheme(scheme)
    carrying = next((path for path, module in grafts(model) if adapters(module)), None)
    if carrying is not None:
        raise ValueError(
            f"{carrying or 'the model'} carries adapters, which were made for the kernels as they are: quantize first, "
            "then jpeft.adapt (or jpeft.strip the model before)"
        )
    asked = Targets(ALL_LINEAR if targets is None else names("targets", targets), names("exclude", exclude))
    everything = modules(model)
    found = chosen(model, asked)
    for one in found:
        _check(one, everything)
    return found


def dequantize(model: nnx.Module) -> Any:
    """`model` with the kernels that its codes stand for, in the dtype that it computes in; adapters stay.

    A model without codes is copied.
    """
    model = nnx.clone(model)
    for _, module in list(nnx.iter_modules(model)):
        plain = origin(base_type(module))
        if plain is base_type(module):
            continue
        for name, leaf in own_leaves(module).items():
            if isinstance(leaf, QuantizedKernel):
                setattr(module, name, nnx.Param(leaf[...]))
        rebase(module, plain)
    return model


def _check(found: Found, everything: list[Found]) -> None:
    """Raises a ValueError where there is nothing to quantize, or more than one module would be changed."""
    module, projection = found.module, seams.projection(found.module)
    what = f"{found.path or 'the model'}, a {type(module).__name__},"
    if not isinstance(projection, seams.Matmul):
        raise ValueError(f"{what} is no product with a matrix, which alone is quantized; leave it out of targets=")
    kernel = getattr(module, projection.kernel)
    if isinstance(kernel, QuantizedKernel):
        raise ValueError(f"{what} is quantized already ({kernel.scheme}); jpeft.dequantize the model first")
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"{what} has a kernel of {kernel.dtype}; quantize takes floating-point ones")
    sharing = [other.path for other in everything if any(leaf is kernel for leaf in own_leaves(other.module).values())]
    if len(sharing) > 1:
        raise ValueError(f"{' and '.join(sharing)} share one kernel, which cannot be quantized for one; exclude= it")
    value = kernel[...]
    if not isinstance(value, Tracer) and not jnp.isfinite(value).all():
        raise ValueError(f"the kernel of {what} has entries that are not finite, of which there are no codes")
