# SPDX-License-Identifier: Apache-2.0
"""Folders of AdapterHub's `adapters` that are refused, and what is said; what older versions of it wrote."""

import json
import os
import pickle
import re
import sys

import adapterhub_oracle as oracle
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

import jpeft
from jpeft.models import CheckpointError

KEY = jax.random.key(0)
WEIGHTS = "adapter.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A new folder of the case "pfeiffer" on BERT."""
    return oracle.unpacked("bert", "pfeiffer", tmp_path / "a")


def reconfigure(folder, whole=None, **changes):
    """Changes keys of the configuration proper, and of the file."""
    file = folder / "adapter_config.json"
    held = json.loads(file.read_text())
    held["config"] |= changes
    file.write_text(json.dumps(held | (whole or {})))


def change(folder, how):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    how(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


def test_all_that_does_not_fit_is_one_error(folder):
    def how(tensors):
        start = "encoder.layer.{}.output.adapters.a."
        del tensors[start.format(0) + "adapter_up.bias"]
        tensors[start.format(1) + "adapter_up.weight"] = np.ones((16, 5), np.float32)
        tensors[start.format(1) + "adapter_norm.weight"] = np.ones(16, np.float32)

    change(folder, how)
    with pytest.raises(CheckpointError) as caught:
        jpeft.import_adapters(oracle.base("bert"), folder)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "bert.encoder.layer.0.output.adapters.a.adapter_up.bias is missing",
        "bert.encoder.layer.1.output.adapters.a.adapter_norm.weight is unknown",
        "bert.encoder.layer.1.output.adapters.a.adapter_up.weight is [16, 5], the model needs [16, 4]",
    ]


def test_values_that_are_not_finite_and_tensors_that_are_no_floats(folder):
    key = "encoder.layer.0.output.adapters.a.adapter_up.bias"
    change(folder, lambda t: t.update({key: t[key] + np.nan}))
    with pytest.raises(CheckpointError, match=f"{re.escape(key)} has values that are not finite"):
        jpeft.import_adapters(oracle.base("bert"), folder)
    change(folder, lambda t: t.update({k: np.ones(v.shape, np.int32) for k, v in t.items()}))
    with pytest.raises(CheckpointError, match=r"tensors that are no floats: .*I32"):
        jpeft.import_adapters(oracle.base("bert"), folder)


def test_half_of_a_copy_that_differs(tmp_path):
    """A norm before has two names, and a prefix one more for every layer."""
    folder = oracle.unpacked("bert", "norms", tmp_path / "norms")
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    tensors["encoder.layer.0.output.adapters.a.adapter_down.0.weight"] = torch.ones(16)
    torch.save(tensors, folder / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match="differs from the tensor that it is tied to"):
        jpeft.import_adapters(oracle.base("bert"), folder)
    folder = oracle.unpacked("bert", "prefix", tmp_path / "prefix")
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    copy = next(key for key in tensors if ".layer.1." in key)
    tensors[copy] = tensors[copy] + 1
    torch.save(tensors, folder / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match="of which it is a copy"):
        jpeft.import_adapters(oracle.base("bert"), folder)


class Evil:
    """What a pickle can be: a call of anything."""

    def __reduce__(self):
        return os.system, ("touch /tmp/jpeft_was_here",)


@pytest.mark.parametrize("write", [pickle.dump, lambda held, file: torch.save(held, file)])
def test_no_pickle_of_anything_else_is_opened(folder, write):
    (folder / WEIGHTS).unlink()
    with open(folder / "pytorch_adapter.bin", "wb") as file:
        write({"a": Evil()}, file)
    with pytest.raises(CheckpointError, match="is no pickle of tensors alone, and no other is opened"):
        jpeft.import_adapters(oracle.base("bert"), folder)
    assert not os.path.exists("/tmp/jpeft_was_here")
    torch.save({"a": 1}, folder / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match="holds something else than tensors by their names"):
        jpeft.import_adapters(oracle.base("bert"), folder)


def test_a_pickle_needs_a_torch_that_opens_it_safely(folder, monkeypatch):
    torch.save({}, folder / "pytorch_adapter.bin")
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(ImportError, match=r"torch 2\.5\.1 can be made to run code.*use_safetensors=True"):
        jpeft.import_adapters(oracle.base("bert"), folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs torch to be opened \(pip install torch\)"):
        jpeft.import_adapters(oracle.base("bert"), folder)
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*adapter\.safetensors, and no pytorch_adapter\.bin"):
        jpeft.import_adapters(oracle.base("bert"), folder)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"stochastic_depth": 0.1}, "what jpeft's bottleneck adapters does not do: stochastic_depth=0.1"),
        ({"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}, "invertible adapters act elsewhere"),
        ({"leave_out": [2]}, "leave_out names layer 2, and the model has 2"),
        ({"novelty": 3}, "keys that adapters 1.3.0 does not know: novelty=3"),
        ({"reduction_factor": {"0": 4}}, "no entry for layer 1 and no default"),
        ({"non_linearity": "mish"}, "mish"),
        ({"architecture": "prompt_tuning"}, "of the architecture 'prompt_tuning', which jpeft does not read"),
    ],
)
def test_a_configuration_that_asks_for_something_else(folder, changes, said):
    reconfigure(folder, **changes)
    with pytest.raises(ValueError, match=said):
        jpeft.import_adapters(oracle.base("bert"), folder)


def test_a_file_that_is_not_the_librarys(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="is no configuration of adapters: it has name None and config None"):
        jpeft.import_adapters(oracle.base("bert"), folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapters' save_adapter writes it"):
        jpeft.import_adapters(oracle.base("bert"), folder)


def test_a_family_that_the_library_names_otherwise(tmp_path):
    shape = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf = {"model_type": "qwen2", "intermediate_size": 20, "num_key_value_heads": 2, **shape}
    model = jpeft.adapt(jpeft.models.build(hf, "FEATURE_EXTRACTION", key=KEY), jpeft.Pfeiffer(), key=KEY)
    with pytest.raises(ValueError, match="has no qwen2 that jpeft writes for; it has bert, roberta"):
        jpeft.export_adapters(model, tmp_path)


def test_layers_of_one_stack_alone(tmp_path):
    folder = oracle.unpacked("t5", "pfeiffer", tmp_path)
    reconfigure(folder, leave_out=[1])
    with pytest.raises(ValueError, match="other layers in the encoder than in the decoder"):
        jpeft.import_adapters(oracle.base("t5"), folder)
    reconfigure(folder, leave_out=[], reduction_factor={"0": 2, "default": 4})
    with pytest.raises(ValueError, match="differs between layer 0 of the encoder and of the decoder"):
        jpeft.import_adapters(oracle.base("t5"), folder)


def test_several_adapters_and_another_folder_of_a_head(tmp_path):
    model = jpeft.adapt(oracle.base("bert"), jpeft.Pfeiffer(), key=KEY, name="one")
    model = jpeft.adapt(model, jpeft.Houlsby(), key=KEY, name="two")
    with pytest.raises(ValueError, match="the adapters one, two, and a folder of adapters holds one: pass name="):
        jpeft.export_adapters(model, tmp_path / "out")
    jpeft.export_adapters(model, tmp_path / "out", name="two")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["name"] == "two"


def test_an_export_over_an_older_one_leaves_nothing_of_it(folder):
    (folder / "pytorch_adapter.bin").write_bytes(b"old")
    (folder / "head_config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    jpeft.export_adapters(jpeft.adapt(oracle.base("bert"), jpeft.Pfeiffer(), key=KEY), folder)
    assert {file.name for file in folder.iterdir()} == {WEIGHTS, "adapter_config.json", "notes.txt"}


def test_older_versions_are_read_as_they_meant_it(tmp_path):
    """Without a version gelu was the other one; before 1.1.0 every LoRA was trained at alpha = r."""
    folder = oracle.unpacked("bert", "residual after", tmp_path / "gelu")
    held = json.loads((folder / "adapter_config.json").read_text())
    del held["version"]
    (folder / "adapter_config.json").write_text(json.dumps(held))
    (row,) = jpeft.summary(jpeft.import_adapters(oracle.base("bert"), folder)).rows
    assert row.method.non_linearity == "gelu_new"
    folder = oracle.unpacked("bert", "lora", tmp_path / "lora")
    reconfigure(folder, {"version": "adapters.1.0.1"})
    (row,) = jpeft.summary(jpeft.import_adapters(oracle.base("bert"), folder)).rows
    assert (row.method.rank, row.method.alpha) == (3, 3)


def test_a_head_is_left_out_where_it_is_not_wanted(tmp_path):
    folder = oracle.unpacked("bert", "classifier", tmp_path)
    model = jpeft.import_adapters(oracle.model_of("bert", "classifier"), folder, head=False)
    assert not [path for path in jpeft.partition(model)[1] if "saved" in path]
    two = jpeft.models.load(oracle.base_folder("bert", "classifier", tmp_path / "base"), "SEQ_CLS", num_labels=2)
    with pytest.raises(CheckpointError, match=r"classifier\.weight is \[3, 16\], the model needs \[2, 16\]"):
        jpeft.import_adapters(two, folder)


@pytest.mark.parametrize("name", ["../a", "/etc", "..", "a/b", ""])
def test_a_setup_names_folders_of_its_own(name, tmp_path):
    folder = oracle.unpacked("bert", "fusion", tmp_path / "inner")
    file = folder / "adapter_setup.json"
    file.write_text(file.read_text().replace('"a"', json.dumps(name)))
    with pytest.raises(ValueError, match="and the adapters of a setup are folders in it"):
        jpeft.import_adapters(oracle.base("bert"), folder)


def test_a_name_without_end(folder):
    reconfigure(folder, {"name": "x" * 5000})
    with pytest.raises(ValueError, match="has a name of 5000 characters; adapters are named by 255 at most"):
        jpeft.import_adapters(oracle.base("bert"), folder)
