# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the Llama family: transformers' and ours, and how they are run and compared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from jpeft import models

#: float32 sums of some hundred terms of unit size, in two orders of summation.
ATOL = 1e-5
SEQ = 13

TINY = {
    "model_type": "llama", "vocab_size": 59, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MISTRAL = TINY | {"model_type": "mistral"}
QWEN2 = TINY | {"model_type": "qwen2"}
QWEN3 = TINY | {"model_type": "qwen3", "head_dim": 8}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4}


def rope(kind, theta=10000.0, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

#: Every attribute that changes what a model computes, varied.
CONFIGS = {
    "llama": TINY,
    "own key heads": TINY | {"num_key_value_heads": 4},
    "one key head": TINY | {"num_key_value_heads": 1, "num_hidden_layers": 2},
    "attention_bias": TINY | {"attention_bias": True},
    "mlp_bias": TINY | {"mlp_bias": True},
    "head_dim": TINY | {"head_dim": 10},
    "tied": TINY | {"tie_word_embeddings": True},
    "rms_norm_eps": TINY | {"rms_norm_eps": 0.5},
    "gelu": TINY | {"hidden_act": "gelu"},
    "gelu_pytorch_tanh": TINY | {"hidden_act": "gelu_pytorch_tanh"},
    "relu": TINY | {"hidden_act": "relu"},
    "rope_theta": TINY | rope("default", theta=50.0),
    "rope linear": TINY | rope("linear", factor=3.0),
    "rope dynamic": TINY | rope("dynamic", factor=2.0) | {"max_position_embeddings": 8},
    "rope dynamic, short": TINY | rope("dynamic", factor=2.0),
    "rope llama3": TINY | rope("llama3", **LLAMA3),
    "rope yarn": TINY | rope("yarn", **YARN),
    "rope yarn, betas": TINY | rope("yarn", theta=100.0, beta_fast=2.0, beta_slow=0.5, truncate=False, **YARN),
    "rope yarn, factor": TINY | rope("yarn", attention_factor=1.3, **YARN),
    "rope yarn, mscale": TINY | rope("yarn", mscale=0.7, mscale_all_dim=0.4, **YARN),
    "mistral": MISTRAL | {"sliding_window": 4},
    "mistral, no window": MISTRAL | {"sliding_window": None, "head_dim": 10},
    "qwen2": QWEN2,
    "qwen2, windows": QWEN2 | WINDOWED | {"max_window_layers": 1},
    "qwen2, all windows": QWEN2 | WINDOWED | {"max_window_layers": 0, "tie_word_embeddings": True},
    "qwen2, layer_types": QWEN2 | WINDOWED
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen3": QWEN3,
    "qwen3, bias": QWEN3 | {"attention_bias": True, "rms_norm_eps": 0.1},
    "qwen3, windows": QWEN3 | WINDOWED | {"max_window_layers": 2, "tie_word_embeddings": True},
}  # fmt: skip
AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
BY_TASK = {f"{base['model_type']}, {task}": (base, task) for base in (TINY, MISTRAL, QWEN2, QWEN3) for task in AUTO}


def torch_model(config, task="CAUSAL_LM", seed=1):
    """A transformers model whose every weight is random, norms and biases too.

    With seed 0 and one key head roundings are amplified: there float32 torch is 4e-6 off float64 in a gradient of size
    1, and two float32 programs can be 1e-5 apart.
    """
    torch.manual_seed(seed)
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    kind = transformers.AutoConfig.for_model(**config, num_labels=5 if task != "QUESTION_ANS" else 2)
    model = AUTO[task].from_config(kind, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def batch(seed=0):
    """Three rows: whole, padded right, padded left."""
    rng = np.random.default_rng(seed)
    mask = np.ones((3, SEQ), int)
    mask[1, 8:] = 0
    mask[2, :4] = 0
    return np.where(mask, rng.integers(3, TINY["vocab_size"], (3, SEQ)), TINY["pad_token_id"]), mask


def build(config=TINY, task="CAUSAL_LM", **options):
    """A model of ours whose every weight is random."""
    model = models.build(config, task, key=jax.random.key(0), **options)
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    noisy = [(leaf + n).astype(leaf.dtype) for leaf, n in zip(leaves, noise, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, noisy))


def torch_output(model, task, mask, **inputs):
    out = model(attention_mask=torch.tensor(mask), use_cache=False, **inputs)
    if task == "QUESTION_ANS":
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.last_hidden_state if task == "FEATURE_EXTRACTION" else out.logits


def flat(model):
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


#: Compiling is what these tests spend their time on.
QUICK = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _logits_and_gradients(graphdef, state, inputs, weights):
    embeds = inputs.pop("inputs_embeds", None)

    def loss(state, embeds):
        logits = nnx.merge(graphdef, state)(**inputs, inputs_embeds=embeds)
        return jnp.sum(logits * weights), logits

    (_, logits), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, embeds)
    return logits, gradients


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _logits(graphdef, state, inputs):
    return nnx.merge(graphdef, state)(**inputs)


def run(model, weights, **inputs):
    """The logits, and the gradients of their sum under `weights` with respect to the leaves and `inputs_embeds`."""
    logits, (leaves, embeds) = _logits_and_gradients(*nnx.split(model), inputs, weights)
    return np.asarray(logits), flat(nnx.merge(nnx.graphdef(model), leaves)), embeds


def logits_of(model, input_ids=None, attention_mask=None, **inputs):
    """The logits alone."""
    return np.asarray(_logits(*nnx.split(model), inputs | {"input_ids": input_ids, "attention_mask": attention_mask}))


def assert_close(found, expected, path=""):
    """Within ATOL at unit scale: of the largest entry where that is above 1."""
    np.testing.assert_allclose(found, expected, atol=ATOL * max(1.0, np.abs(expected).max()), rtol=0, err_msg=path)


def meaning(config):
    """A config with what it says of head size and windows in place of how it says it."""
    how = {"head_dim": config.d_head, "layer_types": None, "use_sliding_window": False, "sliding_window": None}
    return dataclasses.replace(config, **how, max_window_layers=28), config.windows
