# SPDX-License-Identifier: Apache-2.0
"""DeBERTa's scores of relative positions, without a gather of one number per query and key.

A table has a row for every bucket of distances; K' and Q' are two projections of it. To the score of query i and key j
come

  content to position    q_i · K'_r        position to content    k_j · Q'_r        r = row(position_i - position_j)

Where all tokens are one apart, as in a text, and in every segment of a packed row, r depends on i - j alone. So a
product has one column per distance, and a reshape shifts row i of it by i (`_shifted`): no indices, and no scatter
in the backward pass. It goes by blocks of tokens, each with the distances that it has, little more than half of all.
Positions that a caller gives may be any; then r is an index of its own for every pair.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._given import Given
from .._wide import wide
from ._deberta_config import Config

#: Tokens in a block at least, and blocks in a row of tokens at most.
_BLOCK, _BLOCKS = 32, 8


class Distances(NamedTuple):
    """Which row of the table every query and key read; the same in all layers and heads.

    Attributes:
      rows: the table's rows that may be read: `first` to `last`, from which the others count.
      columns: `[2 seq]`, the row of the distances seq - 1, seq - 2, ..., -seq; None where positions are given.
      pairs: `[rows, seq, keys]`, the row of each pair where positions are given; else None.
    """

    rows: slice
    columns: np.ndarray | None
    pairs: Int[Array, "rows seq keys"] | None


def distances(config: Config, seq: int, positions: Int[Given, "rows seq"] | None) -> Distances:
    """Of `seq` tokens that stand one apart or, where they are given, at `positions`."""
    known = rows_of_distances(config)
    limit = len(known) // 2
    if positions is None:
        columns = known[np.clip(np.arange(seq - 1, -seq - 1, -1), -limit, limit) + limit]
        first = int(columns.min())
        return Distances(slice(first, int(columns.max()) + 1), columns - first, None)
    away = positions[:, :, None] - positions[:, None, :]
    return Distances(slice(None), None, jnp.asarray(known)[jnp.clip(away, -limit, limit) + limit])


def rows_of_distances(config: Config) -> np.ndarray:
    """The row of every distance (query - key) from -max_distance to max_distance; farther ones are as these.

    Of a span of s rows to a side, the first s / 2 are distances 0, 1, ...; the others grow by a constant factor, up to
    max_distance. Without buckets each distance has its row.

    Computed on the host, in float32 as transformers does, so that what is rounded up is the same.
    """
    span, limit = config.span, config.max_distance
    away = np.arange(-limit, limit + 1)
    if config.position_buckets > 0:
        exact = span // 2
        distance = np.maximum(np.abs(away), exact).astype(np.float32)
        share = np.log(distance / np.float32(exact)) / np.log(np.float32((limit - 1) / exact))
        wide = np.ceil(share * np.float32(exact - 1)).astype(int) + exact
        away = np.where(np.abs(away) <= exact, away, np.sign(away) * wide)
    return np.clip(away + span, 0, 2 * span - 1).astype(np.int32)


def content_to_position(
    far: Distances, q: Float[Array, "batch seq heads d_head"], keys: Float[Array, "rows heads d_head"]
) -> Float[Array, "heads batch seq keys"]:
    """q_i · K'_r for every query i and key j."""
    if far.columns is not None:
        return jnp.concatenate([*_by_distance(q, keys, far.columns)], -2)
    return jnp.take_along_axis(_products(q, keys), _pairs(far), axis=-1)


def position_to_content(
    far: Distances, k: Float[Array, "batch keys heads d_head"], queries: Float[Array, "rows heads d_head"]
) -> Float[Array, "heads batch seq keys"]:
    """k_j · Q'_r for every query i and key j; computed by keys, from which distances have the other sign."""
    if far.columns is not None:
        columns = np.roll(far.columns[::-1], -1)  # of the distances 1 - seq, ..., seq
        return jnp.concatenate([y.swapaxes(-1, -2) for y in _by_distance(k, queries, columns)], -1)
    pairs = _pairs(far).swapaxes(-1, -2)
    return jnp.take_along_axis(_products(k, queries), pairs, axis=-1).swapaxes(-1, -2)


def _products(x: jax.Array, table: jax.Array) -> jax.Array:
    """x · each row of the table, `[heads batch seq rows]` in float32 or wider: heads first, as a product lays them."""
    return jnp.einsum("bshd,rhd->hbsr", x, table, preferred_element_type=wide(x.dtype))


def _pairs(far: Distances) -> jax.Array:
    """The rows of pairs, for all heads."""
    assert far.pairs is not None
    return far.pairs[None]


def _by_distance(
    x: Float[Array, "batch seq heads d_head"], table: Float[Array, "rows heads d_head"], columns: np.ndarray
) -> Iterator[Float[Array, "heads batch block seq"]]:
    """x_i · table[columns[seq - 1 - i + j]] for every j, for one block of tokens i after another."""
    seq = x.shape[1]
    size = max(_BLOCK, -(-seq // _BLOCKS))
    for start in range(0, seq, size):
        block = x[:, start : start + size]
        first = seq - start - block.shape[1]
        yield _shifted(_products(block, table[columns[first : 2 * seq - start]]), seq)


def _shifted(x: Float[Array, "heads batch block columns"], seq: int) -> Float[Array, "heads batch block seq"]:
    """y[i, j] = x[i, n - 1 - i + j] of n rows of n + seq columns: rows of one less start one column later each."""
    *lead, n, columns = x.shape
    flat = x.reshape(*lead, n * columns)[..., n - 1 :]
    return flat[..., : n * (columns - 1)].reshape(*lead, n, columns - 1)[..., :seq]
