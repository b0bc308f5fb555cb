# SPDX-License-Identifier: Apache-2.0
"""The Llama family against transformers: every config attribute, logits and gradients; and a real pretrained model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from llama_reference import (
    AUTO,
    BY_TASK,
    CONFIGS,
    SEQ,
    TINY,
    assert_close,
    batch,
    build,
    flat,
    logits_of,
    meaning,
    run,
    torch_model,
    torch_output,
)

from jpeft import models
from jpeft.models import llama

#: Share of the logits' norm: bfloat16 keeps 8 bits, 2^-8 per rounding, over some thirty roundings in a row.
BF16_SHARE = 0.03


def check(config, task, folder):
    """Logits and gradients of every leaf and of inputs_embeds are those of transformers, where tokens are real."""
    theirs = torch_model(config, task)
    theirs.save_pretrained(folder / "model")
    ours = models.load(folder / "model")
    assert ours.task == task
    ids, mask = batch()
    real = np.ones(3, bool) if task == "SEQ_CLS" else mask.astype(bool)

    expected = torch_output(theirs, task, mask, input_ids=torch.tensor(ids))
    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32) / expected[0].numel() ** 0.5
    weights *= real.reshape(real.shape + (1,) * (weights.ndim - real.ndim))
    (expected * torch.tensor(weights)).sum().backward()
    theirs.save_pretrained(folder / "gradients", state_dict={n: p.grad for n, p in theirs.named_parameters()})

    logits, gradients, _ = run(ours, weights, input_ids=ids, attention_mask=mask)
    assert logits.dtype == np.float32
    assert_close(logits[real], expected.detach().numpy()[real])
    for path, gradient in flat(models.load(folder / "gradients")).items():
        assert_close(gradients[path], gradient, path)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_transformers(name, tmp_path):
    check(CONFIGS[name], "CAUSAL_LM", tmp_path)


@pytest.mark.parametrize("name", [name for name in BY_TASK if "CAUSAL" not in name])
def test_the_heads_are_transformers(name, tmp_path):
    config, task = BY_TASK[name]
    check(config, task, tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen3, windows"])
def test_gradients_of_inputs_embeds_are_transformers(name, tmp_path):
    theirs = torch_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ids, mask = batch()
    embeds = theirs.get_input_embeddings().weight.detach()[torch.tensor(ids)].requires_grad_()
    weights = np.random.default_rng(1).standard_normal((3, SEQ, TINY["vocab_size"])) / SEQ * mask[..., None]
    weights = weights.astype(np.float32)
    expected = torch_output(theirs, "CAUSAL_LM", mask, inputs_embeds=embeds)
    (expected * torch.tensor(weights)).sum().backward()
    inputs = {"inputs_embeds": embeds.detach().numpy(), "attention_mask": mask}
    logits, _, gradient = run(models.load(tmp_path), weights, **inputs)
    assert_close(logits[mask == 1], expected.detach().numpy()[mask == 1])
    assert_close(gradient, embeds.grad.numpy())


def test_positions_are_transformers(tmp_path):
    theirs = torch_model(TINY)
    theirs.save_pretrained(tmp_path)
    ids, _ = batch()
    positions = np.random.default_rng(0).integers(0, 40, (3, SEQ))
    expected = theirs(torch.tensor(ids), position_ids=torch.tensor(positions)).logits.detach().numpy()
    assert_close(logits_of(models.load(tmp_path), ids, positions=positions), expected)


def test_without_a_padding_token_the_last_token_decides(tmp_path):
    theirs = torch_model(TINY | {"pad_token_id": None}, "SEQ_CLS")
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    ids, mask = batch()
    expected = theirs(torch.tensor(ids[:1])).logits.detach().numpy()
    assert_close(logits_of(ours, ids[:1]), expected)
    shorter = theirs(torch.tensor(ids[1:2, :8])).logits.detach().numpy()
    assert_close(logits_of(ours, ids, mask)[1:2], shorter)


@pytest.mark.parametrize("name", ["llama", "qwen2, windows", "qwen3", "rope yarn"])
def test_bfloat16_stays_near_float32(name, tmp_path):
    theirs = torch_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ids, mask = batch()
    expected = torch_output(theirs, "CAUSAL_LM", mask, input_ids=torch.tensor(ids)).detach().numpy()[mask == 1]
    ours = models.load(tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in flat(ours).values()} == {jnp.dtype(jnp.bfloat16)}
    logits = logits_of(ours, ids, mask)
    assert logits.dtype == np.float32
    error = logits[mask == 1] - expected
    assert np.linalg.norm(error) < BF16_SHARE * np.linalg.norm(expected)


SAVED = [("llama", task) for task in AUTO] + [("mistral", "QUESTION_ANS"), ("qwen2, layer_types", "SEQ_CLS")]
SAVED += [(name, "CAUSAL_LM") for name in ("mistral", "qwen2, windows", "qwen3, windows", "rope llama3", "mlp_bias")]


@pytest.mark.parametrize("name, task", SAVED)
def test_transformers_loads_what_is_saved(name, task, tmp_path):
    ours = build(CONFIGS[name], task)
    models.save(ours, tmp_path / "ours")
    theirs, info = AUTO[task].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == json.loads((tmp_path / "ours/config.json").read_text())["architectures"][0]
    assert models.load(tmp_path / "ours").config == ours.config
    theirs.save_pretrained(tmp_path / "theirs")
    again = models.load(tmp_path / "theirs")
    assert meaning(again.config) == meaning(ours.config)
    for path, leaf in flat(again).items():
        np.testing.assert_array_equal(leaf, flat(ours)[path])


@pytest.mark.parametrize("saved", AUTO)
def test_any_task_starts_from_any_checkpoint(saved, tmp_path):
    ours = build(task=saved)
    models.save(ours, tmp_path)
    backbone = {path: leaf for path, leaf in flat(ours).items() if not path.startswith(llama.HEADS)}
    for task in AUTO:
        other = flat(models.load(tmp_path, task=task))
        assert {path for path in other if not path.startswith(llama.HEADS)} == set(backbone)
        for path, leaf in backbone.items():
            np.testing.assert_array_equal(other[path], leaf)


# A real model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(name="stories")
def _stories(data):
    return data / "models" / "stories260K"


def test_stories260k_gives_its_logits(stories):
    fixture = np.load(stories / "fixture_logits.npz")
    logits = logits_of(models.load(stories), fixture["input_ids"])
    np.testing.assert_allclose(logits, fixture["logits"], atol=1e-4, rtol=0)  # logits reach 20


def test_stories260k_tells_its_story(stories):
    model = models.load(stories)
    expected = json.loads((stories / "expected.json").read_text())
    story = expected["greedy_ids"]
    tokens = np.zeros((1, len(story)), int)
    tokens[0, : len(expected["prompt_ids"])] = expected["prompt_ids"]
    graphdef, state = nnx.split(model)

    @jax.jit
    def following(tokens, length):
        return nnx.merge(graphdef, state)(tokens)[0, length - 1].argmax()

    for length in range(len(expected["prompt_ids"]), len(story)):
        tokens[0, length] = following(tokens, length)
    assert tokens[0].tolist() == story
