# SPDX-License-Identifier: Apache-2.0
"""What one forward pass knows: its dropout key, and which layer of a stack is running.

A module deep in a model has a fixed call signature, so what belongs to the *call* and not to the module
travels beside the arguments. The scope is read while JAX traces and holds ordinary (traced) arrays; nothing
of it outlives the `with` block.
"""

import contextlib
import contextvars
import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Scope:
    """The state of the running call.

    Attributes:
      key: PRNG key of this forward pass; None means deterministic.
      layer: index of the running layer inside a scanned stack; None outside of one.
    """

    key: Any = None
    layer: Any = None


_SCOPE: contextvars.ContextVar[Scope] = contextvars.ContextVar("jpeft_scope", default=Scope())  # noqa: B039 (frozen)

#: JAX keeps the traces of functions jitted or checkpointed *inside* a model, and would run one that was made without a
#: key, or under another, again. This value is part of its caches' keys, so that no trace serves two scopes.
_TRACED_IN = jax.make_user_context(None)


def current() -> Scope:
    """The scope of the running call."""
    return _SCOPE.get()


@contextlib.contextmanager
def scope(**changes: Any) -> Iterator[Scope]:
    """Runs the block with `changes` made to the current scope; a `key` of None keeps the outer one."""
    if changes.get("key", ...) is None:
        del changes["key"]
    if not changes:
        yield current()
        return
    token = _SCOPE.set(dataclasses.replace(current(), **changes))
    try:
        with _TRACED_IN(object()):
            yield _SCOPE.get()
    finally:
        _SCOPE.reset(token)


@contextlib.contextmanager
def dropout_key(key: jax.Array) -> Iterator[None]:
    """Turns on dropout, with this key, for every model called inside the block.

    jpeft's own models take `key=` directly; this is for models whose call has no such argument.
    The same key gives the same masks. Open the block inside the function that `jax.jit` traces.

    Example:
      >>> import jax, jpeft
      >>> def loss(trainable, frozen, batch, key):
      ...     with jpeft.dropout_key(key):
      ...         return jpeft.combine(graphdef, trainable, frozen)(batch).mean()
    """
    with scope(key=key):
        yield


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """`key` folded with a path, so that every path draws its own numbers whatever else exists."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def dropout(x: jax.Array, rate: float, path: str, layer: jax.Array | None = None) -> jax.Array:
    """Drops entries of `x` with probability `rate` and scales the rest by 1/(1-rate).

    Does nothing when the running call has no key. The mask depends on (key, path, layer) alone, so it is the
    same under scan, remat and vmap.

    Args:
      x: any shape.
      rate: probability in [0, 1), to the nearest 1/65536.
      path: what is dropped, unique in the model.
      layer: index inside a stack; by default the one that the running scan gives.
    """
    running = current()
    if rate == 0.0 or running.key is None:
        return x
    key = fold_path(running.key, path)
    index = running.layer if layer is None else layer
    if index is not None:
        key = jax.random.fold_in(key, index)
    keep = _uniform16(key, x.shape) >= jax.numpy.uint16(min(round(rate * 2**16), 2**16 - 1))
    return jax.numpy.where(keep, x / (1.0 - rate), jax.numpy.zeros((), x.dtype)).astype(x.dtype)


def _uniform16(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Integers in [0, 2**16): two from each 32 random bits, which on a CPU are a tenth of a train step to draw."""
    *lead, last = shape
    bits = jax.random.bits(key, (*lead, -(-last // 2)), jax.numpy.uint32)
    halves = jax.lax.bitcast_convert_type(bits, jax.numpy.uint16)
    return halves.reshape(*lead, -1)[..., :last]
