# SPDX-License-Identifier: Apache-2.0
"""The one function through which every model attends.

Queries go in blocks of rows, keys that a whole block may not see are not computed, and the backward pass recomputes
the weights, so that nothing is kept but q, k and v. A block begins when the one before it is done, so that an
accelerator has the scores of one alone in memory; XLA's programs for a CPU do not heed this.

Where a mesh splits a row's tokens, the queries of each device are an example of their own, in blocks as any; the keys
and values of all are on every device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from .. import _scope
from .._dropout import keeps
from .._given import Given
from .._stream import split_heads, split_parts, split_tokens, token_ways, whole_tokens
from .._wide import wide, widened
from ._visibility import Limits, Rules, cut, in_parts, limits_of_parts, repeated, visible_keys

#: Query rows in a block: wide enough for a matrix product, narrow enough to skip most of what causality masks.
BLOCK_ROWS = 64
#: The same on accelerators, whose products want more rows.
WIDE_BLOCK_ROWS = 256
#: Blocks of one attention: each is a part of the program, which takes as long to compile as there are of them.
MOST_BLOCKS = 64

#: Added to the score of a key that is not visible: its exponential is 0, and a row of them is still finite.
_HIDDEN = -1e30


def attention(
    q: Float[Array, "batch seq heads d_head"],
    k: Float[Array, "batch keys kv_heads d_head"],
    v: Float[Array, "batch keys kv_heads d_head"],
    *,
    causal: bool,
    scale: float,
    cap: float | None = None,
    window: int | Int[Array, ""] | None = None,
    places: Int[Array, "rows seq"] | None = None,
    mask: Shaped[Given, "batch *queries keys"] | None = None,
    segment_ids: Int[Given, "batch seq"] | None = None,
    key_segments: Int[Given, "batch own_keys"] | None = None,
    bias: Float[Array, "rows heads seq bias_keys"] | None = None,
    dropout: float = 0.0,
    path: str = "attention/dropout",
) -> Float[Array, "batch seq heads d_head"]:
    """softmax(q kᵀ · scale + bias) v over the visible keys, with the softmax in float32 or wider.

    With a cap, s = q kᵀ · scale becomes cap · tanh(s / cap) before the bias.

    Query i stands at key i + keys - seq: keys beyond seq come first, as a prefix does, and all queries see them,
    whatever their segment and window. A query that sees no key gives 0, and passes no gradient.

    Args:
      q, k, v: heads is a multiple of kv_heads; query heads h · heads / kv_heads and on share key head h.
      causal: whether a query sees only the keys up to its own.
      scale: usually d_head^-0.5.
      cap: what scores approach, however great they are; None for no bound.
      window: how many keys back from its own a causal query sees, itself counted; None for all. A number, or a
        traced integer where layers of a stack differ.
      places: positions of the queries and their own keys, in which a window is then counted: in a row that holds
        virtual tokens, then padding, then text, keys are not as far apart as they stand. Of one row for all, or each.
      mask: 0 for a key that nobody sees (padding); of `[batch, seq, keys]`, for one that a query does not see.
      segment_ids: a query sees the keys of its own segment, and those of `seams.EVERY_SEGMENT`.
      key_segments: of the keys, where they are not the queries' own tokens; keys in front of these have none, so that
        all queries see them. None where they are.
      bias: added to the scores; of one row for all examples, or of one each. Keys in front of those that it covers,
        such as a prefix, get none.
      dropout: probability of dropping an attention weight, when the call has a key (`_scope`).
      path: names the dropout, unique in the model.
    """
    _check(q, k, v, causal, window, segment_ids, key_segments)
    bias = None if bias is None else _whole(q, k, bias)
    seed = _scope.dropout_seed(dropout, path)
    if window is not None and places is not None:
        window = jnp.asarray(window)
    known = window if isinstance(window, int) else None
    theirs = segment_ids if key_segments is None else key_segments
    traced = None if known is not None else window
    limits = Limits(traced, mask, segment_ids, theirs, places, places, seed)
    ways, unseeing = token_ways(q), mask is not None or key_segments is not None
    sizes = (q.shape[1], k.shape[1], ways, block_rows(-(-q.shape[1] // ways), _scope.platform()))
    rules = Rules(*sizes, causal, known, scale, dropout, cap, unseeing)
    if ways == 1:
        return _blocked(*split_heads(q, k, v), bias, limits, rules)
    q, k, v = split_heads(split_tokens(q), whole_tokens(k), whole_tokens(v))
    bias = None if bias is None else in_parts(jnp.broadcast_to(bias, (q.shape[0], *bias.shape[1:])), ways, axis=2)
    y: Any = _blocked(in_parts(q, ways), k, v, bias, limits_of_parts(limits, rules, q.shape[0]), rules)
    return split_tokens(y.reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]])


def block_rows(seq: int, platform: str) -> int:
    """How many queries are computed at a time: of long rows more, so that there are at most `MOST_BLOCKS`."""
    return max(BLOCK_ROWS if platform == "cpu" else WIDE_BLOCK_ROWS, -(-seq // MOST_BLOCKS))


def _check(q: Any, k: Any, v: Any, causal: bool, window: Any, segment_ids: Any, key_segments: Any) -> None:
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "attention takes q [batch seq heads d_head] and k, v [batch keys kv_heads d_head] with heads a multiple of "
            f"kv_heads; got {q.shape}, {k.shape}, {v.shape}"
        )
    if window is not None and not causal:
        raise ValueError(f"a window looks back from a causal query; got window={window} with causal=False")
    if causal and k.shape[1] < q.shape[1]:
        raise ValueError(f"a causal query has a key of its own; got {q.shape[1]} queries and {k.shape[1]} keys")
    if key_segments is not None and (segment_ids is None or causal or k.shape[1] < key_segments.shape[1]):
        raise ValueError(
            "key_segments are of keys that are no queries, so causal=False, and go with segment_ids; got "
            f"{key_segments.shape} for {k.shape[1]} keys, causal={causal} and "
            f"{'no' if segment_ids is None else 'some'} segment_ids"
        )
    if segment_ids is not None and key_segments is None and k.shape[1] < q.shape[1]:
        raise ValueError(f"segment_ids need a key for every query; got {q.shape[1]} queries and {k.shape[1]} keys")


def _whole(q: Any, k: Any, bias: jax.Array) -> jax.Array:
    """The bias of all keys, `[batch or 1, heads, seq, keys]`."""
    rows, *sizes, covered = bias.shape
    if rows not in (1, q.shape[0]) or tuple(sizes) != (q.shape[2], q.shape[1]) or covered > k.shape[1]:
        raise ValueError(
            f"a bias is [batch or 1, heads, seq, keys]; got {bias.shape} for queries {q.shape} and keys {k.shape}"
        )
    return jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (k.shape[1] - covered, 0)))


# Blocks -------------------------------------------------------------------------------------------------------------
#
# Inside, queries are [batch kv_heads seq·group d_head]: the heads that share a key head are rows of one matrix product.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocked(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any, limits: Limits, rules: Rules) -> jax.Array:
    return _forward(q, k, v, bias, limits, rules)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: Any, limits: Limits, rules: Rules
) -> tuple[jax.Array, Any]:
    """The output, and what the backward pass needs: q · scale by blocks, k, v and the bias."""
    heads, kv_heads = q.shape[2], k.shape[2]
    k, v = (_rows(x if rules.ways == 1 else repeated(x, rules.ways), kv_heads) for x in (k, v))
    qs, outs = [], []
    for queries, keys in rules.blocks():
        block = q[:, cut(queries)]
        if outs:
            block, outs[-1] = jax.lax.optimization_barrier((block, outs[-1]))
        qs.append(_in_place(_rows(_scaled(block, rules), kv_heads), rules))
        p, share, _ = _softmax(qs[-1], k[:, :, cut(keys)], bias, limits, rules, queries, keys)
        kept = _kept(limits, rules, p.shape, queries, keys)
        y = _product("bhqk,bhkd->bhqd", (p * kept).astype(v.dtype), v[:, :, cut(keys)]) * share
        outs.append(_unrows(y.astype(q.dtype), heads))
    return jnp.concatenate(outs, 1), (qs, k, v, bias, limits)


def _backward(rules: Rules, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    """With weights w = p · share and dw = kept · g vᵀ: ds = w (dw - Σ w dw). `share` goes into g, which is small.

    The gradient of a bias is ds itself, summed over the examples that share it.
    """
    qs, k, v, bias, limits = residuals
    heads, kv_heads = g.shape[2], k.shape[1]
    dq, dk, dv, dbias = [], [], [], []
    for (queries, keys), q in zip(rules.blocks(), qs, strict=True):
        span = cut(keys)
        if dq:
            q, dq[-1], *so_far = jax.lax.optimization_barrier((q, dq[-1], sum(dk), sum(dv)))
            dk, dv = ([part] for part in so_far)
        p, share, slope = _softmax(q, k[:, :, span], bias, limits, rules, queries, keys)
        rows = (_rows(g[:, cut(queries)], kv_heads) * share).astype(g.dtype)
        kept = _kept(limits, rules, p.shape, queries, keys)
        dw = _product("bhqd,bhkd->bhqk", rows, v[:, :, span]) * kept
        ds = p * (dw - share * jnp.sum(p * dw, -1, keepdims=True))
        if bias is not None:
            dbias.append(_bias_gradient(ds, bias, queries, keys, rules.keys))
        ds = (ds * slope).astype(q.dtype)
        dq.append(_unrows(_scaled(_product("bhqk,bhkd->bhqd", ds, k[:, :, span]), rules).astype(q.dtype), heads))
        dk.append(_among(_product("bhqk,bhqd->bhkd", ds, q), keys, rules.keys))
        dv.append(_among(_product("bhqk,bhqd->bhkd", (p * kept).astype(g.dtype), rows), keys, rules.keys))
    dk, dv = (_unrows(_of_rows(blocks, rules).astype(k.dtype), kv_heads) for blocks in (dk, dv))
    return jnp.concatenate(dq, 1), dk, dv, None if bias is None else jnp.concatenate(dbias, 2), None


def _of_rows(blocks: list[Any], rules: Rules) -> jax.Array:
    """What all blocks of queries, in all parts of a row, add to a gradient: of `[batch·ways ...]`, `[batch ...]`."""
    total = jnp.asarray(sum(blocks))
    return total.reshape(-1, rules.ways, *total.shape[1:]).sum(1)


def _in_place(x: jax.Array, rules: Rules) -> jax.Array:
    """A part of a row on its own device."""
    return x if rules.ways == 1 else split_parts(x)


def _bias_rows(bias: jax.Array, kv_heads: int, queries: range, keys: range) -> jax.Array:
    """A block of a bias, `[rows kv_heads queries·group keys]` as the block's scores are."""
    block = bias[:, :, cut(queries), cut(keys)]
    block = block.reshape(bias.shape[0], kv_heads, -1, len(queries), len(keys)).swapaxes(2, 3)
    return block.reshape(bias.shape[0], kv_heads, -1, len(keys))


def _bias_gradient(ds: jax.Array, bias: jax.Array, queries: range, keys: range, num_keys: int) -> jax.Array:
    """The inverse of `_bias_rows` for the scores' gradient: `[rows heads queries keys]`, with zeros for other keys."""
    ds = ds if bias.shape[0] == ds.shape[0] else jnp.sum(ds, 0, keepdims=True)
    ds = ds.reshape(*ds.shape[:2], len(queries), -1, len(keys)).swapaxes(2, 3)
    ds = ds.reshape(bias.shape[0], bias.shape[1], len(queries), len(keys)).astype(bias.dtype)
    return jnp.pad(ds, ((0, 0), (0, 0), (0, 0), (keys.start, num_keys - keys.stop)))


def _among(x: jax.Array, span: range, keys: int) -> jax.Array:
    """Zeros for all keys, but `x` at those of `span`."""
    return jnp.pad(x, ((0, 0), (0, 0), (span.start, keys - span.stop), (0, 0)))


_blocked.defvjp(_forward, _backward)


def _kept(limits: Limits, rules: Rules, shape: tuple[int, ...], queries: range, keys: range) -> jax.Array | float:
    """1/(1-rate) for a weight that is kept and 0 for one that is dropped, `shape` as the block's weights.

    A weight's place is (example, head, query, key) in the whole attention, whatever block it is computed in.
    """
    if limits.seed is None:
        return 1.0
    group = shape[2] // len(queries)
    batch, kv_head, row, key = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(4))
    head = kv_head * group + row % group
    query = row // group + queries.start
    if limits.starts is not None:
        batch, query = batch // rules.ways, query + limits.starts.astype(jnp.uint32)[:, None, None, None]
    place = ((batch * (shape[1] * group) + head) * rules.seq + query) * rules.keys + key + keys.start
    return jnp.where(keeps(limits.seed, rules.dropout, place), 1 / (1 - rules.dropout), 0.0)


def _softmax(
    q: jax.Array, k: jax.Array, bias: Any, limits: Limits, rules: Rules, queries: range, keys: range
) -> tuple[jax.Array, jax.Array, Any]:
    """exp(s - max s) for each row's scores s = q kᵀ + bias, and one over its sum; 0 for a row that sees no key.

    Third, what a score's own gradient is multiplied with to be that of q kᵀ: the slope of the cap. Product, bias,
    maximum and exponential stand here in the order that XLA makes one kernel of.
    """
    s, slope = _product("bhqd,bhkd->bhqk", q, k), 1.0
    if rules.cap is not None:
        bounded = jnp.tanh(s / rules.cap)
        s, slope = rules.cap * bounded, 1 - jnp.square(bounded)
    if bias is not None:
        s = s + _bias_rows(bias, k.shape[1], queries, keys)
    visible = visible_keys(rules, limits, queries, keys)
    if visible is not None:
        group = q.shape[2] // len(queries)
        visible = (visible if visible.shape[1] == 1 else jnp.repeat(visible, group, axis=1))[:, None]
        s = s + jnp.where(visible, 0, _HIDDEN)
    p = jnp.exp(s - jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True)))
    share = 1 / jnp.sum(p, -1, keepdims=True)
    if visible is not None and rules.unseeing:
        share = jnp.where(jnp.any(visible, -1, keepdims=True), share, 0)
    return p, share, slope


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=wide(a.dtype))


def _scaled(x: jax.Array, rules: Rules) -> jax.Array:
    """x · scale. Queries and their gradients are scaled, not scores, which are many more."""
    return (widened(x) * rules.scale).astype(x.dtype)


def _rows(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch seq heads d_head] -> [batch kv_heads seq·group d_head]"""
    batch, seq, heads, d_head = x.shape
    x = x.reshape(batch, seq, kv_heads, heads // kv_heads, d_head).transpose(0, 2, 1, 3, 4)
    return x.reshape(batch, kv_heads, -1, d_head)


def _unrows(x: jax.Array, heads: int) -> jax.Array:
    """The inverse of `_rows`."""
    batch, kv_heads, _, d_head = x.shape
    x = x.reshape(batch, kv_heads, -1, heads // kv_heads, d_head).transpose(0, 2, 1, 3, 4)
    return x.reshape(batch, -1, heads, d_head)
