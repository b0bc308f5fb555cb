# SPDX-License-Identifier: Apache-2.0
"""The Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3 (causal decoders with rotary embedding and a gated MLP).

Computes what transformers' classes of these names do. The four differ in biases, windows and norms only:

  llama     biases as attention_bias and mlp_bias say; rope_scaling   https://arxiv.org/abs/2307.09288, 2407.21783
  mistral   every layer sees a window of sliding_window tokens        https://arxiv.org/abs/2310.06825
  qwen2     q, k and v have biases; the layers may have windows       https://arxiv.org/abs/2407.10671
  qwen3     norms on each head's q and k; a head size of its own      https://arxiv.org/abs/2505.09388

Axes: batch, seq, heads, kv_heads, d_head (head_dim), d_model (hidden_size), d_ff (intermediate_size), labels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from .. import _stack
from .._scope import dropout, scope
from ..seams import InputEmbedding, KeyValues, Residual
from ._attention import attention
from ._cache import KV, Cache, check_step, empty, extended, filled, num_slots, or_nan, reach, step_scope
from ._layers import RMSNorm, gated, in_front, last_token, segment_positions, token_table
from ._llama_config import PRESETS, Config
from ._rope import rope_tables, rotate
from ._step_attention import step_attention
from ._weights import TRANSPOSE, Entry, Ignore, Rule, Tied, module_names

__all__ = ["HEADS", "PREFIXES", "PRESETS", "TASKS", "WEIGHTS", "Config", "Llama"]

TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
#: What checkpoints with a head put before the backbone's names; the second is QUESTION_ANS's.
PREFIXES = ("model.", "transformer.")
#: Modules that some tasks have and others lack.
HEADS = ("lm_head", "score", "qa_outputs")


class Attention(nnx.Module):
    """softmax(Q Kᵀ / √d_head) V over the tokens before, with Q and K turned by their positions."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        d_model, d_head = config.hidden_size, config.d_head
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.d_head, self.dropout_rate = d_head, config.attention_dropout
        self.q_proj = _linear(config, d_model, heads * d_head, config.qkv_bias, rngs, dtype)
        self.k_proj = _linear(config, d_model, kv_heads * d_head, config.qkv_bias, rngs, dtype)
        self.v_proj = _linear(config, d_model, kv_heads * d_head, config.qkv_bias, rngs, dtype)
        self.o_proj = _linear(config, heads * d_head, d_model, bias, rngs, dtype)
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(d_head, config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(d_head, config.rms_norm_eps, dtype=dtype)
        self.keys_values = KeyValues(d_model, kv_heads, d_head)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        rope: tuple[jax.Array, jax.Array],
        mask: Shaped[Array, "batch seq"] | None,
        segment_ids: Int[Array, "batch seq"] | None,
        window: Any,
        places: Any,
        past: KV | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        q, k, v = (self._heads(y) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        new = KV(rotate(k, rope), v)
        q = rotate(q, rope)
        if past is not None:
            y = step_attention(self.keys_values, q, past, new, x, seen=mask, scale=self.d_head**-0.5)
            return self.o_proj(y.reshape(*y.shape[:2], -1)), new
        k, v, mask = self.keys_values(*new, mask, x)
        limits = {"mask": mask, "segment_ids": segment_ids, "window": window, "places": places}
        rate, path = self.dropout_rate, "layers/self_attn/dropout"
        y = attention(q, k, v, causal=True, scale=self.d_head**-0.5, dropout=rate, path=path, **limits)
        return self.o_proj(y.reshape(*y.shape[:2], -1)), new

    def _heads(self, y: Float[Array, "batch seq d_out"]) -> Float[Array, "batch seq heads d_head"]:
        return y.reshape(*y.shape[:2], -1, self.d_head)


class MLP(nnx.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        d_model, d_ff, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.hidden_act = config.hidden_act
        self.gate_proj = _linear(config, d_model, d_ff, bias, rngs, dtype)
        self.up_proj = _linear(config, d_model, d_ff, bias, rngs, dtype)
        self.down_proj = _linear(config, d_ff, d_model, bias, rngs, dtype)

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        return self.down_proj(gated(self.hidden_act, self.gate_proj(x), self.up_proj(x)))


class Layer(nnx.Module):
    """Attention, then an MLP, each on the normalised stream and added to it."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
        self.attention_residual = Residual(config.hidden_size, "attention")
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)
        self.mlp_residual = Residual(config.hidden_size, "mlp")

    def __call__(
        self, x: Float[Array, "batch seq d_model"], *context: Any
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        x = checkpoint_name(x, "block_input")
        h, new = self.self_attn(self.input_layernorm(x), *context)
        x = checkpoint_name(self.attention_residual(h, x), "attention_output")
        x = self.mlp_residual(self.mlp(self.post_attention_layernorm(x)), x)
        return checkpoint_name(x, "mlp_output"), new


class Llama(nnx.Module):
    """A model of the family for one task: one of `TASKS`.

    Attributes:
      head: paths of the task's own output layers; empty where the head is tied to the embedding.
      remat, unroll: how the layers are run, see `jpeft.models.load`.
    """

    def __init__(
        self,
        config: Config,
        task: str,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        remat: str = "none",
        unroll: bool = False,
    ):
        self.config, self.task, self.dtype = config, task, dtype
        self.remat, self.unroll = remat, unroll
        self.head = _head(config, task)
        self.embed_tokens = token_table(
            config.vocab_size, config.hidden_size, config.initializer_range, config.pad_token_id, rngs=rngs, dtype=dtype
        )
        self.input_embedding = InputEmbedding(config.hidden_size, "decoder", causal=True)
        self.layers = _stack.stack(lambda r: Layer(config, rngs=r, dtype=dtype), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        if self.head:
            size, bias = _head_size(config, task)
            setattr(self, self.head[0], _linear(config, config.hidden_size, size, bias, rngs, dtype))

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"] | None = None,
        attention_mask: Shaped[Array, "batch seq"] | None = None,
        token_type_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        inputs_embeds: Float[Array, "batch seq d_model"] | None = None,
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
        input_ids: Int[Array, "batch seq"] | None = None,
        attention_mask: Shaped[Array, "batch seq"] | None = None,
        token_type_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        inputs_embeds: Float[Array, "batch seq d_model"] | None = None,
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
            self._check_windows(x.shape[1] - e.shape[1], segments)
            with scope(**in_front(x.shape[1] - e.shape[1], e.shape[:2], attention_mask, segment_ids)):
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
                f"from {config.max_cached} tokens on (max_position_embeddings) the dynamic rotary embedding turns all "
                f"keys anew, and a cache keeps them; {slots} slots are too many"
            )
        return empty(config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.d_head, self.dtype)

    def prefill(
        self,
        cache: Cache,
        input_ids: Int[Array, "batch seq"] | None = None,
        attention_mask: Shaped[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        inputs_embeds: Float[Array, "batch seq d_model"] | None = None,
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

    def step(self, cache: Cache, input_ids: Int[Array, "batch 1"]) -> tuple[Float[Array, "batch 1 d_model"], Cache]:
        """The next token of every row: its state, and the cache with it. NaN where the cache had no slot left."""
        check_step(cache, input_ids)
        e = self._embed(input_ids, None)
        virtual = num_slots(self.input_embedding, 1, self.dtype) - 1
        with scope(**step_scope(len(e))):
            x, places, _, _ = self.input_embedding(e, cache.next[:, None], None, None)
            x, new = self._run(x, places, None, None, cache, virtual=virtual, keep=True)
        return or_nan(self.norm(x), cache), extended(cache, new, places)

    def logits(
        self, hidden: Float[Array, "batch seq d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "..."]:
        """What the task's head makes of `hidden`, in float32; SEQ_CLS reads the last token that is not masked."""
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
        return hidden.astype(jnp.float32)

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of the stack."""
        return module_names(WEIGHTS(self.config, self.task), self.config.num_hidden_layers)

    def _embed(self, input_ids: Any, inputs_embeds: Any) -> Float[Array, "batch seq d_model"]:
        """The tokens' vectors."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is None:
            return inputs_embeds.astype(self.dtype)
        return self.embed_tokens(input_ids)

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
        rope = self._rope(places)
        every, windows = self._windows()
        counted = places if virtual and segments is None else None

        def body(layer: Layer, x: jax.Array, own: tuple[Any, KV | None]) -> tuple[jax.Array, KV | None]:
            window, past = (every if own[0] is None else own[0]), own[1]
            if cache is None:
                x, new = layer(x, rope, mask, segments, window, counted)
            else:
                x, new = layer(x, rope, reach(cache, window, counted), None, None, None, past)
            return x, new if keep else None

        own = windows, None if cache is None else cache.kv
        return _stack.scan(self.layers, body, x, own, remat_policy=self.remat, unroll=self.unroll)

    def _rope(self, positions: Int[Array, "batch seq"]) -> tuple[jax.Array, jax.Array]:
        config = self.config
        return rope_tables(
            positions,
            config.d_head,
            theta=config.rope_theta,
            max_position=config.max_position_embeddings,
            scaling=config.rope_scaling,
        )

    def _check_windows(self, virtual: int, segment_ids: Any) -> None:
        """A window is counted in places of the row, which in a packed one are not distances to the virtual tokens."""
        if virtual and segment_ids is not None and any(window is not None for window in self.config.windows):
            raise ValueError(
                f"of {virtual} virtual tokens in front of a packed row (segment_ids) its later examples would see "
                "fewer than by themselves, for this model attends within a window; give each example a row of its own"
            )

    def _windows(self) -> tuple[int | None, jax.Array | None]:
        """The window of every layer, or where they differ an array of them."""
        windows = self.config.windows
        if len({*windows}) == 1:
            return windows[0], None
        return None, jnp.asarray([jnp.iinfo(jnp.int32).max if w is None else w for w in windows], jnp.int32)


def _linear(config: Config, d_in: int, d_out: int, bias: bool, rngs: nnx.Rngs, dtype: Any) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(d_in, d_out, use_bias=bias, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)


def _head(config: Config, task: str) -> tuple[str, ...]:
    if task == "CAUSAL_LM":
        return () if config.tie_word_embeddings else ("lm_head",)
    return {"SEQ_CLS": ("score",), "TOKEN_CLS": ("score",), "QUESTION_ANS": ("qa_outputs",)}.get(task, ())


def _head_size(config: Config, task: str) -> tuple[int, bool]:
    """Outputs of the head, and whether it has a bias."""
    return {
        "CAUSAL_LM": (config.vocab_size, False),
        "SEQ_CLS": (config.num_labels, False),
        "TOKEN_CLS": (config.num_labels, config.token_classification_bias),
        "QUESTION_ANS": (2, True),
    }[task]


def WEIGHTS(config: Config, task: str) -> tuple[Entry, ...]:
    """The table of weights."""
    prefix = _prefix(config, task)
    entries: list[Entry] = [Rule(f"{prefix}embed_tokens.weight", "embed_tokens/embedding")]
    for name, bias in _linears(config):
        entries += _linear_rules(f"{prefix}layers.{{i}}.{name}", f"layers/{name.replace('.', '/')}", bias)
    for name in _norms(config):
        entries.append(Rule(f"{prefix}layers.{{i}}.{name}.weight", f"layers/{name.replace('.', '/')}/scale"))
    entries += [Rule(f"{prefix}norm.weight", "norm/scale"), Ignore("...rotary_emb.inv_freq")]
    for head in _head(config, task):
        entries += _linear_rules(head, head, _head_size(config, task)[1])
    if task == "CAUSAL_LM" and config.tie_word_embeddings:
        entries.append(Tied("lm_head.weight", "embed_tokens/embedding"))
    return tuple(entries)


def _prefix(config: Config, task: str) -> str:
    """What transformers puts before the backbone's names."""
    if task == "FEATURE_EXTRACTION":
        return ""
    return PREFIXES[task == "QUESTION_ANS" and config.model_type != "mistral"]


def _linears(config: Config) -> list[tuple[str, bool]]:
    """A layer's projections, and whether they have a bias."""
    qkv = [(f"self_attn.{name}", config.qkv_bias) for name in ("q_proj", "k_proj", "v_proj")]
    mlp = [(f"mlp.{name}", config.mlp_bias) for name in ("gate_proj", "up_proj", "down_proj")]
    return [*qkv, ("self_attn.o_proj", config.attention_bias), *mlp]


def _norms(config: Config) -> list[str]:
    heads = ["self_attn.q_norm", "self_attn.k_norm"] if config.model_type == "qwen3" else []
    return [*heads, "input_layernorm", "post_attention_layernorm"]


def _linear_rules(hf: str, path: str, bias: bool) -> list[Entry]:
    kernel = Rule(f"{hf}.weight", f"{path}/kernel", TRANSPOSE)
    return [kernel, Rule(f"{hf}.bias", f"{path}/bias")] if bias else [kernel]
