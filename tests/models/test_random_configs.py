# SPDX-License-Identifier: Apache-2.0
"""The property that a config of any family, its flags drawn at random, gives transformers' outputs and gradients.

What the families' tests vary one variant at a time is mixed here: every attribute takes the value of a variant of its
own. Rows are padded on the right, on the left and not at all.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from llama_reference import CONFIGS, MISTRAL, QWEN2, QWEN3, TINY
from zoo_reference import batch, check, torch_model, torch_output
from zoo_subject import Subject
from zoo_subjects import SUBJECTS

#: Configs of every family.
DRAWS = 4
#: How many configs that transformers itself refuses may be drawn before one that it takes.
REFUSED = 20
#: Attributes of which one variant gives all: the values of one mean nothing beside those of another.
TOGETHER = (
    {"rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "max_position_embeddings",
     "original_max_position_embeddings"},
    {"num_hidden_layers", "layer_types", "sliding_window_pattern"},
    {"use_sliding_window", "max_window_layers", "sliding_window"},
    {"num_local_experts", "num_experts_per_tok"},
    {"conv_kernel_size", "conv_groups", "conv_act"},
    {"relative_attention_num_buckets", "relative_attention_max_distance"},
    {"relative_attention", "norm_rel_ebd"},
)  # fmt: skip


def family(base: Mapping[str, Any], changed: Iterable[Mapping[str, Any]], **classes: Any) -> Subject:
    """A family whose tests have whole configs in the place of variants."""
    variants = {str(i): {k: v for k, v in config.items() if base.get(k) != v} for i, config in enumerate(changed)}
    return Subject(base, variants, classes, {}, {}, causal="CAUSAL_LM" in classes)


def of_llama(base: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config for config in CONFIGS.values() if config["model_type"] == base["model_type"]]


BERT = {
    "model_type": "bert", "vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 37, "max_position_embeddings": 19, "type_vocab_size": 3, "initializer_range": 0.2,
}  # fmt: skip
BERTS = (
    {"hidden_act": "gelu_new", "num_attention_heads": 1, "layer_norm_eps": 1e-2},
    {"hidden_act": "relu", "type_vocab_size": 1, "pad_token_id": 7, "num_hidden_layers": 2},
    {"hidden_act": "silu", "hidden_size": 12, "num_attention_heads": 6, "pad_token_id": None},
)
MIXED = {
    **SUBJECTS,
    "bert": family(BERT, BERTS, SEQ_CLS=transformers.BertForSequenceClassification),
    "llama": family(TINY, of_llama(TINY), CAUSAL_LM=transformers.LlamaForCausalLM),
    "mistral": family(MISTRAL, of_llama(MISTRAL), CAUSAL_LM=transformers.MistralForCausalLM),
    "qwen2": family(QWEN2, of_llama(QWEN2), CAUSAL_LM=transformers.Qwen2ForCausalLM),
    "qwen3": family(QWEN3, of_llama(QWEN3), CAUSAL_LM=transformers.Qwen3ForCausalLM),
}


def units(subject: Subject) -> list[tuple[str, ...]]:
    """The attributes that the variants of a family change, those that belong together in one."""
    names = sorted({name for variant in subject.variants.values() for name in variant})
    joint = [tuple(name for name in names if name in group) for group in TOGETHER]
    alone = [(name,) for name in names if not any(name in group for group in TOGETHER)]
    return [unit for unit in (*joint, *alone) if unit]


def drawn(subject: Subject, rng: np.random.Generator) -> dict[str, Any]:
    """A config, each of whose units is that of some variant which changes it, or as it is."""
    config = dict(subject.config)
    for unit in units(subject):
        values = [{k: v[k] for k in unit if k in v} for v in subject.variants.values() if {*unit} & v.keys()]
        config |= ({}, *values)[rng.integers(1 + len(values))]
    return config


@functools.cache
def taken(name: str, draw: int) -> Any:
    """(a family with a random config that transformers computes with, its model)."""
    subject, rng = MIXED[name], np.random.default_rng([draw, *name.encode()])
    task = next(iter(subject.classes))
    for _ in range(REFUSED):
        mixed = subject.changed(drawn(subject, rng))
        try:
            model = torch_model(mixed.config, task, subject.classes)
            with torch.no_grad():
                torch_output(model, task, batch(mixed))
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError):
            continue  # transformers' own refusal, or its own failure
        return mixed, model
    raise AssertionError(f"transformers takes none of {REFUSED} random configs of {name}")


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(DRAWS))
@pytest.mark.parametrize("name", MIXED)
def test_a_random_config_is_transformers(name, draw, tmp_path):
    mixed, model = taken(name, draw)
    check(model, next(iter(mixed.classes)), batch(mixed), tmp_path)


@pytest.mark.parametrize("name", MIXED)
def test_the_draws_reach_every_flag(name):
    """Each value of each attribute of the variants comes up in a few dozen draws, and configs are many."""
    subject, rng = MIXED[name], np.random.default_rng(0)
    found = [drawn(subject, rng) for _ in range(99)]
    for variant in subject.variants.values():
        for attribute, value in variant.items():
            assert any(config.get(attribute) == value for config in found), attribute
    several = len(units(subject)) > 1
    assert len({repr(sorted(config.items(), key=repr)) for config in found}) >= (4 if several else 1)
