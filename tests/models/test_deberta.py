# SPDX-License-Identifier: Apache-2.0
"""What DeBERTa has of its own: distances, packed rows, padding in front, sizes, and what its Config refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import subjects
import torch
import transformers
from llama_reference import assert_close
from peft_oracle import quiet
from transformers.models.deberta_v2 import modeling_deberta_v2 as theirs_module
from zoo_reference import SEQ, batch, build, outputs_of, torch_model
from zoo_subjects import DEBERTA

import jpeft
from jpeft import models
from jpeft.models import deberta
from jpeft.models._disentangled import content_to_position, distances, position_to_content, rows_of_distances
from jpeft.models.deberta import Config

BASE = dict(DEBERTA.config)
V3 = {**BASE, **DEBERTA.variants["v3"]}
IDS = np.random.default_rng(0).integers(1, 53, (3, SEQ))
#: A gradient that is summed over all pairs of 300 tokens, in float64.
SUMS = 10 * subjects.FLOAT64


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", deberta.PRESETS)
def test_parameters_of_the_presets_are_transformers(name):
    config = deberta.PRESETS[name]
    with torch.device("meta"):
        theirs = transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**config.to_hf()))
    assert models.num_parameters(config, "SEQ_CLS") == theirs.num_parameters()


def test_published_configs_are_read():
    """deberta-v3-base's and deberta-v2-xlarge's own config.json."""
    v3 = {
        "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "max_position_embeddings": 512, "relative_attention": True, "position_buckets": 256,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7,
        "max_relative_positions": -1, "position_biased_input": False, "num_attention_heads": 12,
        "num_hidden_layers": 12, "type_vocab_size": 0, "vocab_size": 128100,
    }  # fmt: skip
    xlarge = v3 | {
        "attention_head_size": 64, "conv_kernel_size": 3, "conv_act": "gelu", "hidden_size": 1536,
        "intermediate_size": 6144, "num_attention_heads": 24, "num_hidden_layers": 24,
    }  # fmt: skip
    assert Config.from_hf(v3) == deberta.PRESETS["deberta-v3-base"]
    assert Config.from_hf(xlarge) == deberta.PRESETS["deberta-v2-xlarge"]


# Distances ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets, limit", [(256, 512), (4, 9), (6, 24), (12, 17), (32, 128), (100, 512), (512, 2048)])
def test_rows_of_distances_are_transformers(buckets, limit):
    """Of distances beyond the largest as well, which all read the last row."""
    away = np.arange(-3 * limit, 3 * limit + 1)
    bucket = theirs_module.make_log_bucket_position(torch.tensor(away), buckets, limit).long()
    expected = torch.clamp(bucket + buckets, 0, 2 * buckets - 1).numpy()
    config = Config(relative_attention=True, position_buckets=buckets, max_relative_positions=limit)
    np.testing.assert_array_equal(rows_of_distances(config)[np.clip(away, -limit, limit) + limit], expected)


@pytest.mark.parametrize("seq", [1, 31, 33, 70, 300])
def test_scores_by_blocks_of_tokens_are_those_pair_by_pair(seq):
    """q_i · K'[row(i - j)] and k_j · Q'[row(i - j)] in float64, and their gradients; of one block and of several."""
    config = Config(relative_attention=True, position_buckets=16, max_relative_positions=64)
    known, rng = rows_of_distances(config), np.random.default_rng(seq)
    x, table = rng.standard_normal((2, seq, 3, 4)), rng.standard_normal((32, 3, 4))
    weights = rng.standard_normal((3, 2, seq, seq))
    away = np.arange(seq)[:, None] - np.arange(seq)
    rows = known[np.clip(away, -64, 64) + 64]
    formulas = {
        content_to_position: ("bihd,ijhd->hbij", lambda ct: np.einsum("hbij,ijhd->bihd", ct, table[rows])),
        position_to_content: ("bjhd,ijhd->hbij", lambda ct: np.einsum("hbij,ijhd->bjhd", ct, table[rows])),
    }
    with jax.enable_x64(True):
        far = distances(config, seq, None)
        read = jnp.asarray(table)
        for scores, (product, gradient) in formulas.items():

            def weighted(x, table, scores=scores):
                found = scores(far, x, table[far.rows])
                return (found * weights).sum(), found

            (into_x, into_table), found = jax.grad(weighted, (0, 1), has_aux=True)(jnp.asarray(x), read)
            assert subjects.error(found, np.einsum(product, x, table[rows])) < subjects.FLOAT64
            assert subjects.error(into_x, gradient(weights)) < subjects.FLOAT64
            expected = np.zeros_like(table)
            ends = "bihd,hbij->ijhd" if scores is content_to_position else "bjhd,hbij->ijhd"
            np.add.at(expected, rows, np.einsum(ends, x, weights))
            assert subjects.error(into_table, expected) < SUMS


def test_packed_segments_equal_separate_rows():
    """Positions and distances start anew in each segment, and the convolution reads nothing of its neighbours."""
    model = build(BASE | {"conv_kernel_size": 5}, "TOKEN_CLS")
    segments = np.array([[1] * 6 + [2] * 1 + [3] * 6] * 3)
    packed = outputs_of(model, input_ids=IDS, segment_ids=segments)
    for segment in (1, 2, 3):
        here = segments[0] == segment
        assert_close(packed[:, here], outputs_of(model, input_ids=IDS[:, here]))


def test_given_positions_are_the_distances(tmp_path):
    """Those of a packed row change nothing; any others are transformers', given the same distances."""
    theirs = torch_model(BASE, "FEATURE_EXTRACTION", DEBERTA.classes)
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    segments = np.array([[1] * 5 + [2] * 8] * 3)
    counted = np.array([[*range(5), *range(8)]] * 3)
    packed = outputs_of(ours, input_ids=IDS, segment_ids=segments)
    assert_close(outputs_of(ours, input_ids=IDS, segment_ids=segments, positions=counted), packed)

    positions = np.random.default_rng(1).permutation(19)[None, :SEQ]
    away = torch.tensor(positions[:, :, None] - positions[:, None, :])
    mask = torch.ones((1, SEQ))
    e = theirs.embeddings(torch.tensor(IDS[:1]), position_ids=torch.tensor(positions), mask=mask)
    expected = theirs.encoder(e, mask, relative_pos=theirs_module.make_log_bucket_position(away, 6, 9).long())
    found = outputs_of(ours, input_ids=IDS[:1], positions=positions)
    assert_close(found, expected.last_hidden_state.detach().numpy())


@pytest.mark.parametrize("seq, kept", [(16, True), (17, False)])
def test_a_text_has_no_number_per_pair_gathered_and_no_layer_keeps_one_of_a_long_text(seq, kept):
    """Where positions are given a gather is the way; in a text it would be most of the time."""
    model, ids = build(BASE, "TOKEN_CLS"), np.random.default_rng(0).integers(1, 53, (3, seq))

    def lowered(**inputs):
        graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(model, jpeft.LoRA(), key=jax.random.key(0)))
        loss = jax.grad(lambda leaves: jpeft.combine(graphdef, leaves, frozen)(ids, **inputs).sum())
        return jax.jit(loss).lower(trainable).as_text()

    gathered = re.compile(rf"stablehlo.gather.*-> tensor<[0-9x]*{seq}x{seq}xf32>")
    program = lowered()
    assert gathered.search(lowered(positions=np.arange(seq)[None]))
    assert not gathered.search(program)
    # of two layers, three heads and three rows; a head has 8 numbers
    assert bool(re.search(rf"tensor<2x3x3x{seq}x{seq}xf32>", program)) == kept


def test_embeddings_and_text_beyond_all_positions_are_transformers(tmp_path):
    """Distances have no end, so a model without a table of positions takes any text."""
    theirs = torch_model(V3 | {"embedding_size": 10}, "FEATURE_EXTRACTION", DEBERTA.classes)
    theirs.save_pretrained(tmp_path)
    embeds = np.random.default_rng(0).standard_normal((2, 31, 10)).astype(np.float32)
    expected = theirs(inputs_embeds=torch.tensor(embeds)).last_hidden_state
    assert_close(outputs_of(models.load(tmp_path), inputs_embeds=embeds), expected.detach().numpy())


def test_sequence_classification_reads_the_first_token_behind_padding(tmp_path):
    """A row padded in front is what transformers gives of the same row without padding."""
    config = V3 | {"conv_kernel_size": 3}
    theirs = torch_model(config, "SEQ_CLS", DEBERTA.classes)
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    inputs = batch(DEBERTA)
    found = outputs_of(ours, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for row in range(3):
        text = torch.tensor(inputs["input_ids"][row][inputs["attention_mask"][row] == 1])[None]
        assert_close(found[row], theirs(text).logits[0].detach().numpy())


# Methods --------------------------------------------------------------------------------------------------------------


def test_a_prefix_has_no_position(tmp_path):
    """Keys in front are scored by content alone, among scores of the text that are transformers'."""
    config = BASE | {"num_hidden_layers": 1}
    theirs = torch_model(config, "FEATURE_EXTRACTION", DEBERTA.classes)
    theirs.save_pretrained(tmp_path)
    ours = jpeft.adapt(models.load(tmp_path), jpeft.PrefixTuning(num_tokens=2), key=jax.random.key(0))
    graphdef, trainable, frozen = jpeft.partition(ours)
    values = np.random.default_rng(0).standard_normal((2, 2, 3, 8)).astype(np.float32)  # tokens, (k, v), heads, d_head
    (path,) = trainable
    ours = jpeft.combine(graphdef, {path: jnp.asarray(values.reshape(trainable[path].shape))}, frozen)

    def softmax(scores, dim):
        front = _QUERIES[-1] @ torch.tensor(values[:, 0]).permute(1, 2, 0) / (3 * 8) ** 0.5
        weights = torch.softmax(torch.cat([front, scores], dim), dim)
        _FRONT.append(weights[..., :2] @ torch.tensor(values[:, 1]).permute(1, 0, 2))
        return weights[..., 2:]

    _QUERIES, _FRONT = [], []
    attend = theirs.encoder.layer[0].attention.self
    attend.query_proj.register_forward_hook(
        lambda module, x, y: _QUERIES.append(y.view(3, SEQ, 3, 8).transpose(1, 2)) if y.shape[1] == SEQ else None
    )
    attend.register_forward_hook(lambda module, x, y: (y[0] + _FRONT[-1].transpose(1, 2).reshape(3, SEQ, 24), None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        expected = theirs(torch.tensor(IDS)).last_hidden_state.detach().numpy()
    assert_close(outputs_of(ours, input_ids=IDS), expected)


def test_the_pooler_is_trained_unless_modules_to_save_leave_it_out():
    """Pretrained checkpoints have none, so that it is drawn with the head, and would be lost without it."""
    model = build(V3, "SEQ_CLS")
    for entries, expected in {None: {"classifier", "pooler"}, ("classifier",): {"classifier"}, (): set()}.items():
        method = jpeft.LoRA(targets="all-linear", modules_to_save=entries)
        trained = jpeft.partition(jpeft.adapt(model, method, key=jax.random.key(0)))[1]
        assert {path.partition("/")[0] for path in trained if "/saved/" in path} == expected
        assert {path.partition("/")[0] for path in trained if "/lora/A" in path} == {"layers"}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_pooler_goes_to_peft_and_back(tmp_path):
    """Beside a LoRA on a projection that reads tokens and distances."""
    theirs = torch_model(V3, "SEQ_CLS", DEBERTA.classes)
    theirs.save_pretrained(tmp_path / "base")
    base = models.load(tmp_path / "base")
    ours = subjects.fill(jpeft.adapt(base, jpeft.LoRA(rank=3, alpha=5.0), key=jax.random.key(0)))
    jpeft.export_peft(ours, tmp_path / "adapter")
    with quiet():
        real = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    expected = real(torch.tensor(IDS)).logits.detach().numpy()
    assert_close(outputs_of(ours, input_ids=IDS), expected)
    assert_close(outputs_of(jpeft.import_peft(base, tmp_path / "adapter"), input_ids=IDS), expected)


def test_a_folder_of_peft_s_own_leaves_the_pooler(tmp_path):
    """PEFT saves `classifier` alone, and adapts the pooler's projection where targets name it."""
    theirs = torch_model(V3, "SEQ_CLS", DEBERTA.classes)
    theirs.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=["dense"], init_lora_weights=False)
    with quiet():
        real = peft.get_peft_model(theirs, config).eval()
        real.save_pretrained(str(tmp_path / "adapter"))
    ours = jpeft.import_peft(models.load(tmp_path / "base"), tmp_path / "adapter")
    assert "pooler/dense/adapters/lora/A" in jpeft.partition(ours)[1]
    assert_close(outputs_of(ours, input_ids=IDS), real(torch.tensor(IDS)).logits.detach().numpy())


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pretrained_checkpoint_starts_a_task(legacy, tmp_path, caplog):
    """Its heads of pretraining are dropped, and a table of positions that its config does without is not read."""
    hf = transformers.DebertaV2Config(**V3 | {"position_biased_input": True, "legacy": legacy})
    theirs = transformers.DebertaV2ForMaskedLM(hf)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"position_biased_input": true', '"position_biased_input": false'))
    ours = models.load(tmp_path, task="SEQ_CLS", num_labels=4)
    assert "initialised anew, to be trained: classifier/bias, classifier/kernel, pooler/dense/bias" in caplog.text
    expected = theirs.deberta.encoder.rel_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(ours.relative.rel_embeddings(), expected)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"talking_head": True}, "not supported: talking_head"),
        ({"pos_att_type": "p2c|p2p"}, "pos_att_type holds c2p and p2c alone; got .*p2p"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd must be 'none' or 'layer_norm'; got 'batch_norm'"),
        (
            {"relative_attention": False, "norm_rel_ebd": "layer_norm"},
            "needs relative_attention, without",
        ),
        ({"position_buckets": 7}, "position_buckets must be even and at least 4 .*; got 7 and 9"),
        ({"position_buckets": 16}, "max_relative_positions more than half of them and one; got 16 and 9"),
        ({"conv_kernel_size": 4}, "conv_kernel_size must be odd, so that each token has one output; got 4"),
        ({"conv_kernel_size": 3, "conv_groups": 5}, "hidden_size must be a multiple of conv_groups, got 24 and 5"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads, got 24 and 5"),
        ({"attention_head_size": 16}, "attention_head_size=16"),
        ({"pooler_hidden_size": 12}, "pooler_hidden_size=12"),
        ({"conv_act": "cube"}, "conv_act must be one of .*gelu.*; got 'cube'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.from_hf(BASE | changes)


def test_wrong_calls_are_refused():
    model = build(BASE, "TOKEN_CLS")
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(IDS, inputs_embeds=jnp.zeros((3, SEQ, 24)))
    with pytest.raises(ValueError, match="20 tokens are more than the 19 positions"):
        model(jnp.zeros((1, 20), int))
    with pytest.raises(ValueError, match="TOKEN_CLS of a deberta-v2 model has no pooler; it has one for SEQ_CLS"):
        model.pooled(jnp.zeros((3, SEQ, 24)))
    with pytest.raises(ValueError, match="SEQ_CLS gives one output per row"):
        build(BASE, "SEQ_CLS")(IDS, segment_ids=IDS)
