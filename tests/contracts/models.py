# SPDX-License-Identifier: Apache-2.0
"""The models of the contracts: one of each kind, as small as they get."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jpeft
from jpeft import seams

VOCAB = 11


class Foreign(nnx.Module):
    """A causal language model of somebody's own, with jpeft's seams in it: stacked blocks, run by `jax.lax.scan`."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, 8, rngs=rngs)
        self.input = seams.InputEmbedding(8, "decoder", causal=True)
        self.blocks = nnx.vmap(ForeignBlock)(rngs.split(2))
        self.out = nnx.Linear(8, VOCAB, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        e, _, mask, _ = self.input(self.embed(ids), jnp.arange(ids.shape[1])[None], None, None)
        x = jax.lax.scan(lambda x, block: (block(x, mask), None), e, self.blocks)[0]
        return self.out(x[:, -ids.shape[1] :])


class ForeignBlock(nnx.Module):
    """Its block."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = ForeignNorm()
        self.query = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.key = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.value = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.keys_values = seams.KeyValues(8, 2, 4)
        self.merge_heads = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.attention_residual = seams.Residual(8, "attention")
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.mlp_residual = seams.Residual(8, "mlp", ForeignNorm())

    def __call__(self, x: jax.Array, mask: Any) -> jax.Array:
        h = self.norm(x)
        k, v, mask = self.keys_values(self.key(h), self.value(h), mask, h)
        x = self.attention_residual(self.merge_heads(foreign_attention(self.query(h), k, v, mask)), x)
        return self.mlp_residual(self.down(jnp.tanh(self.up(x))), x)


class ForeignNorm(nnx.Module):
    """Its norm, in the input's own precision: NNX's computes in float32, and this model is tested in float64 too."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(8))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.scale[None, None]


def foreign_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: Any) -> jax.Array:
    """Its attention, in the input's own precision for the same reason; keys beyond the queries come first."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    seq, keys = scores.shape[-2:]
    seen = (jnp.arange(keys)[None] <= jnp.arange(seq)[:, None] + keys - seq)[None, None]
    seen = seen if mask is None else seen & (mask != 0)[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


BERT = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}


T5 = {
    "model_type": "t5",
    "vocab_size": VOCAB,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 6,
    "dropout_rate": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """One kind of model.

    Attributes:
      build: makes it.
      targets: what is adapted; `fewer` is a part of it.
      causal: whether a token's output depends on earlier tokens alone.
      masks: whether it takes an attention mask and positions.
      scans: whether jpeft's own scan runs it, with `remat` and `unroll`.
      decodes: whether a decoder stands beside an encoder; both are given the same tokens.
      caches: whether what it has read can be kept in a cache.
      packs: whether a row may hold several examples.
    """

    build: Callable[[], Any]
    targets: tuple[str, ...]
    fewer: tuple[str, ...]
    causal: bool = True
    masks: bool = True
    scans: bool = True
    decodes: bool = False
    caches: bool = False
    packs: bool = False

    def run(self, model: Any, ids: Any, mask: Any = None, positions: Any = None, segments: Any = None) -> jax.Array:
        """Its outputs, one row per token; of packed rows, with room for four examples."""
        if self.decodes:
            decoder = {"decoder_input_ids": ids, "decoder_attention_mask": mask, "decoder_positions": positions}
            with jpeft.max_segments(4):
                packed = {"segment_ids": segments, "decoder_segment_ids": segments}
                return model(ids, mask, positions=positions, **decoder, **packed)
        if segments is not None:
            with jpeft.max_segments(4):
                return model(ids, mask, segment_ids=segments)
        return model(ids, mask, positions=positions) if self.masks else model(ids)


def _zoo(config: Mapping[str, Any], task: str) -> Callable[[], Any]:
    return lambda: jpeft.models.build(config, task, key=jax.random.key(1))


TIED = LLAMA | {"tie_word_embeddings": True}
MODELS = {
    "foreign": Model(lambda: Foreign(nnx.Rngs(0)), ("query", "up", "embed"), ("up",), masks=False, scans=False),
    "bert": Model(
        _zoo(BERT, "TOKEN_CLS"), ("query", "output.dense", "word_embeddings"), ("query",), causal=False, packs=True
    ),
    "llama": Model(_zoo(LLAMA, "CAUSAL_LM"), ("q_proj", "down_proj", "lm_head"), ("q_proj",), caches=True, packs=True),
    "t5": Model(
        _zoo(T5, "SEQ_2_SEQ_LM"), ("q", "wo", "shared"), ("q",), causal=False, decodes=True, caches=True, packs=True
    ),
    "quantized llama": Model(
        lambda: jpeft.quantize(_zoo(LLAMA, "CAUSAL_LM")(), "nf4_double"),
        ("q_proj", "down_proj", "lm_head"),
        ("q_proj",),
        caches=True,
        packs=True,
    ),
    "tied llama": Model(_zoo(TIED, "CAUSAL_LM"), ("v_proj", "gate_proj", "embed_tokens"), ("v_proj",), caches=True),
}

#: The same, wide enough that a mesh divides them. No number of theirs is another's, so that a program's arrays tell.
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40}
WIDER = WIDE | {"hidden_size": 64, "intermediate_size": 192}  # whole blocks of 64 in every column
WIDE_T5 = T5 | {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "vocab_size": 40}
ON_MESHES = {
    "wide bert": dataclasses.replace(MODELS["bert"], build=_zoo(BERT | WIDE, "TOKEN_CLS")),
    "wide llama": dataclasses.replace(MODELS["llama"], build=_zoo(LLAMA | WIDE, "CAUSAL_LM")),
    "wide t5": dataclasses.replace(MODELS["t5"], build=_zoo(WIDE_T5, "SEQ_2_SEQ_LM")),
    "wide quantized llama": dataclasses.replace(
        MODELS["quantized llama"],
        build=lambda: jpeft.quantize(_zoo(LLAMA | WIDER, "CAUSAL_LM")(), "nf4"),
    ),
}

#: Every one by name.
KNOWN = MODELS | ON_MESHES
