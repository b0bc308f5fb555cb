# SPDX-License-Identifier: Apache-2.0
"""What encoders with a decoder beside them have in common: attention within and across, two stacks, and the cache.

A family brings its layers, and says by a few methods what stands before and behind them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from .. import _stack
from .._given import Given
from .._scope import current, scope
from ..seams import InputEmbedding, KeyValues
from ._attention import attention
from ._cache import KV, Cache, check_step, empty, extended, filled, in_cache, num_slots, or_nan, reach, step_scope
from ._layers import in_front, segment_positions
from ._step_attention import step_attention
from ._table import Entry, Rule, module_names


class Encoded(NamedTuple):
    """What a decoder reads of the encoder: its states, virtual tokens among them, and which of them it sees.

    Attributes:
      states: of all its tokens.
      mask: 0 for those that nobody sees; None where all are seen.
      segments: of which example of a packed row each is; None where a row is one.
    """

    states: Float[Array, "batch seq d_model"]
    mask: Shaped[Given, "batch seq"] | None
    segments: Int[Given, "batch seq"] | None = None


class Context(NamedTuple):
    """What the layers of a stack have in common.

    Attributes:
      mask, bias: of the stack's own tokens as keys: which are seen, and what is added to their scores, or None.
      encoded: in a decoder, what it reads of the encoder; states are None where their keys and values are given.
      segments: of the stack's own tokens, where rows are packed.
    """

    mask: Any
    bias: Float[Array, "rows heads seq keys"] | None
    encoded: Any = None
    segments: Any = None


class Memory(NamedTuple):
    """Keys and values that a block, or with a leading axis a stack of them, is given.

    Attributes:
      past: of the tokens before the running ones.
      cross: of the encoder's states; None where the block is to compute them. As made by an attention, or where there
        is a past, as they lie in a cache.
    """

    past: KV | None = None
    cross: KV | None = None


class Attention(nnx.Module):
    """softmax(Q Kᵀ · scale + bias) V.

    A family's class makes the projections of queries, keys, values and output, and names them in this order.
    """

    projections: ClassVar[tuple[str, str, str, str]]
    keys_values: KeyValues
    scale: float
    dropout_rate: float
    path: str

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        kv: KV,
        mask: Any,
        bias: Any = None,
        causal: bool = False,
        past: KV | None = None,
        segments: tuple[Any, Any] = (None, None),
    ) -> Float[Array, "batch seq d_model"]:
        """Attention of `x` to `kv`; `segments` are of `x`, and of the keys where these are not its own."""
        q = self._projected(0, x)
        if past is not None:
            y = step_attention(self.keys_values, q, past, kv, x, seen=mask, scale=self.scale, bias=bias)
        else:
            k, v, mask = self.keys_values(*kv, mask, x)
            limits = {"mask": mask, "segment_ids": segments[0], "key_segments": segments[1]}
            rate, path = self.dropout_rate, f"{self.path}/attention_dropout"
            y = attention(q, k, v, causal=causal, scale=self.scale, bias=bias, dropout=rate, path=path, **limits)
        return getattr(self, self.projections[3])(y.reshape(*y.shape[:2], -1))

    def across(
        self, x: Float[Array, "batch seq d_model"], context: Context, memory: Memory
    ) -> Float[Array, "batch seq d_model"]:
        """Attention of `x` to the encoder's states."""
        past, theirs = None, context.encoded
        if memory.cross is None:
            kv = self.read(theirs.states)
        elif memory.past is None:
            kv = memory.cross
        else:
            kv, past = self._none(x), memory.cross
        return self(x, kv, theirs.mask, past=past, segments=(context.segments, theirs.segments))

    def read(self, states: Float[Array, "batch keys d_model"]) -> KV:
        """Their keys and values."""
        return KV(self._projected(1, states), self._projected(2, states))

    def _none(self, x: Float[Array, "batch seq d_model"]) -> KV:
        """Keys and values of no token, where all are in a cache."""
        zeros = jnp.zeros((len(x), 0, self.keys_values.kv_heads, self.keys_values.d_head), x.dtype)
        return KV(zeros, zeros)

    def _projected(self, which: int, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq heads d_head"]:
        y = getattr(self, self.projections[which])(x)
        return y.reshape(*y.shape[:2], -1, self.keys_values.d_head)


class Stack(nnx.Module):
    """The encoder, or the decoder. The `options` of its methods are those of the scan.

    Each of its layers is called with states, a `Context` and its `Memory`, and gives states and its keys and values.
    """

    input_embedding: InputEmbedding

    @property
    def stacked(self) -> Any:
        """The layers."""
        raise NotImplementedError

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many layers there are, heads, and the width of a head."""
        raise NotImplementedError

    def crossing(self, layer: Any) -> Attention:
        """The attention of one of a decoder's layers to the encoder."""
        raise NotImplementedError

    def enter(self, x: Float[Array, "batch seq d_model"], places: Int[Array, "rows seq"]) -> Any:
        """What the first layer reads, of embedded tokens and their places."""
        raise NotImplementedError

    def leave(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        """The states, of what the last layer gives."""
        raise NotImplementedError

    def bias(self, places: Int[Array, "rows seq"], keys: Any = None) -> Any:
        """What is added to the scores of own tokens at `places`; of `keys`, if they are others; or None."""
        del places, keys

    def __call__(
        self,
        e: Float[Array, "batch seq d_model"],
        mask: Any,
        positions: Any,
        segments: Any,
        encoded: Encoded | None = None,
        **options: Any,
    ) -> Encoded:
        """The states and their mask, with virtual tokens in front; `encoded` is given to a decoder."""
        x, places, whole, owners = self.input_embedding(e, _counted(positions, e, segments), mask, segments)
        virtual = x.shape[1] - e.shape[1]
        # Without virtual tokens those that see each other are as far apart as they stand, and one row's bias is all's.
        apart = places if segments is None or positions is not None or virtual else _counted(None, e)
        with scope(**in_front(virtual, e.shape[:2], mask, owners)):
            context = Context(whole, self.bias(apart), encoded, owners)
            x, _ = self._run(self.enter(x, places), context, Memory(), False, options)
        return Encoded(x, whole, owners)

    def prefill(
        self,
        cache: Cache,
        e: Float[Array, "batch seq d_model"],
        mask: Any,
        positions: Any,
        encoded: Encoded,
        **options: Any,
    ) -> tuple[Float[Array, "batch keys d_model"], Cache]:
        """As a call: the states, and the cache with these tokens and the encoder's states in it.

        Raises:
          ValueError: rows are packed.
        """
        if encoded.segments is not None:
            raise ValueError("a text is written for a row, so a row cannot pack several examples (segment_ids)")
        positions = _counted(positions, e)
        x, places, whole, _ = self.input_embedding(e, positions, mask, None)
        with scope(**in_front(x.shape[1] - e.shape[1], e.shape[:2], mask, None)):
            context = Context(whole, self.bias(places), encoded._replace(states=None))
            cross = self._cross(encoded.states)
            x, new = self._run(self.enter(x, places), context, Memory(cross=cross), True, options)
        cache = filled(cache, new, whole, places, positions)
        return x, cache._replace(cross=in_cache(cross), cross_mask=encoded.mask)

    def step(
        self, cache: Cache, e: Float[Array, "batch 1 d_model"], **options: Any
    ) -> tuple[Float[Array, "batch 1 d_model"], Cache]:
        """The state of the next token of every row, and the cache with it."""
        with scope(**step_scope(len(e))):
            x, places, _, _ = self.input_embedding(e, cache.next[:, None], None, None)
            bias = self.bias(places, jnp.concatenate([cache.places, places], 1))
            context = Context(reach(cache), bias, Encoded(None, cache.cross_mask))  # type: ignore[arg-type]
            x, new = self._run(self.enter(x, places), context, Memory(cache.kv, cache.cross), True, options)
        return or_nan(x, cache), extended(cache, new, places, x)

    def _run(
        self, x: jax.Array, context: Context, memory: Memory, keep: bool, options: Mapping[str, Any]
    ) -> tuple[jax.Array, Any]:
        """The states and, if they are to be kept, all layers' keys and values of `x`."""

        def body(layer: Any, x: jax.Array, memory: Memory) -> tuple[jax.Array, KV | None]:
            x, new = layer(x, context, memory)
            return x, new if keep else None

        x, new = _stack.scan(self.stacked, body, x, memory, **options)
        return self.leave(x), new

    def _cross(self, states: Float[Array, "batch keys d_model"]) -> KV:
        """Keys and values of the encoder's states, of all layers."""

        def body(layer: Any, carry: None, _: None) -> tuple[None, KV]:
            return carry, self.crossing(layer).read(states)

        return _stack.scan(self.stacked, body, None)[1]


class EncoderDecoder(nnx.Module):
    """The half of such a model that writes."""

    config: Any
    dtype: Any
    remat: str
    unroll: bool
    encoder: Any
    decoder: Any

    def words(self, ids: Int[Given, "batch out"]) -> Float[Array, "batch out d_model"]:
        """The vectors of the decoder's tokens."""
        raise NotImplementedError

    def decode(
        self,
        encoded: Encoded,
        decoder_input_ids: Int[Given, "batch out"],
        decoder_attention_mask: Shaped[Given, "batch out"] | None = None,
        decoder_positions: Int[Given, "rows out"] | None = None,
        decoder_segment_ids: Int[Given, "batch out"] | None = None,
    ) -> Float[Array, "batch out d_model"]:
        """The decoder's states. Virtual tokens that a method puts in front of its own are left out.

        Raises:
          ValueError: of the encoder's and the decoder's rows one alone is packed.
        """
        if (encoded.segments is None) != (decoder_segment_ids is None):
            alone = "decoder_segment_ids" if encoded.segments is None else "segment_ids"
            raise ValueError(
                "in packed rows an example's tokens of the decoder (decoder_segment_ids) see those of the encoder that "
                f"have its number (segment_ids); give both, got {alone} alone"
            )
        e = self.words(decoder_input_ids)
        given = decoder_attention_mask, decoder_positions, decoder_segment_ids
        x = self.decoder(e, *given, encoded, **self._options).states
        return x[:, x.shape[1] - e.shape[1] :]

    def decode_behind(self, encoded: Encoded, *given: Any) -> Float[Array, "batch out d_model"]:
        """As `decode`, within a call of the whole model, of which the scope's `prompt` is the encoder's."""
        with scope(prompt=current().decoder_prompt):
            return self.decode(encoded, *given)

    def cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of `length` decoder tokens; virtual tokens get slots of their own."""
        layers, heads, d_head = self.decoder.sizes
        slots = num_slots(self.decoder.input_embedding, length, self.dtype)
        return empty(layers, batch, slots, heads, d_head, self.dtype)

    def prefill(
        self,
        cache: Cache,
        encoded: Encoded,
        decoder_input_ids: Int[Given, "batch out"],
        decoder_attention_mask: Shaped[Given, "batch out"] | None = None,
        decoder_positions: Int[Given, "rows out"] | None = None,
    ) -> tuple[Float[Array, "batch out d_model"], Cache]:
        """The decoder's first tokens: what `decode` gives for them, and the cache with them and `encoded` in it.

        Padding stands on the left; positions go on from those of the last column.
        """
        e = self.words(decoder_input_ids)
        given = decoder_attention_mask, decoder_positions, encoded
        x, cache = self.decoder.prefill(cache, e, *given, **self._options)
        return x[:, x.shape[1] - e.shape[1] :], cache

    def step(self, cache: Cache, input_ids: Int[Given, "batch 1"]) -> tuple[Float[Array, "batch 1 d_model"], Cache]:
        """The decoder's next token of every row: its state, and the cache with it. NaN where no slot was left."""
        check_step(cache, input_ids)
        return self.decoder.step(cache, self.words(input_ids), **self._options)

    def decoder_inputs(
        self, labels: Int[Array, "batch out"], segment_ids: Int[Given, "batch out"] | None = None
    ) -> Int[Array, "batch out"]:
        """What the decoder reads to give `labels`: the start token, then all but the last; padding for ignored ones.

        In a packed row every segment begins with the start token.

        Raises:
          ValueError: the config has neither a decoder_start_token_id nor a pad_token_id.
        """
        pad = self.config.pad_token_id
        start = pad if self.config.decoder_start_token_id is None else self.config.decoder_start_token_id
        if start is None or pad is None:
            raise ValueError("the config has no pad_token_id, which a decoder starts with and reads for ignored labels")
        shifted = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start)
        if segment_ids is not None:
            shifted = jnp.where(segment_positions(segment_ids) == 0, start, shifted)
        return jnp.where(shifted < 0, pad, shifted)

    @property
    def _options(self) -> dict[str, Any]:
        """Of the scans over the layers."""
        return {"remat_policy": self.remat, "unroll": self.unroll}


def names_of_stacks(entries: Sequence[Entry], encoder: int, decoder: int) -> dict[str, tuple[str, ...]]:
    """transformers' name of every module, one per layer of its stack, of which the two may differ in depth."""
    own = [entry for entry in entries if isinstance(entry, Rule) and entry.path.startswith("decoder/")]
    rest = [entry for entry in entries if entry not in own]
    return module_names(rest, encoder) | module_names(own, decoder)


def _counted(positions: Any, e: jax.Array, segments: Any = None) -> Int[Array, "rows seq"]:
    """Positions as given; else from 0, in a packed row in each segment."""
    if positions is not None:
        return positions
    return jnp.arange(e.shape[1])[None] if segments is None else segment_positions(segments)
