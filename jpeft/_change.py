# SPDX-License-Identifier: Apache-2.0
"""What adapters change in the base, as numbers: float64, on the host, from factors where a method has them.

A float32 difference of a merged kernel and the base has lost most digits of a small change, so all of it, the merging
too, runs in float64.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import seams
from ._adapt import _merging_order
from ._graft import adapters, grafts, saved_leaves, sharing, ungraft
from ._quantize import dequantize
from ._walk import own_leaves

#: Of singular values below this part of the largest nothing is left in float32.
_NEGLIGIBLE = 1e-8


class Product(NamedTuple):
    """A matrix `left @ right`, `[d_in, n] @ [n, d_out]`."""

    left: np.ndarray
    right: np.ndarray

    def dense(self) -> np.ndarray:
        return self.left @ self.right


@dataclasses.dataclass(frozen=True)
class Change:
    """What adapters change.

    Attributes:
      kernels: by path of a projection and index of a layer (0 outside of a stack), what its matrix changes by, where a
        method acts.
      leaves: by path, what any other leaf of the base changes by.
    """

    kernels: dict[tuple[str, int], Product]
    leaves: dict[str, np.ndarray]


def change(model: nnx.Module) -> Change:
    """What all adapters of `model` change together.

    Raises:
      ValueError: a method has no merged form.
    """
    found = Change({}, {})
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = dequantize(model)
        for _, module in grafts(model):
            _widen(module.adapters)
        with sharing(model) if adapters(model) else contextlib.nullcontext():
            for path, module in grafts(model):
                _add(found, path, module)
    return found


def _add(found: Change, path: str, module: Any) -> None:
    acting = _merging_order(module)
    products = [adapter.method.factors(adapter, module) for adapter in acting]
    kernel = seams.projection(module).kernel if acting and seams.kind(module) == "projection" else ""
    saved = saved_leaves(module, running=False)
    if acting and kernel not in saved and all(product is not None for product in products):
        left = np.concatenate([np.asarray(product[0]) for product in products if product], -1)
        right = np.concatenate([np.asarray(product[1]) for product in products if product], -2)
        matrices = [Product(*pair) for pair in zip(*map(_layers, (left, right)), strict=True)]
        changed = {name: np.asarray(v, np.float64) - _float64(getattr(module, name)) for name, v in saved.items()}
    else:
        changed = _merged(module, acting, saved)
        matrices = [factored(m) for m in _layers(_matrix(module, changed.pop(kernel)))] if kernel in changed else []
    active = [any(adapter.site.active[i] for adapter in acting) for i in range(len(matrices))]
    found.kernels.update({(path, i): m for i, m in enumerate(matrices) if active[i]})
    found.leaves.update({f"{path}/{name}" if path else name: value for name, value in changed.items()})


def _merged(module: Any, acting: list[Any], saved: Any) -> dict[str, np.ndarray]:
    """What a module's own leaves change by when its adapters are merged."""
    before = {name: _float64(leaf) for name, leaf in own_leaves(module).items()}
    _widen(module)
    for name, value in saved.items():
        getattr(module, name).set_value(jnp.asarray(value, jnp.float64))
    touched = {*saved}
    for adapter in acting:
        for name, value in adapter.method.merge(adapter, module).items():
            getattr(module, name).set_value(jnp.asarray(value, jnp.float64))
            touched.add(name)
    return {name: _float64(getattr(module, name)) - before[name] for name in sorted(touched)}


def _matrix(module: Any, kernel: np.ndarray) -> np.ndarray:
    return np.asarray(seams.projection(module).matrix(module, jnp.asarray(kernel)))


def _layers(stacked: np.ndarray) -> np.ndarray:
    """`[*lead, n, m]` as `[layers, n, m]`."""
    return stacked.reshape(-1, *stacked.shape[-2:])


def _widen(node: Any) -> None:
    """Floating leaves of `node`, in place, in float64."""
    _, flat = nnx.graph.flatten(node)
    for leaf in flat.leaves:
        if isinstance(leaf, nnx.Variable) and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf.set_value(jnp.asarray(_float64(leaf)))


def _float64(leaf: Any) -> np.ndarray:
    return np.asarray(leaf[...]).astype(np.float64)


def only(model: nnx.Module, name: str) -> Any:
    """`model` with the adapter `name` alone.

    Raises:
      ValueError: it has none of that name.
    """
    model = nnx.clone(model)
    known = sorted({found for _, module in grafts(model) for found in module.adapters})
    if name not in known:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(known) or 'none'}")
    for _, module in grafts(model):
        for other in [found for found in module.adapters if found != name]:
            del module.adapters[other]
        if not module.adapters:
            ungraft(module)
    return model


def stacked(products: Sequence[Product]) -> Product:
    """The sum of several products, exactly: a product of as many columns as they have together."""
    return Product(np.concatenate([p.left for p in products], -1), np.concatenate([p.right for p in products], -2))


def factored(matrix: np.ndarray) -> Product:
    """A matrix as a product of as few columns as float32 can tell."""
    u, values, v = np.linalg.svd(matrix, full_matrices=False)
    kept = int((values > _NEGLIGIBLE * values[:1].max(initial=0.0)).sum())
    return _balanced(u, values, v, kept)


def truncated(product: Product, rank: int | None, energy: float | None) -> tuple[Product, float]:
    """The nearest product of at most `rank` columns that keeps `energy` of the squares, and its relative error.

    By QR of both factors, so the matrix itself is never made.
    """
    ql, rl = np.linalg.qr(product.left)
    qr, rr = np.linalg.qr(product.right.T)
    u, values, v = np.linalg.svd(rl @ rr.T, full_matrices=False)
    kept = int((values > _NEGLIGIBLE * values[:1].max(initial=0.0)).sum())
    squares = np.cumsum(values**2)
    total = squares[-1] if len(squares) else 0.0
    if energy is not None:
        kept = min(kept, 1 + int((squares < energy * total).sum()))
    if rank is not None:
        kept = min(kept, rank)
    lost = float(np.sqrt((values[kept:] ** 2).sum() / total)) if total else 0.0
    return _balanced(ql @ u, values, v @ qr.T, kept), lost


def _balanced(u: np.ndarray, values: np.ndarray, v: np.ndarray, kept: int) -> Product:
    root = np.sqrt(values[:kept])
    return Product(u[:, :kept] * root, root[:, None] * v[:kept])


def exact(product: Product) -> Product:
    """The same matrix without columns that do nothing, and by no more of them than it has rows or columns."""
    used = product.left.any(0) & product.right.any(1)
    product = Product(product.left[:, used], product.right[used])
    most = min(product.left.shape[0], product.right.shape[1])
    return truncated(product, None, None)[0] if used.sum() > most else product
