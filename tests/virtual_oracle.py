# SPDX-License-Identifier: Apache-2.0
"""The methods with virtual tokens: the real peft's beside ours on the tiny models, and one model in NumPy."""

import functools
import warnings

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


def compare(family, method, config, names, position_ids=None, rows=slice(None)):
    """Asserts equal outputs at text tokens and equal gradients.

    Args:
      names: our leaf at the root -> (peft's parameters, function of them that gives ours).
      position_ids: what peft is told of them.
      rows: of the batch, those to compare.
    """
    model, task = real(family, config), peft_oracle.FAMILIES[family][1]
    own = dict(model.named_parameters())
    trained = {name: value for name, value in own.items() if value.requires_grad}
    graphdef, trainable, frozen = jpeft.partition(
        jpeft.adapt(peft_oracle.jax_model(family), method, key=jax.random.key(0))
    )
    wanted = {path: _theirs(path, names) for path in trainable}
    assert {name for found, _ in wanted.values() for name in found} == set(trained)
    given = {path: _ours(found, trained, back) for path, (found, back) in wanted.items()}
    assert {p: v.shape for p, v in given.items()} == {p: v.shape for p, v in trainable.items()}
    expected = _outputs(model, task, position_ids)
    virtual = expected.shape[1] - peft_oracle.IDS.shape[1] if expected.ndim == 3 else 0
    expected = expected[:, virtual:][rows]
    weights = torch.tensor(_weights(expected, task, rows))
    (expected * weights).sum().backward()

    def loss(trainable):
        out = jpeft.combine(graphdef, trainable, frozen)(peft_oracle.IDS, peft_oracle.MASK)[rows]
        return (out * weights.numpy()).sum(), out

    gradients, got = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(
        {p: jnp.asarray(v) for p, v in given.items()}
    )
    seen = np.abs(weights.numpy()) > 0
    assert subjects.error(np.asarray(got)[seen], expected.detach().numpy()[seen]) < TORCH
    for path, (found, back) in wanted.items():
        theirs = _ours(found, {name: value.grad for name, value in trained.items()}, back)
        assert subjects.error(gradients[path], theirs) < TORCH, path
    return jpeft.combine(graphdef, given, frozen), model


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
