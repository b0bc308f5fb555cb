# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the zoo: transformers' and ours, and how they are run and compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from llama_reference import QUICK, assert_close, flat

from jpeft import models
from jpeft.models import vit, whisper
from jpeft.models._families import LABELLED

SEQ = 13
#: Tokens of a decoder beside an encoder.
DECODER_SEQ = 7


def labels_of(task):
    """The size of a head in these tests."""
    return 5 if task in LABELLED else 2


def torch_model(config, task, classes, seed=0):
    """A transformers model whose every weight is random, norms and biases too."""
    torch.manual_seed(seed)
    hf = transformers.AutoConfig.for_model(**config, num_labels=labels_of(task))
    model = classes[task]._from_config(hf, attn_implementation="eager")
    if config["model_type"] == "t5" and not config.get("tie_word_embeddings", True):
        # transformers 5 ties a new T5 whatever its config says; what it reads from a checkpoint stays apart
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name or name.endswith("bias"):
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def batch(subject, seed=0):
    """Three rows: whole, padded right, padded left; and those of a decoder, padded likewise."""
    rng = np.random.default_rng(seed)
    inputs = {"pixel_values": _images, "input_features": _sounds}.get(subject.reads, _texts)(rng, subject)
    if subject.decodes:
        decoder = _rows(rng, DECODER_SEQ, subject)
        inputs |= {f"decoder_{name}": value for name, value in decoder.items()}
    return inputs


def _texts(rng, subject):
    return _rows(rng, SEQ, subject)


def _rows(rng, seq, subject):
    mask = np.ones((3, seq), int)
    mask[1, seq - 3 :] = 0
    mask[2, : seq // 3] = 0
    inputs = {"input_ids": np.where(mask, rng.integers(1, subject.vocab, (3, seq)), 0), "attention_mask": mask}
    if types := subject.config.get("type_vocab_size"):
        inputs["token_type_ids"] = rng.integers(0, types, (3, seq))
    return inputs


def _images(rng, subject):
    """Three images; of the second patches at the end are hidden, of the third one behind the class token."""
    config = vit.Config.from_hf(subject.config)
    mask = np.ones((3, 1 + config.grid[0] * config.grid[1]), int)
    mask[1, -2:] = mask[2, 1] = 0
    pixels = rng.standard_normal((3, config.num_channels, *config.image), np.float32)
    return {"pixel_values": pixels, "attention_mask": mask}


def _sounds(rng, subject):
    """Three sounds, which are never padded."""
    config = whisper.Config.from_hf(subject.config)
    return {"input_features": rng.standard_normal((3, config.num_mel_bins, config.frames), np.float32)}


def by_row(task):
    """Whether a task has one output for a row."""
    return task in ("SEQ_CLS", "IMAGE_CLS")


def seen(inputs, task):
    """Which of the outputs are at tokens."""
    if by_row(task):
        return np.ones(3, bool)
    name = "decoder_attention_mask" if "decoder_attention_mask" in inputs else "attention_mask"
    return inputs[name].astype(bool)


def torch_output(model, task, inputs):
    out = model(**{name: torch.tensor(value) for name, value in inputs.items()})
    if task == "QUESTION_ANS":
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.last_hidden_state if task == "FEATURE_EXTRACTION" else out.logits


def build(config, task, **options):
    """A model of ours whose every weight is random: drawn here, as compiling its first values takes long."""
    model = nnx.eval_shape(lambda: models.build(config, task, key=jax.random.key(0), **options))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)

    def draw(path, shape):
        values = 0.25 * rng.standard_normal(shape.shape, np.float32)
        return jnp.asarray(values + ("scale" in jax.tree_util.keystr(path)), shape.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _outputs(graphdef, state, inputs, key):
    return nnx.merge(graphdef, state)(**inputs, key=key)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _gradients(graphdef, state, inputs, weights, key):
    def loss(state):
        outputs = nnx.merge(graphdef, state)(**inputs, key=key)
        return jnp.sum(outputs * weights), outputs

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(state)
    return outputs, gradients


def outputs_of(model, key=None, **inputs):
    """What the model gives, compiled."""
    return np.asarray(_outputs(*nnx.split(model), inputs, key))


def gradients_of(model, weights, key=None, **inputs):
    """The outputs, and the gradients of their sum under `weights` with respect to every leaf."""
    outputs, gradients = _gradients(*nnx.split(model), inputs, weights, key)
    return np.asarray(outputs), flat(nnx.merge(nnx.graphdef(model), gradients))


def cotangent(shape, real, seed=1):
    """Fixed weights of a loss that is linear in the outputs at tokens."""
    weights = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / np.prod(shape[1:]) ** 0.5
    return weights * real.reshape(real.shape + (1,) * (len(shape) - real.ndim))


def check(theirs, task, inputs, folder, gradients=True):
    """Outputs, and gradients of every leaf, are those of the transformers model `theirs`, where tokens are."""
    theirs.save_pretrained(folder / "model")
    ours = models.load(folder / "model")
    assert ours.task == task
    real = seen(inputs, task)
    if ours.config.model_type == "deberta-v2" and task == "SEQ_CLS":
        real &= inputs["attention_mask"][:, 0] != 0  # transformers reads the first place, padding or not
    expected = torch_output(theirs, task, inputs)
    if not gradients:
        outputs = outputs_of(ours, **inputs)
        assert outputs.dtype == np.float32
        assert_close(outputs[real], expected.detach().numpy()[real])
        return
    weights = cotangent(expected.shape, real)
    (expected * torch.tensor(weights)).sum().backward()
    used = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    theirs.save_pretrained(folder / "gradients", state_dict=used)
    outputs, found = gradients_of(ours, weights, **inputs)
    assert_close(outputs[real], expected.detach().numpy()[real])
    for path, gradient in flat(models.load(folder / "gradients")).items():
        assert_close(found[path], gradient, path)
