# SPDX-License-Identifier: Apache-2.0
"""Gemma's own, and Phi-3's: configs in both layouts, sizes, packed rows, causality, and what is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from llama_reference import assert_close
from zoo_reference import SEQ, batch, build, outputs_of, torch_model
from zoo_subjects import GEMMA2, GEMMA3, PHI3

import jpeft
from jpeft import models
from jpeft.models import _families, gemma, phi3

DECODERS = {"gemma2": GEMMA2, "gemma3": GEMMA3, "phi3": PHI3}
KINDS = [("gemma2", "base"), ("gemma3", "both ropes"), ("phi3", "part of a head")]


def config_of(name, variant):
    return {**DECODERS[name].config, **DECODERS[name].variants[variant]}


@pytest.mark.parametrize("name, variant", KINDS)
def test_packed_segments_are_separate_runs(name, variant):
    model = build(config_of(name, variant), "CAUSAL_LM")
    ids = batch(DECODERS[name])["input_ids"]
    segments = np.array([[1] * 5 + [2] * 8] * 3)
    packed = outputs_of(model, input_ids=ids, segment_ids=segments)
    assert_close(packed[:, :5], outputs_of(model, input_ids=ids[:, :5]))
    assert_close(packed[:, 5:], outputs_of(model, input_ids=ids[:, 5:]))


@pytest.mark.parametrize("name, variant", KINDS)
def test_a_token_sees_no_later_one(name, variant):
    model = build(config_of(name, variant), "CAUSAL_LM")
    ids = batch(DECODERS[name])["input_ids"]
    later = ids.copy()
    later[:, 7:] = (later[:, 7:] + 5) % 53
    one, other = (outputs_of(model, input_ids=found) for found in (ids, later))
    np.testing.assert_array_equal(one[:, :7], other[:, :7])


@pytest.mark.parametrize("name", DECODERS)
def test_positions_and_embeddings_are_transformers(name, tmp_path):
    """Given embeddings are not multiplied with the square root of d_model; tokens' are."""
    theirs = torch_model(DECODERS[name].config, "CAUSAL_LM", DECODERS[name].classes)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 40, (2, SEQ))
    embeds = rng.standard_normal((2, SEQ, theirs.config.hidden_size)).astype(np.float32)
    expected = theirs(inputs_embeds=torch.tensor(embeds), position_ids=torch.tensor(positions)).logits
    found = outputs_of(models.load(tmp_path), inputs_embeds=embeds, positions=positions)
    assert_close(found, expected.detach().numpy())


def test_the_embeddings_factor_is_rounded_to_their_dtype():
    """In bfloat16 the square root of 640 is 25.25, and not 25.298."""
    model = build(dict(GEMMA2.config) | {"hidden_size": 640}, "CAUSAL_LM", dtype=jnp.bfloat16)
    ids = np.arange(1, 5)[None]
    rows = np.asarray(model.embed_tokens(ids))
    np.testing.assert_array_equal(model._embed(ids, None), rows * jnp.bfloat16(25.25))


def test_a_prompt_that_starts_as_text_is_that_text():
    model = build(GEMMA3.config, "CAUSAL_LM")
    prompted = jpeft.adapt(
        model, jpeft.PromptTuning(num_tokens=3, init="text", token_ids=(5, 9, 7)), key=jax.random.key(0)
    )
    ids = np.random.default_rng(0).integers(1, 53, (2, 9))
    text = np.concatenate([np.array([[5, 9, 7]] * 2), ids], 1)
    assert_close(outputs_of(prompted, input_ids=ids), outputs_of(model, input_ids=text)[:, 3:])


@pytest.mark.parametrize("name, variant", [(name, v) for name, found in DECODERS.items() for v in found.variants])
def test_a_config_survives_the_way_there_and_back(name, variant):
    family = _families.FAMILIES[DECODERS[name].config["model_type"]].module
    config = family.Config.from_hf(config_of(name, variant))
    assert family.Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_both_layouts_of_rope_are_read():
    old = dict(GEMMA3.config) | {"rope_scaling": {"type": "linear", "factor": 8.0}}
    new = {name: value for name, value in old.items() if not name.startswith("rope")}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
    assert gemma.Config.from_hf(old) == gemma.Config.from_hf(new)
    factors = {"short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [5.0, 6.0, 7.0, 8.0]}
    old = dict(PHI3.config) | {"rope_theta": 50.0, "rope_scaling": {"type": "su", **factors}}
    new = dict(PHI3.config) | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 50.0, **factors}}
    assert phi3.Config.from_hf(old) == phi3.Config.from_hf(new)
    part = dict(PHI3.config) | {"partial_rotary_factor": 0.5}
    new = dict(PHI3.config) | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert phi3.Config.from_hf(part) == phi3.Config.from_hf(new)


def test_layer_types_are_a_pattern_where_none_are_given():
    two, three = (gemma.Config.from_hf({"model_type": name}) for name in ("gemma2", "gemma3_text"))
    assert two.windows == (4096, None) * 13
    assert three.windows == ((4096,) * 5 + (None,)) * 4 + (4096,) * 2
    assert dataclasses.replace(three, sliding_window_pattern=2).windows == two.windows
    assert [rope.theta for rope in three.ropes[4:7]] == [1e4, 1e6, 1e4]


#: Parameters as the checkpoints' pages give them.
SIZES = {
    gemma: {
        "gemma-2-2b": 2_614_341_888,
        "gemma-2-9b": 9_241_705_984,
        "gemma-2-27b": 27_227_128_320,
        "gemma-3-270m": 268_098_176,
        "gemma-3-1b": 999_885_952,
    },
    phi3: {"phi-3-mini-4k": 3_821_079_552, "phi-3-medium-4k": 13_960_238_080},
}


@pytest.mark.parametrize("family", SIZES)
def test_presets_have_the_sizes_of_their_checkpoints(family):
    counts = {name: models.num_parameters(config, "CAUSAL_LM") for name, config in family.PRESETS.items()}
    assert counts == SIZES[family]


TYPES = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"vision_config": {}}, "not supported: vision_config"),
        ("gemma2", {"rope_local_base_freq": 5.0}, "a gemma2 model has no rope_local_base_freq=5.0; transformers would"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "a gemma3_text model has no attn_logit_softcapping=5.0"),
        ("gemma2", {"sliding_window": None}, "layers of sliding_attention need a sliding_window; got None"),
        ("gemma2", {"layer_types": TYPES}, "for each of 3 layers; got ('full_attention', 'sliding_attention')"),
        ("gemma2", {"hidden_activation": "xielu"}, "hidden_activation must be one of"),
        ("gemma2", {"model_type": "gemma"}, "model_type must be one of gemma2, gemma3_text; got 'gemma'"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "layers of sliding_attention have the default rotary embedding; got",
        ),
        ("phi3", {"attention_bias": True}, "asks for attention_bias=True: not supported"),
        ("phi3", {"partial_rotary_factor": 0.4}, "even head size; got head_dim=8, partial_rotary_factor=0.4"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is default or longrope; got 'linear'"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has a number for each of 4 frequencies; got 1",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, changes, message):
    family = _families.FAMILIES[DECODERS[name].config["model_type"]].module
    with pytest.raises(ValueError, match=re.escape(message)):
        family.Config.from_hf(config_of(name, "base") | changes)


def test_gemma_3_has_no_head_for_tokens_in_transformers():
    with pytest.raises(ValueError, match="gemma3_text has the tasks CAUSAL_LM, SEQ_CLS, FEATURE_EXTRACTION; got"):
        models.build(GEMMA3.config, "TOKEN_CLS", key=jax.random.key(0))
