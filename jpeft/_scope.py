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
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from ._dropout import drop, make_seed
from ._fields import whole


@dataclasses.dataclass(frozen=True)
class Scope:
    """The state of the running call.

    Attributes:
      key: PRNG key of this forward pass; None means deterministic.
      layer: index of the running layer inside a scanned stack; None outside of one.
      shared: what an adapter's places have in common, by the adapter's name.
      text: which tokens of the running input are text, `[batch, seq]`, with virtual ones in front counted in; None
        where nothing says.
      segments: `[batch, seq]` of a packed input, likewise; `seams.EVERY_SEGMENT` for a virtual token.
      prompt: which tokens are the prompt, `[batch, seq]` as given by the caller; None where all are.
      decoder_prompt: likewise of a decoder beside an encoder.
      max_segments: how many examples a packed row has at most; None where nothing says.
      step: whether the running tokens stand behind others, virtual ones among them, that a cache holds.
      groups: how many of the running rows, which are sorted, belong to each expert, `[experts]`; None where each expert
        has rows of its own.
      platform: what the program is compiled for (`cpu`, `cuda`, `tpu`); None where that is JAX's default backend.
      noise: NEFTune's alpha; 0 is none.
      keeps_names: whether the running layer keeps what is named for its backward pass and computes the rest again.
    """

    key: Any = None
    layer: Any = None
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: Any = None
    segments: Any = None
    prompt: Any = None
    decoder_prompt: Any = None
    max_segments: int | None = None
    step: bool = False
    groups: Any = None
    platform: str | None = None
    noise: float = 0.0
    keeps_names: bool = False


_SCOPE: contextvars.ContextVar[Scope] = contextvars.ContextVar("jpeft_scope", default=Scope())  # noqa: B039 (frozen)

#: JAX keeps the traces of functions jitted or checkpointed *inside* a model, and would run one that was made without a
#: key, or under another, again. This value is part of its caches' keys, so that no trace serves two scopes.
_TRACED_IN = jax.make_user_context(None)


def current() -> Scope:
    """The scope of the running call."""
    return _SCOPE.get()


def platform() -> str:
    """What the running program is compiled for: JAX's default backend, unless the scope says another."""
    return current().platform or jax.default_backend()


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


@contextlib.contextmanager
def prompt_tokens(mask: Any, decoder: Any = None) -> Iterator[None]:
    """Says which tokens are the prompt, for every model called inside the block.

    Methods that act on the ends of the prompt (LoReFT and its like) need it where a text holds more than that; without
    it, all text is prompt. Padding may be in the mask or not. Where no token is the prompt, as in the steps after a
    prompt has been read, they do nothing.

    Args:
      mask: `[batch, seq]` as of the model's tokens, 0 where a token is not the prompt; None for all text. Of an encoder
        with a decoder beside it, the encoder's; its `encode` and `decode`, called one by one, have each their own.
      decoder: `[batch, out]`, likewise of such a decoder's tokens.

    Example:
      >>> with jpeft.prompt_tokens(jnp.arange(seq)[None] < prompt_lengths[:, None]):
      ...     logits = model(input_ids, attention_mask)
    """
    with scope(
        **{
            name: None if its is None else jnp.asarray(its)
            for name, its in {"prompt": mask, "decoder_prompt": decoder}.items()
        }
    ):
        yield


@contextlib.contextmanager
def max_segments(count: int) -> Iterator[None]:
    """Says how many examples a packed row (`segment_ids`) has at most, for every model called inside the block.

    Prompts on a bidirectional model, or on an encoder with a decoder, need it inside `jax.jit`: each example has a copy
    of the virtual tokens, and a compiled program has room for `count` of them in every row, used or not. Elsewhere they
    are counted. A row of more examples is an error where they can be counted, and in a compiled program NaN.

    Args:
      count: the most examples that a row of the batch holds; padding is none.

    Raises:
      ValueError: it is no number of examples.

    Example:
      >>> @jax.jit
      ... def run(trainable, frozen, batch):
      ...     with jpeft.max_segments(8):
      ...         model = jpeft.combine(graphdef, trainable, frozen)
      ...         return model(batch["input_ids"], batch["attention_mask"], segment_ids=batch["segment_ids"])
    """
    whole("max_segments", "count", count)
    with scope(max_segments=count):
        yield


def made_again(x: jax.Array) -> jax.Array:
    """`x` on its way into a `jax.checkpoint` inside a layer, of which it may be one of the arrays kept by name.

    JAX hands a checkpoint inside another one a copy of its own of each kept array that goes into it, which stays until
    the backward pass. What is made of a kept array is made again there, without a copy; so this is `x` with an axis put
    in front and taken away, which is nothing in a compiled program.
    """
    return jnp.squeeze(jnp.expand_dims(x, 0), 0) if current().keeps_names else x


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """`key` folded with a path, so that every path draws its own numbers whatever else exists."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def dropout(x: jax.Array, rate: float, path: str, layer: jax.Array | None = None) -> jax.Array:
    """Drops entries of `x` with probability `rate` and scales the rest by 1/(1-rate).

    Does nothing when the running call has no key. The mask depends on (key, path, layer) alone, so it is the
    same under scan, remat and vmap.

    Args:
      x: any shape.
      rate: probability in [0, 1).
      path: what is dropped, unique in the model.
      layer: index inside a stack; by default the one that the running scan gives.
    """
    seed = dropout_seed(rate, path, layer)
    return x if seed is None else drop(made_again(x), seed, rate)


def dropout_seed(rate: float, path: str, layer: jax.Array | None = None) -> UInt32[Array, "2"] | None:
    """The seed of `dropout`'s mask; None where nothing is dropped."""
    running = current()
    if rate == 0.0 or running.key is None:
        return None
    key = fold_path(running.key, path)
    index = running.layer if layer is None else layer
    return make_seed(key if index is None else jax.random.fold_in(key, index))
