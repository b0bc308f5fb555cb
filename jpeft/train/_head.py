# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of an output head without the logits of all positions in memory.

A vocabulary of 32,000 over 4 x 256 positions is 131 MB of float32, several times over in the backward pass. Here
positions are put in order, labelled ones first, cut into chunks, and a chunk without a label is skipped. A chunk's
logits live only while its loss is computed, and its gradient is computed beside them,

    d loss / d logits = softmax(logits) - onehot(target),

so nothing is computed twice: the head costs what it costs in the plain formula. `Terms` adds label smoothing and the
z-loss, whose gradients come from the same softmax.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from .._given import Given
from .._method import wide
from .._scope import scope
from .._stream import token_ways

#: A label that is ignored, as in torch.
IGNORED = -100

#: Logits in memory at a time: 16 million are 64 MB in float32.
CHUNK_LOGITS = 2**24

Head = Callable[[Any], Any]


class Terms(NamedTuple):
    """What is added to -log p(target), in training.

    Attributes:
      smoothing: label smoothing (Szegedy et al. 2016): the target's share of 1 is less by this, which is spread evenly
        over all classes.
      z: z-loss (de Brébisson & Vincent 2016; PaLM): times the square of log sum exp of the logits, which it keeps near
        0.
    """

    smoothing: float = 0.0
    z: float = 0.0


PLAIN = Terms()


class _Chunked(NamedTuple):
    """A head as a function of (hidden, chunk index, everything that it reads)."""

    call: Callable[..., jax.Array]
    reads: tuple[Any, ...]


def nll(logits: Float[Array, "*rows vocab"], targets: Int[Given, "*rows"], terms: Terms = PLAIN) -> Float[Array, ""]:
    """Sum of -log softmax(logits)[target] over the targets that are not `IGNORED`, in float32 or wider."""
    return _nll_and_slope(logits, targets, terms)[0]


def log_probs(logits: Float[Array, "*rows vocab"], targets: Int[Given, "*rows"]) -> Float[Array, "*rows"]:
    """log softmax(logits)[target], 0 where the target is `IGNORED`, in float32 or wider."""
    logits = logits.astype(wide(logits.dtype))
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets != IGNORED, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)


def head_nll(
    head: Head,
    hidden: Float[Array, "batch seq d_model"],
    targets: Int[Given, "batch seq"],
    key: jax.Array | None = None,
    *,
    groups: int = 1,
    terms: Terms = PLAIN,
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Array, ""]:
    """`nll(head(hidden), targets)` with at most about `chunk_logits` logits in memory.

    Args:
      head: hidden states `[rows positions d_model]` -> logits `[rows positions vocab]`, each position by itself; it
        may read arrays that are differentiated.
      hidden: states.
      targets: class of each position, or `IGNORED`.
      key: opens the scope's key for the head, another one in each chunk.
      groups: parts of the batch whose positions are put in order apart: as many as there are devices that the batch
        is split over, so that no position moves to another device.
      terms: what is added to each position's loss.
      chunk_logits: memory against the number of chunks.
    """
    hidden, targets, size = _grouped(head, hidden, targets, groups, chunk_logits)
    chunked = _closed(head, hidden[:, :size], key)
    return _chunked_nll(chunked.call, size, terms, hidden, targets, chunked.reads)


def head_log_probs(
    head: Head,
    hidden: Float[Array, "batch seq d_model"],
    targets: Int[Given, "batch seq"],
    key: jax.Array | None = None,
    *,
    groups: int = 1,
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Array, "batch seq"]:
    """log p(target) of every position, 0 where it is `IGNORED`; arguments and memory as of `head_nll`.

    Whatever is made of them may be differentiated: a chunk's logits are computed once more in the backward pass.
    """
    shape = targets.shape
    hidden, targets, size = _grouped(head, hidden, targets, groups, chunk_logits)
    chunked, order = _closed(head, hidden[:, :size], key), _order(targets)

    @jax.checkpoint
    def of_chunk(index: jax.Array, h: jax.Array, t: jax.Array, reads: tuple[Any, ...]) -> jax.Array:
        return _unless_empty(t, lambda: log_probs(chunked.call(h, index, reads), t))

    found = jax.lax.map(lambda chunk: of_chunk(*chunk, chunked.reads), _chunks(size, hidden, targets, order))
    found = jnp.moveaxis(found, 0, 1).reshape(len(order), -1)
    return _rows(jnp.take_along_axis(found, jnp.argsort(order, axis=1), axis=1), shape, groups)


def _grouped(
    head: Head, hidden: jax.Array, targets: Given, groups: int, chunk_logits: int
) -> tuple[jax.Array, jax.Array, int]:
    """Both as `[groups positions ...]`, padded to whole chunks, and the size of a chunk.

    Where a mesh splits the tokens of a row, its parts are groups of their own.
    """
    parts = token_ways(hidden)
    pad = -targets.shape[1] % parts
    hidden = _parts(jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))), groups, parts)
    targets = _parts(jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORED), groups, parts)
    vocab = jax.eval_shape(head, hidden[:, :1]).shape[-1]
    size = min(targets.shape[1], max(1, chunk_logits // (len(targets) * vocab)))
    pad = -targets.shape[1] % size
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    return hidden, jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORED), size


def _parts(x: jax.Array, groups: int, parts: int) -> jax.Array:
    """`[batch seq ...]` as `[groups * parts, positions, ...]`: rows in `groups`, and their tokens in `parts`."""
    if parts == 1:
        return x.reshape(groups, -1, *x.shape[2:])
    x = x.reshape(groups, x.shape[0] // groups, parts, x.shape[1] // parts, *x.shape[2:])
    return jnp.swapaxes(x, 1, 2).reshape(groups * parts, -1, *x.shape[4:])


def _rows(x: jax.Array, shape: tuple[int, ...], groups: int) -> jax.Array:
    """The inverse of `_grouped`, of one number a position: `[batch seq]`."""
    (batch, seq), parts = shape, len(x) // groups
    width = -(-seq // parts)
    x = x[:, : batch * width // groups].reshape(groups, parts, batch // groups, -1) if parts > 1 else x
    return (
        jnp.swapaxes(x, 1, 2).reshape(batch, -1)[:, :seq] if parts > 1 else x[:, : batch * seq // groups].reshape(shape)
    )


def _closed(head: Head, hidden: jax.Array, key: jax.Array | None) -> _Chunked:
    """`head` with what it reads (kernels, adapters, tracers of an outer transformation) as explicit arguments."""

    def call(hidden: jax.Array, index: jax.Array) -> jax.Array:
        with scope(key=None if key is None else jax.random.fold_in(key, index)):
            return head(hidden)

    jaxpr = jax.make_jaxpr(call)(hidden, jnp.int32(0))
    return _Chunked(lambda h, index, reads: core.eval_jaxpr(jaxpr.jaxpr, reads, h, index)[0], tuple(jaxpr.consts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked_nll(
    head: Callable[..., jax.Array],
    size: int,
    terms: Terms,
    hidden: jax.Array,
    targets: jax.Array,
    reads: tuple[Any, ...],
) -> jax.Array:
    def loss(chunk: tuple[Any, ...]) -> jax.Array:
        index, h, t = chunk
        return _unless_empty(t, lambda: nll(head(h, index, reads), t, terms))

    return jax.lax.map(loss, _chunks(size, hidden, targets, _order(targets))).sum()


def _forward(head: Any, size: int, terms: Terms, hidden: Any, targets: Any, reads: Any) -> tuple[jax.Array, Any]:
    """The loss, and its derivatives with respect to those inputs that are being differentiated."""
    wanted = [x.perturbed for x in (hidden, *reads)]
    hidden, targets, reads = hidden.value, targets.value, [x.value for x in reads]
    order = _order(targets)

    def grads(index: jax.Array, h: jax.Array, t: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        def logits(*chosen: jax.Array) -> jax.Array:
            h, *reads_ = _join(wanted, chosen, inputs)
            return head(h, index, reads_)

        inputs = [h, *reads]
        out, pull = jax.vjp(logits, *_pick(wanted, inputs))
        loss, slope = _nll_and_slope(out, t, terms)
        return loss, list(pull(slope.astype(out.dtype)))

    def body(sums: Any, chunk: tuple[Any, ...]) -> tuple[Any, Any]:
        index, h, t = chunk
        loss, slopes = _unless_empty(t, lambda: grads(index, h, t))
        d_hidden = slopes.pop(0) if wanted[0] else None
        return [a + b.astype(a.dtype) for a, b in zip(sums, slopes, strict=True)], (loss, d_hidden)

    zeros = [jnp.zeros(x.shape, wide(x.dtype)) for x in _pick(wanted[1:], reads)]
    d_reads, (losses, d_hidden) = jax.lax.scan(body, zeros, _chunks(size, hidden, targets, order))
    d_reads = [d.astype(x.dtype) for d, x in zip(d_reads, _pick(wanted[1:], reads), strict=True)]
    if wanted[0]:
        d_hidden = jnp.take_along_axis(_unchunk(d_hidden), jnp.argsort(order, axis=1)[..., None], axis=1)
    return losses.sum(), (d_hidden, _join(wanted[1:], d_reads, [None] * len(reads)))


def _backward(head: Any, size: int, terms: Terms, saved: Any, slope: Any) -> tuple[Any, None, Any]:
    del head, size, terms
    if isinstance(slope, SymbolicZero):
        saved = jax.tree.map(jnp.zeros_like, saved)
    else:
        saved = jax.tree.map(lambda d: (slope * d).astype(d.dtype), saved)
    return saved[0], None, tuple(saved[1])


_chunked_nll.defvjp(_forward, _backward, symbolic_zeros=True)


def _nll_and_slope(logits: jax.Array, targets: Given, terms: Terms) -> tuple[jax.Array, jax.Array]:
    """The sum of losses, and its derivative with respect to `logits`."""
    logits = logits.astype(wide(logits.dtype))
    counts = (targets != IGNORED)[..., None]
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)
    p, onehot = jnp.exp(logits - lse), jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    loss, slope = lse - chosen, p - onehot
    if terms.smoothing:
        loss = loss + terms.smoothing * (chosen - logits.mean(axis=-1, keepdims=True))
        slope = slope + terms.smoothing * (onehot - 1 / logits.shape[-1])
    if terms.z:
        loss, slope = loss + terms.z * lse**2, slope + 2 * terms.z * lse * p
    return jnp.where(counts, loss, 0.0).sum(), jnp.where(counts, slope, 0.0)


def _order(targets: jax.Array) -> jax.Array:
    """Positions of each group, labelled ones first."""
    return jnp.argsort(targets == IGNORED, axis=1, stable=True)


def _chunks(size: int, hidden: jax.Array, targets: jax.Array, order: jax.Array) -> tuple[jax.Array, ...]:
    """(index, hidden, targets) of every chunk: `[chunks]`, `[chunks groups size d_model]`, `[chunks groups size]`."""
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets = jnp.take_along_axis(targets, order, axis=1)
    chunks = (jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0) for x in (hidden, targets))
    return jnp.arange(targets.shape[1] // size), *chunks


def _unchunk(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _unless_empty(targets: jax.Array, compute: Callable[[], Any]) -> Any:
    """`compute()`, or zeros where no target counts."""
    shapes = jax.eval_shape(compute)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.cond((targets != IGNORED).any(), compute, zeros)


def _pick(wanted: list[bool], values: Any) -> list[Any]:
    return [value for want, value in zip(wanted, values, strict=True) if want]


def _join(wanted: list[bool], chosen: Any, rest: Any) -> list[Any]:
    """`rest` with the wanted entries replaced by `chosen`, in order."""
    chosen = iter(chosen)
    return [next(chosen) if want else other for want, other in zip(wanted, rest, strict=True)]
