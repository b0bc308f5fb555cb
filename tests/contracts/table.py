# SPDX-License-Identifier: Apache-2.0
"""The subjects of the contracts: every method times every kind of model.

A new method joins by one line in `METHODS`, a new family by one in `MODELS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import subjects
from flax import nnx

import jpeft
from jpeft import seams

KEY = jax.random.key(0)
VOCAB = 11


class Foreign(nnx.Module):
    """A causal language model of somebody's own, with jpeft's seams in it: stacked blocks, run by `jax.lax.scan`."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, 8, rngs=rngs)
        self.input = seams.InputEmbedding(8, "decoder", causal=True)
        self.blocks = nnx.vmap(ForeignBlock)(rngs.split(2))
        self.out = nnx.Linear(8, VOCAB, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        e, *_ = self.input(self.embed(ids), jnp.arange(ids.shape[1])[None], None, None)
        x = jax.lax.scan(lambda x, block: (block(x), None), e, self.blocks)[0]
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

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(x)
        k, v, mask = self.keys_values(self.key(h), self.value(h), None, h)
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


@dataclasses.dataclass(frozen=True)
class Model:
    """One kind of model.

    Attributes:
      build: makes it.
      targets: what is adapted; `fewer` is a part of it.
      causal: whether a token's output depends on earlier tokens alone.
      masks: whether it takes an attention mask and positions.
      scans: whether jpeft's own scan runs it, with `remat` and `unroll`.
    """

    build: Callable[[], Any]
    targets: tuple[str, ...]
    fewer: tuple[str, ...]
    causal: bool = True
    masks: bool = True
    scans: bool = True

    def run(self, model: Any, ids: Any, mask: Any = None, positions: Any = None) -> jax.Array:
        """Its outputs, one row per token."""
        return model(ids, mask, positions=positions) if self.masks else model(ids)


def _zoo(config: Mapping[str, Any], task: str) -> Callable[[], Any]:
    return lambda: jpeft.models.build(config, task, key=jax.random.key(1))


TIED = LLAMA | {"tie_word_embeddings": True}
MODELS = {
    "foreign": Model(lambda: Foreign(nnx.Rngs(0)), ("query", "up", "embed"), ("up",), masks=False, scans=False),
    "bert": Model(_zoo(BERT, "TOKEN_CLS"), ("query", "output.dense", "word_embeddings"), ("query",), causal=False),
    "llama": Model(_zoo(LLAMA, "CAUSAL_LM"), ("q_proj", "down_proj", "lm_head"), ("q_proj",)),
    "tied llama": Model(_zoo(TIED, "CAUSAL_LM"), ("v_proj", "gate_proj", "embed_tokens"), ("v_proj",)),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One method.

    Attributes:
      make: the method, from the targets.
      targeted: whether it heeds them.
      identity: whether it starts as the base.
      merges: whether it has a merged form.
      on: the models on which it has a meaning; the others refuse it.
      fast: the models on which it is tested in the fast lane.
    """

    make: Callable[[Any], Any]
    targeted: bool = True
    identity: bool = True
    merges: bool = True
    on: tuple[str, ...] = ("foreign", "bert", "llama")
    fast: tuple[str, ...] = ("foreign", "bert")


EVERY = ("foreign", "bert", "llama", "tied llama")

#: Methods by a name for the test. A new method needs one line.
METHODS: dict[str, Line] = {
    "lora": Line(lambda targets: jpeft.LoRA(rank=2, alpha=3.0, targets=targets), on=EVERY, fast=EVERY),
    "lora of several ranks, with biases and dropout": Line(
        lambda targets: jpeft.LoRA(
            rank=3,
            alpha=2.0,
            targets=targets,
            rslora=True,
            bias="lora_only",
            dropout=0.3,
            rank_pattern={r".*\.1\..*": 1},
        ),
        fast=("foreign", "bert", "llama"),
    ),
    "lora from the kernel": Line(
        lambda targets: jpeft.LoRA(rank=2, alpha=3.0, targets=targets, init="pissa"),
        on=EVERY,
        fast=("foreign", "llama"),
    ),
    "prompt tuning": Line(
        lambda targets: jpeft.PromptTuning(num_tokens=3), targeted=False, identity=False, merges=False
    ),
    "prompt tuning from the vocabulary": Line(
        lambda targets: jpeft.PromptTuning(num_tokens=5, init="vocabulary"),
        targeted=False,
        identity=False,
        merges=False,
        fast=("llama",),
    ),
    "p-tuning": Line(
        lambda targets: jpeft.PTuning(num_tokens=3, hidden_size=7),  # with no ReLU's kink near
        targeted=False,
        identity=False,
        merges=False,
        fast=("bert",),
    ),
    "p-tuning by lstm, with dropout": Line(
        lambda targets: jpeft.PTuning(num_tokens=3, hidden_size=5, reparam="lstm", dropout=0.3),
        targeted=False,
        identity=False,
        merges=False,
        fast=("foreign",),
    ),
    "prefix tuning": Line(
        lambda targets: jpeft.PrefixTuning(num_tokens=3),
        targeted=False,
        identity=False,
        merges=False,
        fast=("foreign", "bert", "llama"),
    ),
    "prefix tuning by a projection, in one layer, positions shifted": Line(
        lambda targets: jpeft.PrefixTuning(
            num_tokens=3, projection=True, hidden_size=5, layers=[1], shift_positions=True
        ),
        targeted=False,
        identity=False,
        merges=False,
        fast=("bert",),
    ),
    "gated prefix tuning": Line(
        lambda targets: jpeft.PrefixTuning(num_tokens=3, gate=True),
        targeted=False,
        identity=False,
        merges=False,
        on=("bert",),
        fast=("bert",),
    ),
}

#: The compiler's quickest way: there is much to compile here, and little to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """One method on one model."""

    method: str
    model: str

    @property
    def row(self) -> Model:
        return MODELS[self.model]

    @property
    def line(self) -> Line:
        return METHODS[self.method]

    @property
    def base(self) -> Any:
        """The plain model; not to be changed."""
        return _base(self.model)

    @property
    def filled(self) -> Any:
        """The adapted model with numbers in every trained leaf; not to be changed."""
        return _filled(self)

    def fresh(self, key: jax.Array = KEY, targets: Any = None, base: Any = None) -> Any:
        """The adapted model at its start."""
        method = self.line.make(targets or self.row.targets)
        return jpeft.adapt(self.base if base is None else base, method, key=key)

    def run(self, model: Any, ids: Any, mask: Any = None, positions: Any = None) -> np.ndarray:
        """Outputs under jit, as float32."""
        graphdef, trainable, frozen = jpeft.partition(model)
        return np.asarray(_run(graphdef, self.model, trainable, frozen, ids, mask, positions), np.float32)

    def loss(self, graphdef: jpeft.GraphDef) -> Callable[..., jax.Array]:
        """(trainable, frozen, ids, key) -> a loss with every output in it, under dropout where the method has any."""

        def loss(trainable: Any, frozen: Any, ids: Any, key: jax.Array) -> jax.Array:
            with jpeft.dropout_key(key):
                out = self.row.run(jpeft.combine(graphdef, trainable, frozen), ids)
            weights = np.random.default_rng(5).standard_normal(out.shape).astype(out.dtype)
            return (weights * jnp.tanh(out)).sum()

        return loss

    def step(self, model: Any, ids: Any, key: jax.Array) -> Any:
        """Loss and gradients of `model` under jit."""
        graphdef, trainable, frozen = jpeft.partition(model)
        return _step(self, graphdef, trainable, frozen, ids, key)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _run(graphdef, name, trainable, frozen, ids, mask, positions):
    return MODELS[name].run(jpeft.combine(graphdef, trainable, frozen), ids, mask, positions)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _step(case, graphdef, trainable, frozen, ids, key):
    return jax.value_and_grad(case.loss(graphdef))(trainable, frozen, ids, key)


@functools.cache
def _base(model: str) -> Any:
    return MODELS[model].build()


@functools.cache
def _filled(case: Case) -> Any:
    return subjects.fill(case.fresh(), scale=0.2)


CASES = [Case(method, model) for method, line in METHODS.items() for model in line.on]
IDS = np.random.default_rng(0).integers(0, VOCAB, (3, 6))
