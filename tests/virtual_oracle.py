# SPDX-License-Identifier: Apache-2.0
"""The methods with virtual tokens: the real peft's beside ours on the tiny models, and one model in NumPy."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_oracle
import subjects
import torch
from contracts.table import QUICK
from flax import nnx

import jpeft

#: A float32 forward and backward pass of three layers, the sums in another order, against torch's.
TORCH = 1e-5

#: (config, task) of real models.
SHAPES = {
    "bert-base-uncased": ({"model_type": "bert", "num_labels": 3}, "SEQ_CLS"),
    "llama-2-7b": (
        {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        "CAUSAL_LM",
    ),
}

#: Our names of the head's leaves -> peft's.
HEADS = {
    "classifier": "base_model.classifier.modules_to_save.default",
    "score": "base_model.score.modules_to_save.default",
    "qa_outputs": "base_model.qa_outputs.modules_to_save.default",
}


#: Our leaves -> (parameters of peft's encoder, function of them that gives ours): of a prompt; below, of the others.
PROMPT = {"prompt": (("embedding.weight",), lambda weight: weight)}


def transposed(weight):
    return weight.T


def both_directions(one, other):
    return np.stack([one.T, other.T])


def encoder_names(layers=0):
    """Our leaves -> parameters of peft's encoder."""
    names = {"embedding": (("embedding.weight",), lambda weight: weight)}
    for i in range(2 if layers else 3):
        names[f"linear_{i}_kernel"] = ((f"mlp_head.{2 * i}.weight",), transposed)
        names[f"linear_{i}_bias"] = ((f"mlp_head.{2 * i}.bias",), transposed)
    for i in range(layers):
        kinds = {"input": "weight_ih", "hidden": "weight_hh", "input_bias": "bias_ih", "hidden_bias": "bias_hh"}
        for ours, theirs in kinds.items():
            pair = (f"lstm_head.{theirs}_l{i}", f"lstm_head.{theirs}_l{i}_reverse")
            names[f"lstm_{i}_{ours}"] = (pair, both_directions)
    return names


_P_TUNING = {
    "num_tokens": "num_virtual_tokens",
    "hidden_size": "encoder_hidden_size",
    "num_layers": "encoder_num_layers",
}


def p_tuning_config(task, options, **more):
    given = {_P_TUNING[key]: value for key, value in options.items() if key in _P_TUNING}
    kind = options.get("reparam", "mlp").upper()
    return peft.PromptEncoderConfig(task_type=task, encoder_reparameterization_type=kind, **given, **more)


def prefix_names(family):
    """peft's table in ours: three layers, and as many key heads as the family has."""
    heads, d_head = {"bert": (4, 4), "qwen3": (2, 6)}.get(family.split()[0], (2, 4))
    return {"prefix": (("embedding.weight",), lambda weight: weight.reshape(3, 6, heads, d_head))}


def projected_names():
    names = {"embedding": (("embedding.weight",), lambda weight: weight)}
    for ours, theirs in (("down", "transform.0"), ("up", "transform.2")):
        names[f"{ours}_kernel"] = ((f"{theirs}.weight",), lambda weight: weight.T)
        names[f"{ours}_bias"] = ((f"{theirs}.bias",), lambda bias: bias)
    return names


def shapes(build):
    """What `build` would make, in shapes alone."""
    return nnx.eval_shape(build)


def run(model, *inputs, **options):
    """The model's outputs under jit."""
    graphdef, trainable, frozen = jpeft.partition(model)
    return np.asarray(_run(graphdef, trainable, frozen, inputs, options))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _run(graphdef, trainable, frozen, inputs, options):
    return jpeft.combine(graphdef, trainable, frozen)(*inputs, **options)


def real(family, config):
    """peft's model, with noise on what it trains."""
    torch.manual_seed(0)
    base = peft_oracle.torch_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


class Beside(NamedTuple):
    """jpeft's model and peft's, with the same numbers.

    Attributes:
      taken: what peft's parameters (`data`), or their gradients (`grad`), are in the shapes of jpeft's leaves.
    """

    model: Any
    other: Any
    taken: Callable[[str], dict[str, np.ndarray]]


def beside(family, method, config, names):
    """peft's model beside jpeft's, which is given its numbers; `names` as of `compare`."""
    other = real(family, config)
    trained = {name: value for name, value in other.named_parameters() if value.requires_grad}
    model = jpeft.adapt(peft_oracle.jax_model(family), method, key=jax.random.key(0))
    graphdef, trainable, frozen = jpeft.partition(model)
    wanted = {path: _theirs(path, names) for path in trainable}
    assert {name for found, _ in wanted.values() for name in found} == set(trained)

    def taken(attribute):
        values = {name: getattr(value, attribute) for name, value in trained.items()}
        return {path: _ours(found, values, back) for path, (found, back) in wanted.items()}

    given = taken("data")
    assert {p: v.shape for p, v in given.items()} == {p: v.shape for p, v in trainable.items()}
    return Beside(jpeft.combine(graphdef, {p: jnp.asarray(v) for p, v in given.items()}, frozen), other, taken)


def compare(family, method, config, names, position_ids=None, rows=slice(None)):
    """Asserts equal outputs at text tokens and equal gradients.

    Args:
      names: our leaf at the root -> (peft's parameters, function of them that gives ours).
      position_ids: what peft is told of them.
      rows: of the batch, those to compare.
    """
    task = peft_oracle.FAMILIES[family][1]
    adapted, model, taken = beside(family, method, config, names)
    graphdef, given, frozen = jpeft.partition(adapted)
    expected = _outputs(model, task, position_ids)
    virtual = expected.shape[1] - peft_oracle.IDS.shape[1] if expected.ndim == 3 else 0
    expected = expected[:, virtual:][rows]
    weights = torch.tensor(_weights(expected, task, rows))
    (expected * weights).sum().backward()

    def loss(trainable):
        out = jpeft.combine(graphdef, trainable, frozen)(peft_oracle.IDS, peft_oracle.MASK)[rows]
        return (out * weights.numpy()).sum(), out

    gradients, got = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(given)
    seen = np.abs(weights.numpy()) > 0
    assert subjects.error(np.asarray(got)[seen], expected.detach().numpy()[seen]) < TORCH
    for path, theirs in taken("grad").items():
        assert subjects.error(gradients[path], theirs) < TORCH, path
    return adapted, model


def _theirs(path, names):
    if "saved" in path:
        head, leaf = path.split("/")[0], path.split("/")[-1]
        name = f"{HEADS[head]}.{'weight' if leaf == 'kernel' else 'bias'}"
        return (name,), (lambda weight: weight.T)
    found, back = names[path.split("/")[-1]]
    return tuple(f"prompt_encoder.default.{name}" for name in found), back


def _ours(found, values, back):
    return np.array(back(*(values[name].detach().numpy() for name in found)))


def _outputs(model, task, position_ids):
    options = {} if position_ids is None else {"position_ids": torch.tensor(position_ids)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(input_ids=torch.tensor(peft_oracle.IDS), attention_mask=torch.tensor(peft_oracle.MASK), **options)
    return out.last_hidden_state if task == "FEATURE_EXTRACTION" else out.logits


def _weights(outputs, task, rows):
    weights = np.random.default_rng(2).standard_normal(outputs.shape).astype(np.float32)
    return weights * peft_oracle.MASK[rows][..., None] if weights.ndim == 3 else weights


def foreign64(flat, ids, prompt=None, prefix=None, layers=(0, 1)):
    """The contracts' foreign model in NumPy: `prompt` `[P, d]`, `prefix` `[P, 2 · layers, heads, d]`."""
    x = flat["embed/embedding"][ids]
    seq = x.shape[1]
    if prompt is not None:
        x = np.concatenate([np.broadcast_to(prompt, (len(x), *prompt.shape)), x], 1)
    for i in range(2):
        x = _foreign_block(
            {p: v[i] for p, v in flat.items() if p.startswith("blocks/")}, x, prefix if i in layers else None, i
        )
    return x[:, -seq:] @ flat["out/kernel"] + flat["out/bias"]


def _foreign_block(flat, x, prefix, i):
    h = _norm(x) * flat["blocks/norm/scale"]
    q, k, v = (np.einsum("bsd,dhe->bshe", h, flat[f"blocks/{n}/kernel"]) for n in ("query", "key", "value"))
    q, k, v = (y + flat[f"blocks/{n}/bias"] for y, n in zip((q, k, v), ("query", "key", "value"), strict=True))
    if prefix is not None:
        k, v = (
            np.concatenate([np.broadcast_to(prefix[:, at], (len(y), *prefix[:, at].shape)), y], 1)
            for y, at in ((k, 2 * i), (v, 2 * i + 1))
        )
    scores = np.exp(np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1]))
    offset = k.shape[1] - q.shape[1]
    scores = scores * (np.arange(k.shape[1])[None] <= np.arange(q.shape[1])[:, None] + offset)
    y = np.einsum("bhqk,bkhe->bqhe", scores / scores.sum(-1, keepdims=True), v)
    x = x + np.einsum("bqhe,hed->bqd", y, flat["blocks/merge_heads/kernel"]) + flat["blocks/merge_heads/bias"]
    h = np.tanh(x @ flat["blocks/up/kernel"] + flat["blocks/up/bias"])
    return _norm(x + h @ flat["blocks/down/kernel"] + flat["blocks/down/bias"]) * flat["blocks/mlp_residual/norm/scale"]


def _norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
