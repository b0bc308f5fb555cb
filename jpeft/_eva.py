# SPDX-License-Identifier: Apache-2.0
"""EVA: LoRA that starts in the directions in which the data varies most (Paischer et al. 2024,
https://arxiv.org/abs/2410.07170).

A place reads rows x. Their first principal components become the columns of its A, and every place gets as many of them
as say more than what others would get for the same rank: the share of the variance that a component explains decides.

Their moments `Σ [x, 1] [x, 1]ᵀ` are gathered as in `_observed`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import seams
from ._adapt import adapt
from ._graft import adapters
from ._method import Method, Site, Start, Targets
from ._observed import Run, called, gathered, watched
from ._scope import current
from ._walk import modules

#: Shares of variance below this are rounding: such a direction is in no data.
_NOTHING = 1e-6


def eva(
    model: nnx.Module,
    method: Any,
    batches: Iterable[Any],
    *,
    key: jax.Array,
    rho: float = 2.0,
    whiten: bool = False,
    run: Run | None = None,
    name: str | None = None,
) -> Any:
    """`model` adapted by a LoRA whose A, and whose ranks, follow the data.

    A new model, which computes what the given one does: B starts at zero. Over all places as many ranks are given away
    as the method asks for. The factor s stays what it is at the method's own rank, and places that get nothing are left
    out. (PEFT multiplies alpha by the ratio of the ranks, which with rslora is another factor.)

    Every place holds a matrix of `d_in²` numbers per layer while the data runs. What the running call says is padding
    does not count.

    Args:
      method: `jpeft.LoRA`, or `jpeft.DoRA`, with the default `init`; on projections that read vectors.
      batches: what `run` takes; all of them are read.
      key: as of `jpeft.adapt`.
      rho: a place gets at most `rho * rank`; 1 leaves all ranks as they are.
      whiten: divide each component by the root of its singular value.
      run: (model, batch) -> outputs; by default the batch is the model's only argument, or holds it by name.
      name: as of `jpeft.adapt`.

    Raises:
      TypeError, ValueError: another method; no batch; a place that reads no vectors; too few different rows for the
        rank.

    Example:
      >>> model = jpeft.eva(model, jpeft.LoRA(rank=16, targets=["q_proj"]), [{"input_ids": ids}], key=key)
    """
    _check(method, rho)
    if isinstance(batches, (str, bytes, Mapping)):
        raise TypeError(f"eva reads several batches, [batch, ...]; got one {type(batches).__name__}")
    probed = adapt(model, _Moments(method), key=key)
    places = _places(probed, method)
    sums, count = gathered(probed, batches, run or called)
    if not count:
        raise ValueError("eva got no batch; give it some of the data that the adapter will be trained on")
    found = {name: _components(sums[place.path][place.at], name, place.rank, rho) for name, place in places.items()}
    ranks = _given({name: own.shares for name, own in found.items()}, sum(place.rank for place in places.values()))
    spread = _with_ranks(method, ranks, {name: place.factor for name, place in places.items()})
    adapted = adapt(model, spread, key=key, name=name)
    for module in modules(adapted):
        adapter = adapters(module.module).get(name or method.kind)
        if adapter is not None and adapter.acts and adapter.method.kind == method.kind:
            _start(adapter, {place: own.vectors(whiten) for place, own in found.items()})
    return adapted


class _Place(NamedTuple):
    """One adapted projection in one layer."""

    path: str  # of the sums
    at: tuple[Any, ...]  # its layer in them
    rank: int
    factor: float


class _Principal(NamedTuple):
    """Principal components of a place's rows, the first one first: `[n, d_in]`, and what they explain."""

    components: np.ndarray
    shares: np.ndarray  # of the variance
    singular: np.ndarray  # values of the centred rows

    def vectors(self, whiten: bool) -> np.ndarray:
        return self.components / np.sqrt(self.singular)[:, None] if whiten else self.components


@dataclasses.dataclass(frozen=True)
class _Moments(Method):
    """Leaves all as it is; the gradient of `sums` is the sum of the products of what its places read."""

    kind: ClassVar[str] = "moments"

    of: Method

    def select(self, model_type: str | None) -> Targets:
        asked: Any = self.of.select(model_type)
        return dataclasses.replace(asked, modules_to_save=(), bias="none")

    def start(self, site: Site, base: Any, key: jax.Array) -> Start:
        if isinstance(seams.projection(base), seams.Lookup):
            raise ValueError(f"{site.path} is an embedding, which reads ids and no vectors; leave it out of targets")
        return Start({"sums": jnp.zeros((*site.lead, site.d_in + 1, site.d_in + 1), jnp.float32)})

    def after(self, adapter: Any, base: Any, y: jax.Array, *inputs: Any) -> jax.Array:
        rows = seams.projection(base).rows(base, jnp.asarray(inputs[0])).astype(jnp.float32)
        text = current().text
        counted = jnp.ones(rows.shape[:-1]) if text is None or text.shape != rows.shape[:-1] else text
        rows = jnp.concatenate([rows, jnp.ones((*rows.shape[:-1], 1))], -1) * counted[..., None]
        rows = rows.reshape(-1, rows.shape[-1])
        return watched(y, jnp.matmul(rows.T, rows, precision="highest"), adapter.sums[...])

    def count(self, site: Site) -> tuple[int, int]:
        return sum(site.active) * (site.d_in + 1) ** 2, 0


def _check(method: Any, rho: Any) -> None:
    if getattr(method, "kind", None) not in ("lora", "dora"):
        raise TypeError(f"eva starts a jpeft.LoRA or jpeft.DoRA, got {type(method).__name__}")
    if method.init != "default":
        raise ValueError(f"eva is a start itself, so the method's init must be 'default', got {method.init!r}")
    if not isinstance(rho, (int, float)) or isinstance(rho, bool) or not 1 <= rho < float("inf"):
        raise ValueError(f"rho, the largest share of a place's own rank that it may get, is at least 1; got {rho!r}")


def _places(model: nnx.Module, method: Any) -> dict[str, _Place]:
    """Where `model` is watched, by name, with the rank and the factor that `method` has there."""
    places = {}
    for found in modules(model):
        if _Moments.kind not in adapters(found.module):
            continue
        site = adapters(found.module)[_Moments.kind].site
        for i, name in enumerate(site.names):
            rank, factor = method.ranks(site)[i], float(method.table(site)[i].max())
            at = tuple(map(int, np.unravel_index(i, site.lead))) if site.lead else ()
            if rank:
                places[name] = _Place(f"{found.path}/adapters/{_Moments.kind}/sums".lstrip("/"), at, rank, factor)
    return places


def _components(sums: np.ndarray, place: str, rank: int, rho: float) -> _Principal:
    """At most `rho * rank` principal components, from the sums `[d_in + 1, d_in + 1]`.

    Raises:
      ValueError: the rows vary in fewer directions than `rank`, or are not finite.
    """
    if not np.isfinite(sums).all():
        raise ValueError(f"what {place} reads is not finite")
    count, d_in = sums[-1, -1], sums.shape[-1] - 1
    mean = sums[-1, :-1] / max(count, 1)
    scatter = sums[:-1, :-1] - count * np.outer(mean, mean)
    most = min(round(rho * rank), d_in)
    values, vectors = (part[..., d_in - most :] for part in np.linalg.eigh(scatter))
    shares = values[::-1] / max(np.trace(scatter), np.finfo(np.float64).tiny)
    real = shares > _NOTHING
    if real.sum() < rank:
        raise ValueError(
            f"what {place} reads in {int(count)} rows varies in {int(real.sum())} directions, fewer than the rank "
            f"{rank}; give eva more data, or the method a smaller rank"
        )
    return _Principal(vectors.T[::-1][real], shares[real], np.sqrt(values[::-1][real]))


def _given(shares: Mapping[str, np.ndarray], budget: int) -> dict[str, int]:
    """How many components each place gets: the `budget` largest shares of all places'."""
    every = sorted((-share, i, place) for i, place in enumerate(shares) for share in shares[place])
    ranks = dict.fromkeys(shares, 0)
    for _, _, place in every[:budget]:
        ranks[place] += 1
    return ranks


def _with_ranks(method: Any, ranks: Mapping[str, int], factors: Mapping[str, float]) -> Any:
    """`method` with these ranks and factors by place, and without the places of rank 0."""
    names = sorted((place for place, rank in ranks.items() if rank), key=len, reverse=True)
    alphas = {place: factors[place] * (ranks[place] ** 0.5 if method.rslora else ranks[place]) for place in names}
    none = [place for place, rank in ranks.items() if not rank]
    exclude = method.exclude
    if none:
        exclude = "|".join([exclude, *map(re.escape, none)]) if isinstance(exclude, str) else (*exclude, *none)
    return dataclasses.replace(
        method,
        exclude=exclude,
        rank_pattern={re.escape(place): ranks[place] for place in names},
        alpha_pattern={re.escape(place): alpha for place, alpha in alphas.items()},
    )


def _start(adapter: Any, vectors: Mapping[str, np.ndarray]) -> None:
    """Sets A `[*lead, d_in, rank]`, in place."""
    site, leaf = adapter.site, adapter.A
    a = np.zeros(leaf.shape, np.float64)
    ranks = adapter.method.ranks(site)
    for i, (place, rank) in enumerate(zip(site.names, ranks, strict=True)):
        if rank:
            a[(*(np.unravel_index(i, site.lead) if site.lead else ()), ..., slice(rank))] = vectors[place][:rank].T
    leaf.set_value(jnp.asarray(a, leaf.dtype))
