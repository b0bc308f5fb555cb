# SPDX-License-Identifier: Apache-2.0
"""Folders in and out: what is read and written, bit for bit; what is refused, by name; and in how much memory."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from flax import nnx
from saved_bert import TINY, _folder, assert_equal, flat, read_tensors, saved  # noqa: F401 (the fixture)

from jpeft import models
from jpeft.models import CheckpointError, _safetensors
from jpeft.models._checkpoint import INDEX, SINGLE, open_checkpoint
from jpeft.models._table import How, Ignore, Renamed, Rule, Tied, module_names
from jpeft.models._weights import load_leaves, save_leaves


def _rewrite(folder, tensors, **config):
    """The folder with other tensors, and other attributes in its config.json."""
    safetensors.torch.save_file(tensors, folder / SINGLE)
    hf = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(hf))


# Both ways ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_comes_back(dtype, tmp_path):
    folder = saved(tmp_path / "theirs", dtype=dtype)
    model = models.load(folder)
    assert {str(leaf.dtype) for leaf in flat(model).values()} == {str(dtype).removeprefix("torch.")}
    models.save(model, tmp_path / "ours")
    assert_equal(read_tensors(tmp_path / "ours"), read_tensors(folder))
    with safetensors.safe_open(tmp_path / "ours" / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "ours", folder))
    assert ours == theirs


def test_shards_are_read_and_written(tmp_path):
    folder = saved(tmp_path / "theirs", max_shard_size="5KB")
    assert (folder / INDEX).is_file()
    model = models.load(folder)
    entries = models.bert.WEIGHTS(model.config, model.task)
    (tmp_path / "ours").mkdir()
    save_leaves(tmp_path / "ours", entries, flat(model), shard_bytes=4000)
    files = sorted(tmp_path.glob("ours/*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = safetensors.torch.load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 4000
    shutil.copy(folder / "config.json", tmp_path / "ours")
    assert_equal(read_tensors(tmp_path / "ours"), read_tensors(folder))
    torch_class: Any = transformers.BertForSequenceClassification
    _, info = torch_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    index = json.loads((tmp_path / "ours" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(folder).values())


def test_dtype_is_converted_while_reading(folder):
    exact, rough = models.load(folder), models.load(folder, dtype=jnp.bfloat16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), flat(exact), flat(rough))
    with pytest.raises(
        TypeError, match=r"dtype must be a floating-point type such as jnp\.bfloat16; got <class 'int'>"
    ):
        models.load(folder, dtype=int)


def test_the_dtype_that_most_have_is_kept_and_the_mix_is_said(folder, caplog):
    tensors = {k: t.bfloat16() if t.ndim == 2 else t for k, t in read_tensors(folder).items()}
    _rewrite(folder, tensors)
    assert {leaf.dtype for leaf in flat(models.load(folder)).values()} == {jnp.dtype(jnp.bfloat16)}
    assert "the checkpoint mixes BF16, F32; everything is read as BF16" in caplog.text


def test_blocks_of_rows_make_up_a_tensor(folder, monkeypatch):
    expected = flat(models.load(folder))
    monkeypatch.setattr(_safetensors, "_BLOCK_BYTES", 100)
    jax.tree.map(np.testing.assert_array_equal, flat(models.load(folder)), expected)


def test_axes_are_permuted_both_ways(tmp_path):
    """A kernel of a convolution, torch's [out in h w] and flax's [h w in out]."""
    value = torch.randn(5, 3, 2, 4)
    safetensors.torch.save_file({"conv.weight": value}, tmp_path / SINGLE)
    table = [Rule("conv.weight", "conv/kernel", How((2, 3, 1, 0), (3, 2, 0, 1)))]
    shapes = {"conv/kernel": jax.ShapeDtypeStruct((2, 4, 3, 5), jnp.float32)}
    leaves = load_leaves(open_checkpoint(tmp_path), table, shapes)
    np.testing.assert_array_equal(leaves["conv/kernel"], value.numpy().transpose(2, 3, 1, 0))
    save_leaves(tmp_path, table, leaves)
    assert_equal(read_tensors(tmp_path), {"conv.weight": value})


def test_names_of_modules_and_of_what_is_around_them():
    table = [Rule("a.layers.{i}.mlp.up.weight", "layers/mlp/up/kernel"), Rule("a.norm.weight", "norm/scale")]
    assert module_names(table, 2) == {
        "layers/mlp/up": ("a.layers.0.mlp.up", "a.layers.1.mlp.up"),
        "layers/mlp": ("a.layers.0.mlp", "a.layers.1.mlp"),
        "layers": ("a.layers.0", "a.layers.1"),
        "norm": ("a.norm",),
    }


# Tasks --------------------------------------------------------------------------------------------------------------


def test_a_backbone_gets_a_new_head(tmp_path, caplog):
    folder = saved(tmp_path / "model", transformers.BertModel)
    model = models.load(folder, "SEQ_CLS", num_labels=4, key=jax.random.key(1))
    assert caplog.messages == ["initialised anew, to be trained: classifier/bias, classifier/kernel"]
    backbone, leaves = flat(models.load(folder)), flat(model)
    jax.tree.map(np.testing.assert_array_equal, {path: leaves[path] for path in backbone}, backbone)
    again = flat(models.load(folder, "SEQ_CLS", num_labels=4, key=jax.random.key(1)))
    other = flat(models.load(folder, "SEQ_CLS", num_labels=4))
    np.testing.assert_array_equal(leaves["classifier/kernel"], again["classifier/kernel"])
    assert leaves["classifier/kernel"].shape == (12, 4)
    assert np.all(leaves["classifier/kernel"] != other["classifier/kernel"])


def test_a_head_is_dropped_for_the_hidden_states(folder, caplog):
    model = models.load(folder, "FEATURE_EXTRACTION")
    assert caplog.messages == ["dropped weights of another task: classifier.bias, classifier.weight"]
    expected = {path: leaf for path, leaf in flat(models.load(folder)).items() if not path.startswith("classifier")}
    jax.tree.map(np.testing.assert_array_equal, flat(model), expected)


def test_a_pretraining_head_is_dropped_when_a_task_is_asked_for(tmp_path, caplog):
    folder = saved(tmp_path / "model", transformers.BertForPreTraining)
    with pytest.raises(ValueError, match="no task of the zoo is BertForPreTraining; pass task=, one of SEQ_CLS, TOKEN"):
        models.load(folder)
    models.load(folder, "QUESTION_ANS")
    dropped, fresh = caplog.messages
    assert "cls.predictions.bias" in dropped
    assert "bert.pooler.dense.weight" in dropped
    assert fresh == "initialised anew, to be trained: qa_outputs/bias, qa_outputs/kernel"


@pytest.mark.parametrize("task, num_labels", [("TOKEN_CLS", 3), ("SEQ_CLS", 5), (None, 5)])
def test_a_head_of_another_meaning_or_size_is_not_used(folder, caplog, task, num_labels):
    """Both tasks call it `classifier`, here even with equal shapes."""
    model = models.load(folder, task, num_labels=num_labels)
    assert "dropped the saved head: classifier.bias, classifier.weight" in caplog.messages
    assert model.classifier.kernel.shape == (12, num_labels)
    assert not np.any(model.classifier.bias[...])
    assert model.config.to_hf()["id2label"] == {str(i): f"LABEL_{i}" for i in range(num_labels)}


def test_asking_for_what_was_saved_stays_strict(folder):
    tensors = read_tensors(folder)
    del tensors["classifier.bias"]
    _rewrite(folder, tensors)
    for task in (None, "SEQ_CLS"):
        with pytest.raises(CheckpointError, match=r"missing keys: classifier\.bias"):
            models.load(folder, task, num_labels=3)


def test_strange_keys_are_errors_whatever_the_task(folder):
    _rewrite(folder, read_tensors(folder) | {"bert.strange.weight": torch.ones(3)})
    for task in (None, "TOKEN_CLS", "FEATURE_EXTRACTION"):
        with pytest.raises(CheckpointError, match=r"no place for: bert\.strange\.weight"):
            models.load(folder, task)


def test_old_names_and_buffers(folder):
    expected = flat(models.load(folder))
    tensors = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): t for k, t in read_tensors(folder).items()}
    tensors = {k.replace("LayerNorm.bias", "LayerNorm.beta"): t for k, t in tensors.items()}
    _rewrite(folder, tensors | {"bert.embeddings.position_ids": torch.arange(16)[None]})
    jax.tree.map(np.testing.assert_array_equal, flat(models.load(folder)), expected)


def test_wrong_tasks_are_refused(folder):
    with pytest.raises(ValueError, match=r"bert has the tasks SEQ_CLS, .*; got 'CAUSAL_LM'"):
        models.load(folder, "CAUSAL_LM")
    with pytest.raises(
        ValueError, match="num_labels is 1 or more and belongs to SEQ_CLS, TOKEN_CLS, IMAGE_CLS; got 4 with QUES"
    ):
        models.load(folder, "QUESTION_ANS", num_labels=4)
    with pytest.raises(ValueError, match=r"remat must be one of none, dots, .*; got 'some'"):
        models.load(folder, remat="some")


# What is refused ----------------------------------------------------------------------------------------------------


def test_every_misfit_is_named_at_once(folder):
    tensors = read_tensors(folder)
    tensors["bert.encoder.layer.2.output.dense.bias"] = torch.ones(12)
    del tensors["bert.pooler.dense.weight"], tensors["bert.encoder.layer.1.attention.self.query.bias"]
    tensors["classifier.weight"] = torch.ones(4, 12)
    tensors["bert.encoder.layer.0.output.dense.weight"] = torch.ones(20, 12)
    tensors["classifier.bias"] = torch.ones(3, dtype=torch.int8)
    _rewrite(folder, tensors)
    with pytest.raises(CheckpointError) as error:
        models.load(folder)
    assert str(error.value).splitlines()[1:] == [
        "  keys that the model has no place for: bert.encoder.layer.2.output.dense.bias",
        "  missing keys: bert.encoder.layer.1.attention.self.query.bias, bert.pooler.dense.weight",
        "  bert.encoder.layer.0.output.dense.weight is [20, 12], the model needs [12, 20]",
        "  classifier.weight is [4, 12], the model needs [3, 12]",
        "  classifier.bias is I8; a weight is one of BF16, F16, F32, F64",
    ]


def test_a_table_that_does_not_cover_the_model_is_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / SINGLE)
    shapes = {path: jax.ShapeDtypeStruct((2,), jnp.float32) for path in ("a", "b")}
    with pytest.raises(CheckpointError, match="leaves that no rule sets: b"):
        load_leaves(open_checkpoint(tmp_path), [Rule("a", "a")], shapes)
    with pytest.raises(CheckpointError, match="rules for leaves that the model does not have: c"):
        load_leaves(open_checkpoint(tmp_path), [Rule("a", "a"), Rule("b", "b"), Rule("c", "c")], shapes)
    with pytest.raises(CheckpointError, match="the table and the model disagree about b; merge or strip adapters"):
        save_leaves(tmp_path, [Rule("a", "a")], {"a": jnp.ones(2), "b": jnp.ones(2)})


def test_a_tied_copy_must_agree(tmp_path):
    table = [Rule("embed.weight", "embed/embedding"), Tied("lm_head.weight", "embed/embedding")]
    shapes = {"embed/embedding": jax.ShapeDtypeStruct((5, 3), jnp.float32)}
    embed = torch.randn(5, 3)
    for tensors in ({}, {"lm_head.weight": embed.clone()}):
        safetensors.torch.save_file({"embed.weight": embed} | tensors, tmp_path / SINGLE)
        np.testing.assert_array_equal(load_leaves(open_checkpoint(tmp_path), table, shapes)["embed/embedding"], embed)
    for other in (embed + 1, embed.bfloat16(), embed[:4].clone()):
        safetensors.torch.save_file({"embed.weight": embed, "lm_head.weight": other}, tmp_path / SINGLE)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from embed\.weight, but the config ties"):
            load_leaves(open_checkpoint(tmp_path), table, shapes)


def test_ignored_and_renamed_keys(tmp_path):
    table = [Rule("n.{i}.weight", "n/scale"), Ignore("n.{i}.inv"), Ignore("...freq"), Renamed(".gamma", ".weight")]
    shapes = {"n/scale": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    one = torch.ones(3)
    tensors = {"n.0.gamma": one, "n.1.weight": 2 * one, "n.0.inv": 3 * one, "a.b.freq": 4 * one}
    safetensors.torch.save_file(tensors, tmp_path / SINGLE)
    np.testing.assert_array_equal(load_leaves(open_checkpoint(tmp_path), table, shapes)["n/scale"][:, 0], [1, 2])
    safetensors.torch.save_file(tensors | {"n.x.inv": 5 * one}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"no place for: n\.x\.inv"):
        load_leaves(open_checkpoint(tmp_path), table, shapes)


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*nowhere/config\.json; a model folder holds config\.json and"):
        models.load(tmp_path / "nowhere")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights \(pytorch_model\.bin\), which can run code"):
        models.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*config\.json"):
        models.load(folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_broken_indices(tmp_path):
    folder = saved(tmp_path / "model", max_shard_size="5KB")
    index = json.loads((folder / INDEX).read_text())
    weight_map = index["weight_map"]
    first = min(weight_map.values())
    outside = weight_map | {"classifier.bias": "../other.safetensors", "classifier.weight": "/etc/passwd"}
    moved = weight_map | {"classifier.bias": "model-00002-of-00099.safetensors"}
    swapped = {key: max(weight_map.values()) if file == first else file for key, file in weight_map.items()}
    for broken, error, message in [
        (json.dumps({"weight_map": outside}), CheckpointError, r"outside of its folder: \.\./other.*, /etc/passwd"),
        (
            json.dumps({"weight_map": moved}),
            FileNotFoundError,
            "lacks the shards model-00002-of-00099.safetensors that",
        ),
        (json.dumps({"weight_map": swapped}), CheckpointError, "and its shards disagree about bert"),
        ("{", CheckpointError, r"index\.json is not JSON"),
        ("{}", CheckpointError, "must be JSON with a weight_map"),
    ]:
        (folder / INDEX).write_text(broken)
        with pytest.raises(error, match=message):
            models.load(folder)
    (folder / INDEX).write_text(json.dumps(index))
    (folder / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the shards {first}"):
        models.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1])
def test_a_file_cut_short_is_refused(folder, keep):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=f"{SINGLE} (is no safetensors file|should have {len(content)} bytes)"):
        models.load(folder)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{not json", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [3]}}', b"\xff\xfe"],
    ids=["list", "text", "number", "no offsets", "not UTF-8"],
)
def test_a_header_that_is_none_is_refused(folder, header):
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="its header cannot be read"):
        models.load(folder)


def test_a_header_that_contradicts_itself_is_refused(folder):
    header = b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"a says F32 \[3\] but lies at bytes 0 to 8"):
        models.load(folder)


def test_a_file_that_ends_while_being_read_is_refused(folder):
    tensors = open_checkpoint(folder)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:4000])
    model = nnx.eval_shape(lambda: models.build(TINY, "SEQ_CLS", key=jax.random.key(0), num_labels=3))
    entries, shapes = models.bert.WEIGHTS(model.config, model.task), flat(model)
    with pytest.raises(CheckpointError, match="ended while being read: copy it again"):
        load_leaves(tensors, entries, shapes)


def test_configs_that_cannot_be_read(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        models.load(folder)
    (folder / "config.json").write_text('{"model_type": "gpt9"}')
    with pytest.raises(ValueError, match="model_type 'gpt9'; the zoo has bert, "):
        models.load(folder)


def test_quantized_files_are_refused(folder):
    safetensors.torch.save_file({"a": torch.ones(3, dtype=torch.uint8)}, folder / SINGLE)
    with pytest.raises(CheckpointError, match="no floating-point tensor; quantized files are not read"):
        models.load(folder)
