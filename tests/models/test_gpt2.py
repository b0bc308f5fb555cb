# SPDX-License-Identifier: Apache-2.0
"""What GPT-2 has of its own: sizes, what LoRA trains, first values, published checkpoints, causality, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from llama_reference import assert_close, flat
from safetensors.torch import load_file, save_file
from zoo_reference import SEQ, batch, build, outputs_of, torch_model
from zoo_subjects import GPT2

import jpeft
from jpeft import models
from jpeft.models import CheckpointError, gpt2

TINY = dict(GPT2.config)


def test_parameters_of_the_presets():
    counts = {name: models.num_parameters(config, "CAUSAL_LM") for name, config in gpt2.PRESETS.items()}
    assert counts == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }


@pytest.mark.parametrize("rank", [4, 8, 16, 32, 64])
def test_lora_on_every_projection_and_the_head(rank):
    """Per layer and rank 768 + 2304, 768 + 768, 768 + 3072 and 3072 + 768; and 768 + 50257 of the tied head."""
    method = jpeft.LoRA(rank=rank, targets=["c_attn", "c_proj", "c_fc", "wte"])

    def trainable():
        model = models.build(gpt2.PRESETS["gpt2"], "CAUSAL_LM", key=jax.random.key(0))
        return jpeft.partition(jpeft.adapt(model, method, key=jax.random.key(1)))[1]

    assert sum(leaf.size for leaf in jax.eval_shape(trainable).values()) == 793_924 * rank // 4


def test_the_default_targets_are_pefts():
    adapted = jpeft.adapt(build(TINY, "CAUSAL_LM"), jpeft.LoRA(rank=2), key=jax.random.key(0))
    assert {path.partition("/adapters")[0] for path in jpeft.partition(adapted)[1]} == {"layers/attn/c_attn"}


def test_token_types_positions_and_embeds_are_transformers(tmp_path):
    theirs = torch_model(TINY, "FEATURE_EXTRACTION", GPT2.classes)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((2, SEQ, TINY["n_embd"])).astype(np.float32)
    positions = rng.integers(0, TINY["n_positions"], (2, SEQ))
    types = rng.integers(0, 3, (2, SEQ))
    expected = theirs(
        inputs_embeds=torch.tensor(embeds), position_ids=torch.tensor(positions), token_type_ids=torch.tensor(types)
    ).last_hidden_state.detach()
    ours = models.load(tmp_path)
    found = outputs_of(ours, inputs_embeds=embeds, positions=positions, token_type_ids=types)
    assert_close(found, expected.numpy())


def test_a_token_sees_no_later_one():
    model, ids = build(TINY, "CAUSAL_LM"), batch(GPT2)["input_ids"]
    later = ids.copy()
    later[:, 7:] = (later[:, 7:] + 5) % TINY["vocab_size"]
    np.testing.assert_array_equal(outputs_of(model, input_ids=ids)[:, :7], outputs_of(model, input_ids=later)[:, :7])


def test_packed_segments_are_separate_runs():
    model, ids = build(TINY, "CAUSAL_LM"), batch(GPT2)["input_ids"]
    packed = outputs_of(model, input_ids=ids, segment_ids=np.array([[1] * 5 + [2] * 8] * 3))
    assert_close(packed[:, :5], outputs_of(model, input_ids=ids[:, :5]))
    assert_close(packed[:, 5:], outputs_of(model, input_ids=ids[:, 5:]))


def test_without_a_padding_token_the_last_token_of_the_mask_decides(tmp_path):
    theirs = torch_model(TINY | {"pad_token_id": None}, "SEQ_CLS", GPT2.classes)
    theirs.save_pretrained(tmp_path)
    ours, inputs = models.load(tmp_path), batch(GPT2)
    expected = theirs(torch.tensor(inputs["input_ids"][1:2, : SEQ - 3])).logits.detach().numpy()
    assert_close(outputs_of(ours, **inputs)[1:2], expected)


def test_published_checkpoints_are_read(tmp_path):
    """Without a prefix, with causal masks among the weights, and with a config.json as old as they are."""
    ours = build(TINY | {"bos_token_id": 50256, "eos_token_id": 50256}, "CAUSAL_LM")
    models.save(ours, tmp_path)
    weights = {name.removeprefix("transformer."): w for name, w in load_file(tmp_path / "model.safetensors").items()}
    for i in range(2):
        weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 19, 19), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for path, leaf in flat(models.load(tmp_path)).items():
        np.testing.assert_array_equal(leaf, flat(ours)[path])
    save_file(weights | {"h.2.attn.c_attn.bias": torch.ones(72)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no place for: .*h.2.attn.c_attn.bias"):
        models.load(tmp_path)


def test_published_configs_are_read():
    """gpt2-medium's own config.json."""
    hf = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24,
        "n_positions": 1024, "n_special": 0, "predict_special_tokens": True, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }  # fmt: skip
    assert gpt2.Config.from_hf(hf) == gpt2.PRESETS["gpt2-medium"]


@pytest.mark.slow
def test_first_values_are_transformers():
    config = TINY | {"n_embd": 240, "n_inner": 960, "n_layer": 8, "vocab_size": 500, "initializer_range": 0.05}
    for path, leaf in flat(models.build(config, "SEQ_CLS", key=jax.random.key(0))).items():
        if path.endswith("bias"):
            assert not np.any(leaf), path
        elif path.endswith("scale"):
            assert np.all(leaf == 1), path
        elif leaf.size > 5000:
            assert np.std(leaf) == pytest.approx(0.05 / (4 if "c_proj" in path else 1), rel=0.05), path


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"rotary_dim": 8}, "rotary_dim"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"activation_function": "cube"}, "activation_function must be one of .*gelu.*; got 'cube'"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head, got 24 and 5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(attributes, message):
    with pytest.raises(ValueError, match=message):
        models.build(TINY | attributes, "CAUSAL_LM", key=jax.random.key(0))


def test_wrong_calls_are_refused():
    model, ids = build(TINY, "SEQ_CLS"), jnp.asarray(batch(GPT2)["input_ids"])
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="20 tokens are more than the 19 positions"):
        model(jnp.zeros((1, 20), int))
    with pytest.raises(ValueError, match="SEQ_CLS gives one output per row"):
        model(ids, segment_ids=ids)
