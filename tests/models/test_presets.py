# SPDX-License-Identifier: Apache-2.0
"""The presets by name: every one has the parameters of transformers' own class of that config, on no device at all."""

import jax
import pytest
import torch
import transformers
from flax import nnx

from jpeft import models
from jpeft.models._families import FAMILIES

PRESETS = models.presets()
#: The fast lane's: one of every kind, and no deep ones.
FAST = (
    "bert-base-uncased distilbert-base-uncased gemma-2-2b gemma-3-1b gpt2 phi-3-mini-4k qwen3-0.6b roberta-base "
    "t5-base t5-v1_1-base deepseek-r1-distill-qwen-1.5b llama-2-7b"
).split()
CASES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in PRESETS]
#: How transformers' automatic classes end; that of Whisper reads sounds.
AUTO = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
    "IMAGE_CLS": "ImageClassification",
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_it_has_the_parameters_of_transformers(name):
    """Tied ones once; transformers makes the class that config.json would name."""
    config = PRESETS[name]
    task = next(task for task in FAMILIES[config.model_type].tasks if task in AUTO)
    hf = config.to_hf()
    made = transformers.AutoConfig.for_model(**hf)
    if "tie_word_embeddings" in hf:  # which T5's config sets, whatever it is given
        made.tie_word_embeddings = hf["tie_word_embeddings"]
    auto = "SpeechSeq2Seq" if config.model_type == "whisper" else AUTO[task]
    with torch.device("meta"):
        theirs = getattr(transformers, f"AutoModelFor{auto}").from_config(made)
    sizes = {name: parameter.numel() for name, parameter in theirs.named_parameters()}
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}  # of T5's one table
    assert models.num_parameters(name, task) == sum(size for own, size in sizes.items() if own not in copies)


def test_the_published_sizes():
    """In the words of their makers: 7B, 70B, 0.6B; the head of a tied model counts once."""
    billions = {
        "deepseek-r1-distill-qwen-1.5b": 1.777,
        "llama-2-7b": 6.738,
        "llama-3-8b": 8.030,
        "llama-3-70b": 70.554,
        "qwen3-0.6b": 0.596,
        "qwen3-8b": 8.191,
        "qwen3-32b": 32.762,
    }
    for name, size in billions.items():
        assert models.num_parameters(name, "CAUSAL_LM") == pytest.approx(size * 1e9, abs=1e6), name


def test_a_model_is_built_by_its_name():
    def build():
        return models.build("bert-base-uncased", "SEQ_CLS", key=jax.random.key(0), num_labels=3)

    model = nnx.eval_shape(build)
    assert model.config.hidden_size == 768
    assert model.classifier.kernel.shape == (768, 3)


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"'Llama-2-7B-hf' is no preset; nearest: llama-2-7b, .*presets\(\) has all"):
        models.build("Llama-2-7B-hf", key=jax.random.key(0))


def test_no_name_is_given_twice():
    tables = {id(family.module.PRESETS): family.module.PRESETS for family in FAMILIES.values()}
    assert sum(map(len, tables.values())) == len(PRESETS)
