# SPDX-License-Identifier: Apache-2.0
"""First values of LoRA's factors.

Every layer draws from a key of its own, at its own rank, so neither another layer's rank nor another target changes
what it draws.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import seams
from .._method import Site, Start, wide
from .._scope import fold_path

Draw = Callable[[jax.Array, int], jax.Array]


def default(site: Site, base: Any, key: jax.Array, ranks: tuple[int, ...], scales: tuple[float, ...]) -> Start:
    """A uniform in ±1/sqrt(d_in) (kaiming with a = sqrt 5), B zero; on an embedding A zero, B standard normal."""
    bound = site.d_in**-0.5
    return _random(
        site, base, key, ranks, lambda k, r: jax.random.uniform(k, (site.d_in, r), minval=-bound, maxval=bound)
    )


def gaussian(site: Site, base: Any, key: jax.Array, ranks: tuple[int, ...], scales: tuple[float, ...]) -> Start:
    """A normal with standard deviation 1/rank, B zero; an embedding as by default."""
    return _random(site, base, key, ranks, lambda k, r: jax.random.normal(k, (site.d_in, r)) / r)


def orthogonal(site: Site, base: Any, key: jax.Array, ranks: tuple[int, ...], scales: tuple[float, ...]) -> Start:
    """A and B both random, in orthogonal halves of rank space, so that A B is zero; needs even ranks."""
    odd = [rank for rank in ranks if rank % 2]
    if odd:
        raise ValueError(f"init='orthogonal' splits the rank in halves, so it must be even; {site.path} has {odd[0]}")

    def factors(key: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
        turn, left, right = jax.random.split(key, 3)
        basis, _ = jnp.linalg.qr(jax.random.normal(turn, (rank, rank)))
        a = jax.random.normal(left, (site.d_in, rank // 2)) @ basis[0::2] / 10
        b = basis[1::2].T @ jax.random.normal(right, (rank // 2, site.d_out)) / 10
        return a, b

    key = fold_path(key, "AB")
    a = per_layer(site, key, ranks, lambda k, r: factors(k, r)[0], axis=-1)
    b = per_layer(site, key, ranks, lambda k, r: factors(k, r)[1], axis=-2)
    return Start({"A": a, "B": b})


def pissa(site: Site, base: Any, key: jax.Array, ranks: tuple[int, ...], scales: tuple[float, ...]) -> Start:
    """The kernel's principal part: W = U S V, A = U sqrt(S/s), B = sqrt(S/s) V (Meng et al. 2024)."""
    u, values, v = jnp.linalg.svd(_matrix(base), full_matrices=False)
    root = jnp.sqrt(values / _safe(site, scales)[..., None])
    return _from_kernel(site, u * root[..., None, :], root[..., None] * v, ranks)


def olora(site: Site, base: Any, key: jax.Array, ranks: tuple[int, ...], scales: tuple[float, ...]) -> Start:
    """The first columns of the QR decomposition of W^T = Q R: A = R^T, B = Q^T (Büyükakyüz 2024)."""
    q, r = jnp.linalg.qr(jnp.swapaxes(_matrix(base), -1, -2))
    return _from_kernel(site, jnp.swapaxes(r, -1, -2), jnp.swapaxes(q, -1, -2), ranks)


#: `init=` by name.
STARTS: Mapping[str, Callable[..., Start]] = {
    "default": default,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}


def _random(site: Site, base: Any, key: jax.Array, ranks: tuple[int, ...], draw_a: Draw) -> Start:
    key_a, key_b = fold_path(key, "A"), fold_path(key, "B")
    rank = max(ranks)
    if isinstance(seams.projection(base), seams.Lookup):
        b = per_layer(site, key_b, ranks, lambda k, r: jax.random.normal(k, (r, site.d_out)), axis=-2)
        return Start({"A": jnp.zeros((*site.lead, site.d_in, rank)), "B": b})
    a = per_layer(site, key_a, ranks, draw_a, axis=-1)
    return Start({"A": a, "B": jnp.zeros((*site.lead, rank, site.d_out))})


def per_layer(site: Site, key: jax.Array, ranks: tuple[int, ...], draw: Draw, axis: int) -> jax.Array:
    """`draw(key of the layer, its rank)` for every layer, padded with zeros to the largest rank along `axis`."""
    if not site.lead:
        return draw(key, ranks[0])
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(ranks)))
    drawn = None
    for rank in sorted(set(ranks) - {0}):
        layers = jax.vmap(lambda k, rank=rank: draw(k, rank))(keys)
        padding = [(0, 0)] * layers.ndim
        padding[axis] = (0, max(ranks) - rank)
        mine = jnp.array([r == rank for r in ranks])[:, None, None]
        drawn = jnp.where(mine, jnp.pad(layers, padding), 0.0 if drawn is None else drawn)
    return drawn.reshape(*site.lead, *drawn.shape[1:])  # type: ignore[union-attr]


def _from_kernel(site: Site, a: jax.Array, b: jax.Array, ranks: tuple[int, ...]) -> Start:
    """The first columns of `a` and rows of `b` as the start, and the same as what is subtracted."""
    rank = max(ranks)
    if rank > a.shape[-1]:
        raise ValueError(f"{site.path} is {site.d_in} x {site.d_out}, which holds no start of rank {rank}")
    kept = jnp.asarray(np.arange(rank) < np.array(ranks)[:, None], jnp.float32).reshape(*(site.lead or ()), rank)
    a, b = a[..., :rank] * kept[..., None, :], b[..., :rank, :] * kept[..., None]
    return Start({"A": a, "B": b}, {"A0": a, "B0": b})


def _matrix(base: Any) -> jax.Array:
    kernel = seams.projection(base).read(base)
    return kernel.astype(wide(kernel.dtype))


def _safe(site: Site, scales: tuple[float, ...]) -> jax.Array:
    """The scale of every layer, one where the layer is not adapted, so that nothing is divided by zero."""
    return jnp.asarray([scale or 1.0 for scale in scales], jnp.float32).reshape(site.lead)
