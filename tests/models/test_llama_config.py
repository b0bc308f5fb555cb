# SPDX-License-Identifier: Apache-2.0
"""The Llama family's Config: read from both layouts of config.json, no dead field, nothing unknown accepted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from llama_reference import CONFIGS, TINY, WINDOWED, meaning, rope

from jpeft import models
from jpeft.models import llama

#: field -> (what stands beside it, its other value, the task in which it shows)
PERTURBED = {
    "vocab_size": ({}, 60, "CAUSAL_LM"),
    "hidden_size": ({}, 32, "CAUSAL_LM"),
    "intermediate_size": ({}, 38, "CAUSAL_LM"),
    "num_hidden_layers": ({}, 2, "CAUSAL_LM"),
    "num_attention_heads": ({}, 2, "CAUSAL_LM"),
    "num_key_value_heads": ({}, 4, "CAUSAL_LM"),
    "head_dim": ({}, 10, "CAUSAL_LM"),
    "hidden_act": ({}, "relu", "CAUSAL_LM"),
    "max_position_embeddings": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 9, "CAUSAL_LM"),
    "initializer_range": ({}, 0.3, "CAUSAL_LM"),
    "rms_norm_eps": ({}, 1e-3, "CAUSAL_LM"),
    "tie_word_embeddings": ({}, True, "CAUSAL_LM"),
    "rope_theta": ({}, 20.0, "CAUSAL_LM"),
    "rope_scaling": ({}, {"rope_type": "linear", "factor": 2.0}, "CAUSAL_LM"),
    "attention_bias": ({}, True, "CAUSAL_LM"),
    "mlp_bias": ({}, True, "CAUSAL_LM"),
    "attention_dropout": ({}, 0.1, "CAUSAL_LM"),
    "use_sliding_window": ({"model_type": "qwen2", "sliding_window": 3, "max_window_layers": 1}, True, "CAUSAL_LM"),
    "sliding_window": ({"model_type": "mistral", "sliding_window": 3}, 4, "CAUSAL_LM"),
    "max_window_layers": ({"model_type": "qwen2", **WINDOWED, "max_window_layers": 1}, 2, "CAUSAL_LM"),
    "layer_types": ({"model_type": "qwen2", **WINDOWED}, ("full_attention",) * 2 + ("sliding_attention",), "CAUSAL_LM"),
    "classifier_dropout": ({}, 0.4, "TOKEN_CLS"),
    "token_classification_bias": ({}, False, "TOKEN_CLS"),
    "pad_token_id": ({}, 3, "CAUSAL_LM"),
    "num_labels": ({}, 3, "SEQ_CLS"),
    "model_type": ({}, "qwen2", "CAUSAL_LM"),
}


def program(config, task):
    """What a model computes, as text and constants: from its key through its first values to logits."""

    def run(key, ids):
        return llama.Llama(config, task, rngs=nnx.Rngs(key))(ids, key=key)

    closed = jax.make_jaxpr(run)(jax.random.key(0), jnp.zeros((2, 11), jnp.int32))
    return str(closed), [np.asarray(c).tolist() for c in closed.consts if not isinstance(c, jax.Array) or c.size < 1e5]


def test_every_field_is_perturbed():
    assert set(PERTURBED) == {field.name for field in dataclasses.fields(llama.Config)} - {"hf"}


@pytest.mark.parametrize("field", PERTURBED)
def test_no_field_is_dead(field):
    beside, value, task = PERTURBED[field]
    names = {f.name for f in dataclasses.fields(llama.Config)}
    base = llama.Config(**{name: v for name, v in (TINY | beside).items() if name in names})
    assert program(base, task) != program(dataclasses.replace(base, **{field: value}), task)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_the_way_there_and_back(name):
    config = llama.Config.from_hf(CONFIGS[name])
    written = json.loads(json.dumps(config.to_hf()))
    assert llama.Config.from_hf(written) == config
    theirs = transformers.AutoConfig.for_model(**written).to_json_string(use_diff=False)
    assert meaning(llama.Config.from_hf(json.loads(theirs))) == meaning(config)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_are_transformers(model_type):
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    assert meaning(llama.Config.from_hf({"model_type": model_type})) == meaning(llama.Config.from_hf(theirs))


@pytest.mark.parametrize("name", ["rope_theta", "rope linear", "rope llama3", "rope yarn, betas"])
def test_both_layouts_of_rope_are_read(name):
    new = CONFIGS[name]
    scaling = dict(new["rope_parameters"])
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    assert llama.Config.from_hf(old) == llama.Config.from_hf(new)
    scaling["type"] = scaling.pop("rope_type")
    assert llama.Config.from_hf(old) == llama.Config.from_hf(new)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_sinks": 4}, "not supported: attention_sinks"),
        ({"model_type": "gemma"}, "model_type must be one of llama, mistral, qwen2, qwen3; got 'gemma'"),
        ({"hidden_size": 25}, "hidden_size must be a multiple of num_attention_heads; got 25 and 4"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads; got 4 and 3"),
        ({"head_dim": 7}, "even head size; got head_dim=7"),
        ({"hidden_act": "xielu"}, "hidden_act must be one of .*; got 'xielu'"),
        ({"sliding_window": 8}, "a llama model has no sliding_window=8; transformers would ignore it"),
        ({"model_type": "qwen2", "attention_bias": True}, "a qwen2 model has no attention_bias=True"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "for each of 3 layers; got .'full_attention',."),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3},
            "needs use_sliding_window and a sliding_window; got use_sliding_window=False",
        ),
        (rope("spiral", factor=2.0), "rope_type must be one of default, linear, .*; got 'spiral'"),
        (rope("linear"), "missing: .'factor'., unknown: .."),
        (rope("linear", factor=2.0, partial_rotary_factor=0.5), "unknown: .'partial_rotary_factor'."),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        llama.Config.from_hf(TINY | changes)


#: Parameters as the checkpoints' pages give them.
SIZES = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-1.5b": 1_543_714_304,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


def test_presets_have_the_sizes_of_their_checkpoints():
    assert {name: models.num_parameters(config, "CAUSAL_LM") for name, config in llama.PRESETS.items()} == SIZES
