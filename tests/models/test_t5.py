# SPDX-License-Identifier: Apache-2.0
"""What T5 has of its own: buckets of distances, a decoder beside an encoder, heads tied and not; and its errors."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from llama_reference import assert_close, flat
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention
from zoo_reference import SEQ, batch, build, outputs_of, torch_model
from zoo_subjects import T5

import jpeft
from jpeft import models, seams
from jpeft.models import CheckpointError, t5
from jpeft.models._relative import relative_buckets
from jpeft.train.losses import seq2seq_loss

TINY = dict(T5.config)
V1_1 = TINY | dict(T5.variants["v1.1"])
LM = "SEQ_2_SEQ_LM"


def test_parameters_of_the_presets():
    counts = {name: models.num_parameters(config, LM) for name, config in t5.PRESETS.items()}
    assert counts == {
        "t5-small": 60_506_624,
        "t5-base": 222_903_552,
        "t5-large": 737_668_096,
        "t5-v1_1-small": 76_961_152,
        "t5-v1_1-base": 247_577_856,
        "t5-v1_1-large": 783_150_080,
        "flan-t5-small": 76_961_152,
        "flan-t5-base": 247_577_856,
        "flan-t5-large": 783_150_080,
    }


def test_lora_by_default_is_on_q_and_v():
    """8 (512 + 512) on q and on v, in 6 attentions of the encoder and 12 of the decoder."""

    def trainable():
        model = models.build(t5.PRESETS["t5-small"], LM, key=jax.random.key(0))
        return jpeft.partition(jpeft.adapt(model, jpeft.LoRA(), key=jax.random.key(1)))[1]

    assert sum(leaf.size for leaf in jax.eval_shape(trainable).values()) == 294_912


def test_the_seams_of_a_decoder_are_told_apart():
    found = {site.path: site.block for site in jpeft.sites(build(TINY, LM)) if site.kind in ("residual", "keys_values")}
    assert found == {
        "encoder/block/layer/0/SelfAttention/keys_values": "attention",
        "encoder/block/layer/0/residual": "attention",
        "encoder/block/layer/1/residual": "mlp",
        "decoder/block/layer/0/SelfAttention/keys_values": "attention",
        "decoder/block/layer/0/residual": "attention",
        "decoder/block/layer/1/EncDecAttention/keys_values": "cross_attention",
        "decoder/block/layer/1/residual": "cross_attention",
        "decoder/block/layer/2/residual": "mlp",
    }


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_transformers(causal):
    positions = np.arange(300)
    away = torch.tensor(positions[None] - positions[:, None])
    for num_buckets, max_distance in itertools.product((4, 6, 8, 32, 64), (40, 100, 128, 250)):
        theirs = T5Attention._relative_position_bucket(away, not causal, num_buckets, max_distance).numpy()
        ours = relative_buckets(
            jnp.asarray(positions[None]), num_buckets=num_buckets, max_distance=max_distance, causal=causal
        )
        np.testing.assert_array_equal(ours[0], theirs)


def test_what_a_decoder_reads_is_transformers():
    labels = np.array([[5, 6, -100, 8], [-100, 2, 3, -100]])
    theirs = torch_model(TINY, LM, T5.classes)._shift_right(torch.tensor(labels))
    np.testing.assert_array_equal(build(TINY, LM).decoder_inputs(jnp.asarray(labels)), theirs.numpy())
    started = build(TINY | {"decoder_start_token_id": 7}, LM).decoder_inputs(jnp.asarray(labels))
    assert started[:, 0].tolist() == [7, 7]


def test_the_loss_is_transformers(tmp_path):
    theirs = torch_model(V1_1, LM, T5.classes)
    theirs.save_pretrained(tmp_path)
    inputs = batch(T5)
    labels = np.where(inputs["decoder_attention_mask"], inputs["decoder_input_ids"], -100)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"labels": labels}
    expected = theirs(**{name: torch.tensor(value) for name, value in given.items()}).loss
    given = jax.tree.map(jnp.asarray, given)
    assert seq2seq_loss(models.load(tmp_path), given) == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="none of the 21 labels counts"):
        seq2seq_loss(build(V1_1, LM), given | {"labels": jnp.full_like(given["labels"], -100)})


def test_encoded_once_and_decoded_is_the_call():
    model, inputs = build(TINY, "FEATURE_EXTRACTION"), jax.tree.map(jnp.asarray, batch(T5))
    encoded = model.encode(inputs["input_ids"], inputs["attention_mask"])
    found = model.decode(encoded, inputs["decoder_input_ids"], inputs["decoder_attention_mask"])
    assert_close(found, outputs_of(model, **inputs))


def test_the_decoder_sees_no_later_token_and_the_encoder_does():
    model, inputs = build(TINY, LM), batch(T5)
    before = outputs_of(model, **inputs)
    later = inputs["decoder_input_ids"].copy()
    later[:, 4:] = (later[:, 4:] + 5) % 53
    np.testing.assert_array_equal(outputs_of(model, **inputs | {"decoder_input_ids": later})[:, :4], before[:, :4])
    later = inputs["input_ids"].copy()
    later[0, -1] = (later[0, -1] + 5) % 53
    assert np.abs(outputs_of(model, **inputs | {"input_ids": later})[0, 0] - before[0, 0]).max() > 1e-3


def test_only_distances_count():
    model, inputs = build(TINY, LM), batch(T5)
    shifted = {
        "positions": np.arange(SEQ)[None] + np.array([[0], [3], [50]]),
        "decoder_positions": np.arange(7)[None] + 9,
    }
    assert_close(outputs_of(model, **inputs, **shifted), outputs_of(model, **inputs))


class Front(seams.InputEmbedding):
    """Two virtual tokens before the others."""

    def __call__(self, e, positions, mask, segments):
        virtual = jnp.broadcast_to(self.virtual[None], (e.shape[0], 2, e.shape[2]))
        ones = np.ones((e.shape[0], 2), int)
        return (
            jnp.concatenate([virtual, e], 1),
            jnp.arange(e.shape[1] + 2)[None],
            jnp.concatenate([ones, mask], 1),
            None,
        )


def test_virtual_tokens_before_the_encoders_are_seen_by_the_decoder(tmp_path):
    """As those of PEFT's prompt tuning, which go into `inputs_embeds`."""
    theirs, inputs = torch_model(TINY, LM, T5.classes), batch(T5)
    theirs.save_pretrained(tmp_path)
    virtual = np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32)
    embeds = theirs.shared.weight.detach()[torch.tensor(inputs["input_ids"])]
    mask = np.concatenate([np.ones((3, 2), int), inputs["attention_mask"]], 1)
    decoder = {name: torch.tensor(inputs[name]) for name in ("decoder_input_ids", "decoder_attention_mask")}
    front = torch.tensor(virtual).expand(3, 2, 24)
    out = theirs(inputs_embeds=torch.cat([front, embeds], 1), attention_mask=torch.tensor(mask), **decoder)
    ours = models.load(tmp_path)
    ours.encoder.input_embedding = Front(24, "encoder", False)
    ours.encoder.input_embedding.virtual = jpeft.AdapterConstant(jnp.asarray(virtual))
    real = inputs["decoder_attention_mask"] == 1
    assert_close(ours(**jax.tree.map(jnp.asarray, inputs))[real], out.logits.detach().numpy()[real])


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_head_of_its_own_survives_transformers(tmp_path):
    """transformers 5 writes tie_word_embeddings=true of such a model, and scale_decoder_outputs=false."""
    ours = build(V1_1, LM)
    models.save(ours, tmp_path / "ours")
    theirs, info = T5.classes[LM].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert not theirs.config.scale_decoder_outputs
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/config.json").read_text())["tie_word_embeddings"]
    again = models.load(tmp_path / "theirs")
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, flat(again), flat(ours))


def test_copies_of_the_table_are_checked_and_a_bias_that_nothing_reads_is_left(tmp_path):
    """Both stand in the published checkpoints of T5 v1.0."""
    ours = build(TINY, LM)
    models.save(ours, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for copy in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        weights[f"{copy}.weight"] = weights["shared.weight"].clone()
    weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 3)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, flat(models.load(tmp_path)), flat(ours))
    weights["decoder.embed_tokens.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder.embed_tokens.weight differs from shared.weight"):
        models.load(tmp_path)


def test_published_configs_are_read():
    """t5-small's config.json, and flan-t5-base's."""
    small = {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 512,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
        "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512,
        "num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
        "task_specific_params": {"summarization": {"early_stopping": True, "prefix": "summarize: "}},
        "use_cache": True, "vocab_size": 32128,
    }  # fmt: skip
    flan = small | {
        "d_ff": 2048, "d_model": 768, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new",
        "is_gated_act": True, "num_decoder_layers": 12, "num_heads": 12, "num_layers": 12,
        "relative_attention_max_distance": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    for hf, name in ((small, "t5-small"), (flan, "flan-t5-base")):
        config = t5.Config.from_hf(hf)
        assert config.decoder_start_token_id == 0
        assert config.to_hf() | {"decoder_start_token_id": None} == config.to_hf() | t5.PRESETS[name].to_hf() | {
            "decoder_start_token_id": None
        }


@pytest.mark.slow
def test_first_values_are_transformers():
    """Standard deviations by leaf; a normal sample of n numbers is off by 1 / √(2n)."""
    torch.manual_seed(0)
    config = V1_1 | {"d_model": 96, "vocab_size": 500, "num_heads": 6, "d_kv": 16, "initializer_factor": 0.7}
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    expected = {name: (w.std().item(), w.mean().item()) for name, w in theirs.named_parameters()}
    ours = models.build(config, LM, key=jax.random.key(0))
    entries = {rule.path: rule.hf.replace("{i}", "0") for rule in models.weights(ours) if hasattr(rule, "how")}
    for path, leaf in flat(ours).items():
        if path == "lm_head/kernel":  # transformers 5 ties it; as v1.1 was trained it starts as the table
            assert np.std(leaf) == pytest.approx(0.7, rel=0.05)
            continue
        std, mean = expected[entries[path]]
        assert np.std(leaf) == pytest.approx(std, rel=0.05 if leaf.size > 4000 else 0.5, abs=1e-6), path
        assert std > 1e-6 or np.mean(leaf) == pytest.approx(mean, rel=1e-6), path


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False"),
        ({"dense_act_fn": "silu"}, "dense_act_fn='silu'"),
        ({"feed_forward_proj": "gated-cube"}, "feed_forward_proj must be one of .*relu.*; got 'gated-cube'"),
        ({"relative_attention_num_buckets": 5}, "must be even and at least 4.*got 5 and 11"),
        ({"relative_attention_max_distance": 4}, "more than half of it; got 8 and 4"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(attributes, message):
    with pytest.raises(ValueError, match=message):
        models.build(TINY | attributes, LM, key=jax.random.key(0))


def test_wrong_calls_are_refused():
    model, inputs = build(TINY, LM), jax.tree.map(jnp.asarray, batch(T5))
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(decoder_input_ids=inputs["decoder_input_ids"])
    with pytest.raises(ValueError, match="no token types; token_type_ids must be None"):
        model(**inputs, token_type_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="the config has no pad_token_id"):
        build(TINY | {"pad_token_id": None}, LM).decoder_inputs(jnp.ones((1, 3), int))


@pytest.mark.filterwarnings("ignore")  # peft warns that the table is tied
def test_an_adapter_on_the_table_has_no_form_in_peft(tmp_path):
    """There the table is read through modules of their own, so that an adapter on it does nothing."""
    theirs = torch_model(TINY, LM, T5.classes)
    inputs = {name: torch.tensor(value) for name, value in batch(T5).items()}
    before = theirs(**inputs).logits
    real = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["shared"]))
    for name, weight in real.named_parameters():
        weight.data += "lora" in name
    torch.testing.assert_close(real(**inputs).logits, before, rtol=0, atol=0)

    adapted = jpeft.adapt(build(TINY, LM), jpeft.LoRA(rank=2, targets=["shared"]), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"shared is read as encoder.embed_tokens and decoder.embed_tokens"):
        jpeft.export_peft(adapted, tmp_path)
