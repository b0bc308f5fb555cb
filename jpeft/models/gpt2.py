# SPDX-License-Identifier: Apache-2.0
"""GPT-2: a causal decoder with learned positions and pre-norm layers (Radford et al. 2019).

Computes what transformers' `GPT2Model` and its heads do. Paper: "Language Models are Unsupervised Multitask Learners".
Its kernels are transformers' `Conv1D`, stored `[d_in, d_out]`. Axes: batch, seq, heads, d_head, d_model (n_embd), d_ff
(n_inner), labels.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from .. import _stack
from .._given import Given
from .._scope import dropout, scope
from .._text import WHOLE_INPUT
from .._wide import widened
from ..seams import InputEmbedding, KeyValues, Residual
from . import _config
from ._attention import attention
from ._cache import KV, Cache, check_step, empty, extended, filled, num_slots, or_nan, reach, step_scope
from ._layer_norm import LayerNorm
from ._layers import ACTIVATIONS, in_front, last_token, positions_of, token_table
from ._linear import Linear
from ._step_attention import step_attention
from ._table import TRANSPOSE, Entry, Ignore, Rule, Tied, module_names

TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
#: What checkpoints with a head put before the backbone's names; the published ones do not.
PREFIXES = ("transformer.",)
#: Modules that some tasks have and others lack.
HEADS = ("lm_head", "score", "classifier", "qa_outputs", "multiple_choice_head")

_HARMLESS = """
n_ctx n_special predict_special_tokens reorder_and_upcast_attn summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """The attributes of config.json that change what GPT-2 computes, with transformers' defaults.

    `reorder_and_upcast_attn` asks for scores in float32, which they always are here.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    classifier_dropout: float | None = None  # None: 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    num_labels: int = 2
    model_type: str = "gpt2"
    hf: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function must be one of {', '.join(ACTIVATIONS)}; got {self.activation_function!r}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From config.json; an attribute that is unknown, or asks for what is not supported, is refused by name."""
        return _config.read(cls, hf, harmless=_HARMLESS.split())

    def to_hf(self) -> dict[str, Any]:
        """config.json."""
        hf = _config.write(self)
        if self.classifier_dropout is None:
            del hf["classifier_dropout"]
        return hf

    @property
    def max_cached(self) -> int:
        """How many tokens a cache may hold, virtual ones counted in."""
        return self.n_positions

    @property
    def scale(self) -> float:
        """Of the scores, in the first layer."""
        return (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0


PRESETS = {
    "gpt2": Config(),
    "gpt2-medium": Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": Config(n_embd=1600, n_layer=48, n_head=25),
}


class Attention(nnx.Module):
    """softmax(Q Kᵀ · scale) V over the tokens before; one kernel gives Q, K and V."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        self.c_attn = _linear(config, config.n_embd, 3 * config.n_embd, rngs, dtype)
        self.c_proj = _linear(config, config.n_embd, config.n_embd, rngs, dtype, onto_stream=True)
        self.keys_values = KeyValues(config.n_embd, config.n_head, config.n_embd // config.n_head)

    def __call__(
        self, x: Float[Array, "batch seq d_model"], mask: Any, segment_ids: Any, depth: Any, past: KV | None = None
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        config = self.config
        q, k, v = (y.reshape(*y.shape[:2], config.n_head, -1) for y in jnp.split(self.c_attn(x), 3, axis=-1))
        if depth is not None:
            q = (q / depth).astype(q.dtype)
        new = KV(k, v)
        if past is None:
            y = self._attend(q, new, mask, segment_ids, x)
        else:
            y = step_attention(self.keys_values, q, past, new, x, seen=mask, scale=config.scale)
        return dropout(self.c_proj(y.reshape(x.shape)), config.resid_pdrop, "layers/attn/resid_dropout"), new

    def _attend(self, q: jax.Array, new: KV, mask: Any, segment_ids: Any, x: jax.Array) -> jax.Array:
        k, v, mask = self.keys_values(*new, mask, x)
        limits = {"mask": mask, "segment_ids": segment_ids}
        rate, path = self.config.attn_pdrop, "layers/attn/attn_dropout"
        return attention(q, k, v, causal=True, scale=self.config.scale, dropout=rate, path=path, **limits)


class MLP(nnx.Module):
    """c_proj(activation(c_fc(x)))."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        d_ff = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.c_fc = _linear(config, config.n_embd, d_ff, rngs, dtype)
        self.c_proj = _linear(config, d_ff, config.n_embd, rngs, dtype, onto_stream=True)

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        h = ACTIVATIONS[self.config.activation_function](self.c_fc(x))
        return dropout(self.c_proj(h), self.config.resid_pdrop, "layers/mlp/dropout")


class Layer(nnx.Module):
    """Attention, then an MLP, each on the normalised stream and added to it."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype=dtype)
        self.attn = Attention(config, rngs=rngs, dtype=dtype)
        self.attention_residual = Residual(config.n_embd, "attention")
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)
        self.mlp_residual = Residual(config.n_embd, "mlp")

    def __call__(
        self, x: Float[Array, "batch seq d_model"], *context: Any
    ) -> tuple[Float[Array, "batch seq d_model"], KV]:
        x = checkpoint_name(x, "block_input")
        h, new = self.attn(self.ln_1(x), *context)
        x = checkpoint_name(self.attention_residual(h, x), "attention_output")
        return checkpoint_name(self.mlp_residual(self.mlp(self.ln_2(x)), x), "mlp_output"), new


class GPT2(nnx.Module):
    """GPT-2 for one task: one of `TASKS`.

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
        std = config.initializer_range
        self.wte = token_table(config.vocab_size, config.n_embd, std, None, rngs=rngs, dtype=dtype)
        self.wpe = token_table(config.n_positions, config.n_embd, std, None, rngs=rngs, dtype=dtype)
        self.input_embedding = InputEmbedding(
            config.n_embd, "decoder", True, config.n_positions, beyond=task in WHOLE_INPUT
        )
        self.layers = _stack.stack(lambda r: Layer(config, rngs=r, dtype=dtype), config.n_layer, rngs)
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype=dtype)
        if self.head:
            size, bias = _head_size(config, task)
            setattr(self, self.head[0], _linear(config, config.n_embd, size, rngs, dtype, bias=bias))

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
          token_type_ids: tokens whose vectors are added to those of the input; None for none.
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
        with scope(key=key):
            e = self._embed(input_ids, inputs_embeds)
            if token_type_ids is not None:
                e = e + self.wte(token_type_ids)
            if positions is None:
                positions = positions_of(e.shape[1], segment_ids, self.config.n_positions)
            x, places, mask, segments = self.input_embedding(e, positions, attention_mask, segment_ids)
            with scope(**in_front(x.shape[1] - e.shape[1], e.shape[:2], attention_mask, segments)):
                x, _ = self._run(x, places, mask, segments)
            return self.ln_f(x[:, x.shape[1] - e.shape[1] :])

    def cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of `length` tokens; virtual tokens get slots of their own.

        Raises:
          ValueError: the model has fewer positions.
        """
        config, slots = self.config, num_slots(self.input_embedding, length, self.dtype)
        if slots > config.max_cached:
            raise ValueError(
                f"a cache of {slots} slots is longer than the {config.max_cached} positions this model has"
            )
        return empty(config.n_layer, batch, slots, config.n_head, config.n_embd // config.n_head, self.dtype)

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
        positions = positions_of(e.shape[1], None, self.config.n_positions) if positions is None else positions
        x, places, mask, _ = self.input_embedding(e, positions, attention_mask, None)
        with scope(**in_front(x.shape[1] - e.shape[1], e.shape[:2], attention_mask, None)):
            x, new = self._run(x, places, mask, None, keep=True)
        return self.ln_f(x[:, x.shape[1] - e.shape[1] :]), filled(cache, new, mask, places, positions)

    def step(self, cache: Cache, input_ids: Int[Given, "batch 1"]) -> tuple[Float[Array, "batch 1 d_model"], Cache]:
        """The next token of every row: its state, and the cache with it. NaN where the cache had no slot left."""
        check_step(cache, input_ids)
        e = self._embed(input_ids, None)
        with scope(**step_scope(len(e))):
            x, places, _, _ = self.input_embedding(e, cache.next[:, None], None, None)
            x, new = self._run(x, places, reach(cache), None, cache.kv, keep=True)
        return or_nan(self.ln_f(x), cache), extended(cache, new, places, x)

    def logits(
        self, hidden: Float[Array, "batch seq d_model"], attention_mask: Any = None, *, key: jax.Array | None = None
    ) -> Float[Array, "..."]:
        """What the task's head makes of `hidden`, in float32 or wider; SEQ_CLS reads the last unmasked token."""
        if self.task == "SEQ_CLS":
            hidden = last_token(hidden, attention_mask)
        elif self.task == "TOKEN_CLS":
            rate = self.config.classifier_dropout
            with scope(key=key):
                hidden = dropout(hidden, 0.1 if rate is None else rate, "classifier/dropout")
        if self.task == "CAUSAL_LM" and not self.head:
            hidden = self.wte.attend(hidden)
        elif self.head:
            hidden = getattr(self, self.head[0])(hidden)
        return widened(hidden)

    def _embed(self, input_ids: Any, inputs_embeds: Any) -> Float[Array, "batch seq d_model"]:
        """The tokens' vectors, without their positions'."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        e = jnp.asarray(inputs_embeds) if input_ids is None else self.wte(input_ids)
        return e.astype(self.dtype)

    def _run(
        self, e: jax.Array, places: Any, mask: Any, segments: Any, past: Any = None, keep: bool = False
    ) -> tuple[jax.Array, Any]:
        """The layers' last states and, if they are to be kept, all layers' keys and values of `e`."""
        config = self.config

        def body(layer: Layer, x: jax.Array, own: tuple[Any, KV | None]) -> tuple[jax.Array, KV | None]:
            depth, past = own
            x, new = layer(x, mask, segments, depth, past)
            return x, new if keep else None

        depths = 1.0 + jnp.arange(config.n_layer) if config.scale_attn_by_inverse_layer_idx else None
        x = dropout(e + self.wpe(places), config.embd_pdrop, "drop")
        return _stack.scan(self.layers, body, x, (depths, past), remat_policy=self.remat, unroll=self.unroll)

    def module_names(self) -> dict[str, tuple[str, ...]]:
        """transformers' name of every module, one per layer of the stack."""
        return module_names(WEIGHTS(self.config, self.task), self.config.n_layer)


def _linear(
    config: Config, d_in: int, d_out: int, rngs: nnx.Rngs, dtype: Any, bias: bool = True, onto_stream: bool = False
) -> Linear:
    """A projection; those onto the stream start smaller, as there are two of them in each layer."""
    std = config.initializer_range / (math.sqrt(2 * config.n_layer) if onto_stream else 1)
    init = nnx.initializers.normal(std)
    return Linear(d_in, d_out, use_bias=bias, dtype=dtype, param_dtype=dtype, kernel_init=init, rngs=rngs)


def _head(config: Config, task: str) -> tuple[str, ...]:
    if task == "CAUSAL_LM":
        return () if config.tie_word_embeddings else ("lm_head",)
    return {"SEQ_CLS": ("score",), "TOKEN_CLS": ("classifier",), "QUESTION_ANS": ("qa_outputs",)}.get(task, ())


def _head_size(config: Config, task: str) -> tuple[int, bool]:
    """Outputs of the head, and whether it has a bias."""
    return {
        "CAUSAL_LM": (config.vocab_size, False),
        "SEQ_CLS": (config.num_labels, False),
        "TOKEN_CLS": (config.num_labels, True),
        "QUESTION_ANS": (2, True),
    }[task]


def WEIGHTS(config: Config, task: str) -> tuple[Entry, ...]:
    """The table of weights for `task`."""
    prefix = "" if task == "FEATURE_EXTRACTION" else PREFIXES[0]
    entries: list[Entry] = [
        Rule(f"{prefix}wte.weight", "wte/embedding"),
        Rule(f"{prefix}wpe.weight", "wpe/embedding"),
        *_norm_rules(f"{prefix}ln_f", "ln_f"),
        Ignore(f"{prefix}h.{{i}}.attn.bias"),  # causal masks, which transformers once saved
        Ignore(f"{prefix}h.{{i}}.attn.masked_bias"),
    ]
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        hf, path = f"{prefix}h.{{i}}.{name}", f"layers/{name.replace('.', '/')}"
        entries += [Rule(f"{hf}.weight", f"{path}/kernel"), Rule(f"{hf}.bias", f"{path}/bias")]
    for name in ("ln_1", "ln_2"):
        entries += _norm_rules(f"{prefix}h.{{i}}.{name}", f"layers/{name}")
    for head in _head(config, task):
        entries.append(Rule(f"{head}.weight", f"{head}/kernel", TRANSPOSE))
        entries += [Rule(f"{head}.bias", f"{head}/bias")] if _head_size(config, task)[1] else []
    if task == "CAUSAL_LM" and config.tie_word_embeddings:
        entries.append(Tied("lm_head.weight", "wte/embedding"))
    return tuple(entries)


def _norm_rules(hf: str, path: str) -> list[Entry]:
    return [Rule(f"{hf}.weight", f"{path}/scale"), Rule(f"{hf}.bias", f"{path}/bias")]
