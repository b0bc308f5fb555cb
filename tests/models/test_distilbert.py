# SPDX-License-Identifier: Apache-2.0
"""What DistilBERT has of its own: sizes, first values, packed rows, what LoRA trains of it, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from llama_reference import assert_close, flat
from zoo_reference import SEQ, batch, build, outputs_of, torch_model
from zoo_subjects import DISTILBERT

import jpeft
from jpeft import models
from jpeft.models import distilbert

TINY = dict(DISTILBERT.config)


def test_parameters_of_the_presets():
    counts = {name: models.num_parameters(config) for name, config in distilbert.PRESETS.items()}
    assert counts == {"distilbert-base-uncased": 66_362_880}


HEAD = 768 * 768 + 768 + 2 * 768 + 2
COUNTS = {
    "lora": (jpeft.LoRA(rank=16), 2 * 6 * 16 * (768 + 768), 887_042),
    "prefix tuning": (
        jpeft.PrefixTuning(num_tokens=20, projection=True, hidden_size=768),
        20 * 768 + (768 * 768 + 768) + (768 * 2 * 6 * 768 + 2 * 6 * 768),
        8_285_186,
    ),
    "prompt tuning": (jpeft.PromptTuning(num_tokens=20), 20 * 768, 607_490),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_methods_and_the_head_with_its_dense_layer(name):
    method, alone, published = COUNTS[name]
    config = distilbert.PRESETS["distilbert-base-uncased"]
    trainable = jax.eval_shape(lambda: jpeft.partition(_adapted(config, method))[1])
    assert sum(leaf.size for leaf in trainable.values()) == alone + HEAD == published
    heads = [leaf.size for path, leaf in trainable.items() if path.startswith(("pre_classifier/", "classifier/"))]
    assert sum(heads) == HEAD


def _adapted(config, method):
    return jpeft.adapt(models.build(config, "SEQ_CLS", key=jax.random.key(0)), method, key=jax.random.key(1))


def test_inputs_embeds_and_positions_are_transformers(tmp_path):
    theirs = torch_model(TINY, "FEATURE_EXTRACTION", DISTILBERT.classes)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((2, SEQ, TINY["dim"])).astype(np.float32)
    positions = rng.integers(0, TINY["max_position_embeddings"], (2, SEQ))
    expected = theirs(inputs_embeds=torch.tensor(embeds), position_ids=torch.tensor(positions)).last_hidden_state
    assert_close(
        models.load(tmp_path).hidden(inputs_embeds=jnp.asarray(embeds), positions=jnp.asarray(positions)),
        expected.detach().numpy(),
    )


def test_packed_segments_equal_separate_rows():
    model = build(TINY, "TOKEN_CLS")
    ids = batch(DISTILBERT)["input_ids"]
    segments = np.array([[1] * 5 + [2] * 8] * 3)
    packed = outputs_of(model, input_ids=ids, segment_ids=segments)
    for segment in (1, 2):
        here = segments[0] == segment
        assert_close(packed[:, here], outputs_of(model, input_ids=ids[:, here]))


@pytest.mark.slow
def test_first_values_are_transformers():
    config = TINY | {"dim": 240, "vocab_size": 500, "initializer_range": 0.05, "pad_token_id": 4}
    leaves = flat(models.build(config, "SEQ_CLS", key=jax.random.key(0)))
    for path, leaf in leaves.items():
        if path.endswith("bias"):
            assert not np.any(leaf), path
        elif path.endswith("scale"):
            assert np.all(leaf == 1), path
        elif leaf.size > 5000:
            assert np.std(leaf) == pytest.approx(0.05, rel=0.05), path
    assert not np.any(leaves["embeddings/word_embeddings/embedding"][4])


def test_sinusoidal_positions_start_as_transformers():
    config = TINY | {"sinusoidal_pos_embds": True}
    theirs = torch_model(config, "FEATURE_EXTRACTION", DISTILBERT.classes).embeddings.position_embeddings.weight
    ours = models.build(config, key=jax.random.key(0)).embeddings.position_embeddings.embedding[...]
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-6)


def test_published_configs_are_read():
    """distilbert-base-uncased's own config.json."""
    hf = {
        "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 768,
        "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02, "max_position_embeddings": 512,
        "model_type": "distilbert", "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True,
        "transformers_version": "4.10.0.dev0", "vocab_size": 30522,
    }  # fmt: skip
    assert distilbert.Config.from_hf(hf) == distilbert.PRESETS["distilbert-base-uncased"]


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"type_vocab_size": 2}, "type_vocab_size"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"activation": "cube"}, "activation must be one of .*gelu.*; got 'cube'"),
        ({"n_heads": 5}, "dim must be a multiple of n_heads, got 24 and 5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(attributes, message):
    with pytest.raises(ValueError, match=message):
        models.build(TINY | attributes, "SEQ_CLS", key=jax.random.key(0))


def test_wrong_calls_are_refused():
    ids = jnp.asarray(batch(DISTILBERT)["input_ids"])
    model = build(TINY, "TOKEN_CLS")
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=jnp.zeros((3, SEQ, 24)))
    with pytest.raises(ValueError, match="20 tokens are more than the 19 positions"):
        model(jnp.zeros((1, 20), int))
    with pytest.raises(ValueError, match="distilbert model has no token types"):
        model(ids, token_type_ids=ids)
    with pytest.raises(ValueError, match="SEQ_CLS gives one output per row"):
        build(TINY, "SEQ_CLS")(ids, segment_ids=ids)
