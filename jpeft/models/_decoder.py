# SPDX-License-Identifier: Apache-2.0
"""A causal decoder with rotary embedding: what every family of them does between tokens and logits.

Axes: batch, seq, heads, kv_heads, d_head (head_dim), d_model (hidden_size), d_ff (intermediate_size), labels.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from .. import _stack
from .._given import Given
from .._scope import dropout, scope
from .._text import WHOLE_INPUT
from .._wide import wide, widened
from ..seams import InputEmbedding
from ._cache import KV, Cache, check_step, empty, extended, filled, num_slots, or_nan, reach, step_scope
from ._decoder_config import DecoderConfig
from ._decoder_layers import Layer, linear, norm
from ._decoder_weights import head_of, head_size
from ._layers import in_front, last_token, segment_positions, token_table
from ._rope import rope_tables


class Decoder(nnx.Module):
    """A decoder for one task. A family says what its layers are (`Layer`) and what they are called (`WEIGHTS`).

    Attributes:
      head: paths of the task's own output layers; empty where the head is tied to the embedding.
      remat, unroll: how the layers are run, see `jpeft.models.load`.
    """

    #: What the stack is made of: called with the stream, its context and what it has read; gives its keys and values.
    Layer: ClassVar[Callable[..., Any]] = Layer

    def __init__(
        self,
        config: DecoderConfig,
        task: str,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        remat: str = "none",
        unroll: bool = False,
    ):
        self.config, self.task, self.dtype = config, task, dtype
        self.remat, self.unroll = remat, unroll
        self.head = head_of(config, task)
        self.embed_tokens = token_table(
            config.vocab_size, config.hidden_size, config.initializer_range, config.pad_token_id, rngs=rngs, dtype=dtype
        )
        self.input_embedding = InputEmbedding(config.hidden_size, "decoder", causal=True, beyond=task in WHOLE_INPUT)
        self.layers = _stack.stack(lambda r: self.Layer(config, rngs=r, dtype=dtype), config.num_hidden_layers, rngs)
        self.norm = norm(config, config.hidden_size, dtype)
        if self.head:
            size, bias = head_size(config, task)
            setattr(self, self.head[0], linear(config, config.hidden_size, size, bias, rngs, dtype))

    def __call__(
        self,
        input_ids: Int[Given, "batch seq"] | None = None,
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        token_type_ids: Int[Given, "batch seq"] | None = None,
        segment_ids: Int[Given, "batch seq"] | None = None,
        positions: Int[Given, "batch seq"] | None = None,
        inputs_embeds: Float[Given, "batch seq d_model"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "..."]:
        """Logits: `[batch seq vocab]`, `[batch labels]`, `[batch seq labels]`, `[batch seq 2]`, or hidden states.

        Args:
          input_ids: tokens; or give `inputs_embeds` in their place.
          attention_mask: 1 where there is a token, 0 where there is padding; None where all are tokens.
          token_type_ids: must be None; the family has none.
          segment_ids: which example a token of a packed row belongs to; tokens attend within theirs alone.
          positions: of the tokens; None counts from 0 (padding counts too, as in transformers), in a packed row from
            0 in each segment.
          inputs_embeds: token embeddings.
          key: turns dropout on; the same key gives the same masks. None is deterministic.
        """
        if segment_ids is not None and self.task == "SEQ_CLS":
            raise ValueError("SEQ_CLS gives one output per row, so a row cannot pack several examples (segment_ids)")
        with scope(key=key):
            hidden = self.hidden(input_ids, attention_mask, token_type_ids, segment_ids, positions, inputs_embeds)
            if self.task == "SEQ_CLS" and input_ids is not None and self.config.pad_token_id is not None:
                attention_mask = input_ids != self.config.pad_token_id  # how transformers finds the last token
            return self.logits(hidden, attention_mask)

    def hidden(
        self,
        input_ids: Int[Given, "batch seq"] | None = None,
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        token_type_ids: Int[Given, "batch seq"] | None = None,
        segment_ids: Int[Given, "batch seq"] | None = None,
        positions: Int[Given, "batch seq"] | None = None,
        inputs_embeds: Float[Given, "batch seq d_model"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        """The normalised last states; arguments as in a call. Tokens that a method puts in front are left out."""
        if token_type_ids is not None:
            raise ValueError(f"a {self.config.model_type} model has no token types; token_type_ids must be None")
        with scope(key=key):
            e = self._embed(input_ids, inputs_embeds)
            if positions is None:
                positions = jnp.arange(e.shape[1])[None] if segment_ids is None else segment_positions(segment_ids)
            x, places, mask, segments = self.input_embedding(e, positions, attention_mask, segment_ids)
            with scope(**in_front(x.shape[1] - e.shape[1], e.shape[:2], attention_mask, segments)):
                x, _ = self._run(x, places, mask, segments, virtual=x.shape[1] - e.shape[1])
            return self.norm(x[:, x.shape[1] - e.shape[1] :])

    def cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of `length` tokens; virtual tokens get slots of their own.

        Raises:
          ValueError: a rotary embedding that depends on a row's length would turn the keys that are kept.
        """
        config = self.config
        slots = num_slots(self.input_embedding, length, self.dtype)
        if config.max_cached is not None and slots > config.max_cached:
            raise ValueError(
                f"from {config.max_cached} tokens on ({config.max_cached_name}) the {config.rope_type} rotary "
                f"embedding turns all keys anew, and a cache keeps them; {slots} slots are too many"
            )
        return empty(config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.d_head, self.dtype)

    def prefill(
        self,
        cache: Cache,
        input_ids: Int[Given, "batch seq"] | None = None,
        attention_mask: Shaped[Given, "batch seq"] | None = None,
        positions: Int[Given, "batch seq"] | None = None,
        inputs_embeds: Float[Given, "batch seq d_model"] | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], Cache]:
        """Whole prompts: what `hidden` gives for them, and the cache with them in it.

        Padding stands on the left; positions go on from those of the last column.
        """
        e = self._embed(input_ids, inputs_embeds)
        positions = jnp.arange(e.shape[1])[None] if positions is None else positions
        x, places, mask, _ = self.input_embedding(e, positions, attention_mask, None)
        with scope(**in_front(x.shape[1] - e.shape[1], e.shape[:2], attention_mask, None)):
            x, new = self._run(x, places, mask, None, virtual=x.shape[1] - e.shape[1], keep=True)
        return self.norm(x[:, x.shape[1] - e.shape[1] :]), filled(cache, new, mask, places, positions)

    def step(self, cache: Cache, input_ids: Int[Given, "batch 1"]) -> tuple[Float[Array, "batch 1 d_model"], Cache]:
        """The next token of every row: its state, and the cache with it. NaN where the cache had no slot left."""
        check_step(cache, input_ids)
        e = self._embed(input_ids, None)
        virtual = num_slots(self.input_embedding, 1, self.dtype) - 1
        with scope(**step_scope(len(e))):
            x, places, _, _ = self.input_embedding(e, cache.next[:, None], None, None)
            x, new = self._run(x, places, None, None, cache, virtual=virtual, keep=True)
        return or_nan(self.norm(x), cache), extended(cache, new, places, x)

    def logits(
        self, hidden: Float[Array, "batch seq d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "..."]:
        """What the task's head makes of `hidden`, in float32 or wider; SEQ_CLS reads the last unmasked token."""
        if self.task == "SEQ_CLS":
            hidden = last_token(hidden, attention_mask)
        elif self.task == "TOKEN_CLS":
            rate = self.config.classifier_dropout
            with scope(key=key):
                hidden = dropout(hidden, 0.1 if rate is None else rate, "score/dropout")
        if self.task == "CAUSAL_LM" and not self.head:
            hidden = self.embed_tokens.attend(hidden)
        elif self.head:
            hidden = getattr(self, self.head[0])(hidden)
        logits, cap = widened(hidden), self.config.logit_cap
        return logits if cap is None or self.task != "CAUSAL_LM" else cap * jnp.tanh(logits / cap)

    def _embed(self, input_ids: Any, inputs_embeds: Any) -> Float[Array, "batch seq d_model"]:
        """The tokens' vectors."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is None:
            return jnp.asarray(inputs_embeds, self.dtype)
        e, scale = self.embed_tokens(input_ids), self.config.embedding_scale
        return e if scale is None else e * jnp.asarray(scale, e.dtype)

    def _run(
        self,
        x: jax.Array,
        places: Any,
        mask: Any,
        segments: Any,
        cache: Cache | None = None,
        *,
        virtual: int,
        keep: bool = False,
    ) -> tuple[jax.Array, Any]:
        """The layers' last states and, if they are to be kept, all layers' keys and values of `x`."""
        ropes, kinds = self._ropes(places)
        every, windows = self._windows()
        counted = places if virtual else None

        def body(layer: Any, x: jax.Array, own: tuple[Any, Any, KV | None]) -> tuple[jax.Array, KV | None]:
            window, past = (every if own[0] is None else own[0]), own[2]
            rope = ropes if own[1] is None else jax.tree.map(lambda table: table[own[1]], ropes)
            if cache is None:
                x, new = layer(x, rope, mask, segments, window, counted)
            else:
                x, new = layer(x, rope, reach(cache, window, counted), None, None, None, past)
            return x, new if keep else None

        own = windows, kinds, None if cache is None else cache.kv
        return _stack.scan(self.layers, body, x, own, remat_policy=self.remat, unroll=self.unroll)

    def _ropes(self, positions: Int[Given, "batch seq"]) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
        """The rotary tables; where layers differ, with a first axis of kinds, and the kind of every layer."""
        config = self.config
        kinds = [*dict.fromkeys(config.ropes)]
        tables = [
            rope_tables(
                positions,
                config.d_rotary,
                theta=kind.theta,
                max_position=config.max_position_embeddings,
                scaling=kind.scaling,
                dtype=wide(self.dtype),
            )
            for kind in kinds
        ]
        if len(kinds) == 1:
            return tables[0], None
        stacked: Any = jax.tree.map(lambda *found: jnp.stack(found), *tables)
        return stacked, jnp.asarray([kinds.index(kind) for kind in config.ropes], jnp.int32)

    def _windows(self) -> tuple[int | None, jax.Array | None]:
        """The window of every layer, or where they differ an array of them."""
        windows = self.config.windows
        if len({*windows}) == 1:
            return windows[0], None
        return None, jnp.asarray([jnp.iinfo(jnp.int32).max if w is None else w for w in windows], jnp.int32)
