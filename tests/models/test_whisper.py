# SPDX-License-Identifier: Apache-2.0
"""Whisper's own: places that are not trained, what its decoder writes and may not write, PEFT's format, and errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle as oracle
import pytest
import subjects
import torch
import transformers
from flax import nnx
from llama_reference import assert_close
from sense_subjects import WHISPER
from virtual_oracle import run
from zoo_reference import batch, build, outputs_of, torch_model

import jpeft
from jpeft import models
from jpeft.models import whisper
from jpeft.train.losses import seq2seq_loss

KEY = jax.random.key(0)
LM = "SEQ_2_SEQ_LM"
#: PEFT's limits are those of its page: float32 against float32 at unit scale.
CLOSE = 1e-5


def test_parameters_of_the_presets():
    counts = {name: models.num_parameters(config, LM) for name, config in whisper.PRESETS.items()}
    assert counts == {
        "whisper-tiny": 37_760_640,
        "whisper-base": 72_593_920,
        "whisper-small": 241_734_912,
        "whisper-medium": 763_857_920,
        "whisper-large-v3": 1_543_490_560,
    }


def test_places_start_as_transformers():
    """That they have no gradient there, and none here, is among the zoo's comparisons."""
    ours = build(WHISPER.config, LM)
    theirs = transformers.WhisperModel(transformers.WhisperConfig(**WHISPER.config))
    first = whisper.Encoder(ours.config, rngs=nnx.Rngs(0), dtype=jnp.float32).embed_positions
    assert_close(first.embedding[...], theirs.encoder.embed_positions.weight.numpy())


def test_the_seams_of_a_decoder_are_told_apart():
    sites = jpeft.sites(build(WHISPER.config, LM))
    found = {site.path: site.block for site in sites if site.kind in ("residual", "keys_values", "input")}
    assert found == {
        **{f"{stack}/input_embedding": stack for stack in ("encoder", "decoder")},
        **{f"{stack}/layers/self_attn/keys_values": "attention" for stack in ("encoder", "decoder")},
        **{f"{stack}/layers/self_attn_residual": "attention" for stack in ("encoder", "decoder")},
        **{f"{stack}/layers/mlp_residual": "mlp" for stack in ("encoder", "decoder")},
        "decoder/layers/encoder_attn/keys_values": "cross_attention",
        "decoder/layers/encoder_attn_residual": "cross_attention",
    }


def test_the_loss_is_transformers(tmp_path):
    theirs = torch_model(WHISPER.config, LM, WHISPER.classes)
    theirs.save_pretrained(tmp_path)
    inputs = batch(WHISPER)
    labels = np.where(inputs["decoder_attention_mask"], inputs["decoder_input_ids"], -100)
    given = {"input_features": inputs["input_features"], "labels": labels}
    expected = theirs(**{name: torch.tensor(value) for name, value in given.items()}).loss
    given = jax.tree.map(jnp.asarray, given)
    assert seq2seq_loss(models.load(tmp_path), given) == pytest.approx(expected.item(), rel=1e-6)


# Writing --------------------------------------------------------------------------------------------------------------

BANNED = {"suppress_tokens": [4, 9, 31], "begin_suppress_tokens": [2, 40]}
WRITES = {
    "suppressed": {**BANNED, "repetition_penalty": 1.7},
    "greedy": pytest.param({}, marks=pytest.mark.slow),
    "beams": pytest.param({**BANNED, "num_beams": 3}, marks=pytest.mark.slow),
}


@pytest.mark.parametrize("options", WRITES.values(), ids=WRITES)
def test_what_is_written_is_transformers(options, tmp_path):
    """With a decoder's first tokens, as language and task; transformers' own Whisper loop is about long sounds."""
    theirs = torch_model(WHISPER.config, LM, WHISPER.classes)
    theirs.save_pretrained(tmp_path)
    features = batch(WHISPER)["input_features"]
    begun = np.array([[3, 11, 23]] * 3)
    told = {"max_new_tokens": 9, "eos_token_id": 2, "pad_token_id": 0, **options}
    theirs.generation_config = transformers.GenerationConfig(decoder_start_token_id=3, do_sample=False, **told)
    expected = transformers.GenerationMixin.generate(
        theirs, inputs=torch.tensor(features), decoder_input_ids=torch.tensor(begun)
    )[:, 3:]
    found = models.generate(models.load(tmp_path), features, decoder_input_ids=begun, **told)
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected.numpy())
    assert not np.asarray(found[:, expected.shape[1] :]).any()
    assert not {4, 9, 31} & {*np.unique(found).tolist()} or not options


@pytest.mark.slow
def test_suppressed_tokens_would_have_been_written():
    """So that the cases above rule something out."""
    model, features = build(WHISPER.config, LM), batch(WHISPER)["input_features"]
    plain = np.asarray(models.generate(model, features, max_new_tokens=6))
    first, often = int(plain[0, 0]), int(np.bincount(plain[1]).argmax())
    found = models.generate(model, features, max_new_tokens=6, begin_suppress_tokens=[first], suppress_tokens=[often])
    assert found[0, 0] != first
    assert often not in np.asarray(found)


@pytest.mark.parametrize(
    "method",
    [
        jpeft.LoRA(rank=2, targets=["q_proj", "v_proj", "conv2"]),
        pytest.param(jpeft.PrefixTuning(num_tokens=3), marks=pytest.mark.slow),
        pytest.param(jpeft.PromptTuning(num_tokens=2, blocks=("encoder", "decoder")), marks=pytest.mark.slow),
        pytest.param(jpeft.Pfeiffer(reduction_factor=4), marks=pytest.mark.slow),
        pytest.param(jpeft.IA3(targets=["k_proj", "fc2"], feedforward=["fc2"]), marks=pytest.mark.slow),
    ],
    ids=lambda method: method.kind,
)
def test_a_cache_changes_nothing(method):
    """The written tokens are the likeliest of a call that reads them all, on an adapted model."""
    alike = {"decoder_layers": 2, "decoder_attention_heads": 3}  # as in the encoder: one table of prefixes is for both
    model = subjects.fill(jpeft.adapt(build({**WHISPER.config, **alike}, LM), method, key=KEY))
    features = batch(WHISPER)["input_features"]
    found = np.asarray(models.generate(model, features, max_new_tokens=5))
    ids = np.concatenate([np.full((3, 1), 3), found[:, :-1]], 1)
    logits = run(model, input_features=features, decoder_input_ids=ids)
    np.testing.assert_array_equal(logits.argmax(-1), found)
    plain = outputs_of(jpeft.strip(model), input_features=features, decoder_input_ids=ids)
    assert np.abs(logits - plain).max() > 1e-2


# PEFT -----------------------------------------------------------------------------------------------------------------


def test_lora_goes_to_peft_and_back(tmp_path):
    """On all attentions; PEFT's types of tasks call models with tokens, so that there is none."""
    method = jpeft.LoRA(rank=3, alpha=6, targets=["q_proj", "v_proj"])
    model = subjects.fill(jpeft.adapt(oracle.jax_model("whisper"), method, key=KEY))
    jpeft.export_peft(model, tmp_path / "ours")
    real, result = oracle.load_real("whisper", tmp_path / "ours")
    assert result.unexpected_keys == []
    ours = oracle.seen(run(model, **oracle.inputs_of(model)))
    np.testing.assert_allclose(oracle.real_outputs(real, "whisper"), ours, atol=CLOSE)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["task_type"] is None
    assert config["auto_mapping"]["base_model_class"] == "WhisperForConditionalGeneration"

    config = {
        "r": 2,
        "target_modules": ["encoder_attn.v_proj", "embed_tokens", "proj_out", "fc1"],
        "ensure_weight_tying": True,
    }
    real = oracle.train_real("whisper", config, tmp_path / "real")
    model = jpeft.import_peft(oracle.jax_model("whisper"), tmp_path / "real")
    ours = oracle.seen(run(model, **oracle.inputs_of(model)))
    np.testing.assert_allclose(oracle.real_outputs(real, "whisper"), ours, atol=CLOSE)


def test_virtual_tokens_have_no_form_in_peft(tmp_path):
    model = jpeft.adapt(oracle.jax_model("whisper"), jpeft.PromptTuning(num_tokens=2), key=KEY)
    with pytest.raises(ValueError, match="called with tokens, and a whisper model is not"):
        jpeft.export_peft(model, tmp_path)


# Errors ---------------------------------------------------------------------------------------------------------------

SOUND, WORDS = np.zeros((1, 5, 22), np.float32), np.ones((1, 4), int)
CALLS = {
    "length": (np.zeros((1, 5, 20)), {}, r"\(5, 22\) behind the batch, padded or cut .* got \(1, 5, 20\)"),
    "mask": (SOUND, {"attention_mask": np.ones((1, 22))}, "hears all frames, silence too; attention_mask must be None"),
    "tokens": (SOUND, {"decoder_input_ids": np.ones((1, 20), int)}, "20 tokens are more than the 19 positions"),
}


@pytest.mark.parametrize("features, options, message", CALLS.values(), ids=CALLS)
def test_calls_that_are_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        build(WHISPER.config, LM)(features, **{"decoder_input_ids": WORDS, **options})


GENERATIONS = {
    "mask": ({"attention_mask": np.ones((1, 22))}, r"reads \[batch, 5, 22\], without an attention_mask .* a mask"),
    "length": ({"max_new_tokens": 20}, "a cache of 20 slots is longer than the 19 positions this decoder has"),
    "rows": ({"decoder_input_ids": np.ones((2, 1), int)}, r"decoder_input_ids are \[1, seq\] .* got \(2, 1\)"),
    "ids": ({"suppress_tokens": [53]}, "suppressed tokens are below 53"),
    "negative": ({"begin_suppress_tokens": [-1]}, "begin_suppress_tokens are ids of tokens, 0 or more"),
}


@pytest.mark.parametrize("options, message", GENERATIONS.values(), ids=GENERATIONS)
def test_generations_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.generate(build(WHISPER.config, LM), SOUND, **{"max_new_tokens": 2, **options})


CONFIGS = {
    "heads": ({"decoder_attention_heads": 5}, "multiple of decoder_attention_heads, got 24 and 5"),
    "odd": ({"d_model": 21, "decoder_attention_heads": 3}, "must be even and at least 4 for sines .* got 21"),
    "activation": ({"activation_function": "sine"}, "activation_function must be one of .* got 'sine'"),
    "layerdrop": ({"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1: not supported"),
    "augmented": ({"apply_spec_augment": True}, "apply_spec_augment=True: not supported"),
}


@pytest.mark.parametrize("changes, message", CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build({**WHISPER.config, **changes}, LM, key=KEY)
