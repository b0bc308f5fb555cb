# SPDX-License-Identifier: Apache-2.0
"""A small BERT that transformers saved, and what the tests of loading and saving look at."""

import pytest
import safetensors.torch
import torch
import transformers
from flax import nnx

TINY = {
    "model_type": "bert", "vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 20, "max_position_embeddings": 16, "type_vocab_size": 2,
}  # fmt: skip


@pytest.fixture(name="folder")
def _folder(tmp_path):
    """A classifier with 3 labels, saved by transformers."""
    return saved(tmp_path / "model")


def saved(folder, torch_class=transformers.BertForSequenceClassification, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = torch_class(transformers.BertConfig(**(TINY | {"num_labels": 3}))).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))
    model.save_pretrained(folder, **options)
    return folder


def read_tensors(folder):
    return {k: t for file in folder.glob("*.safetensors") for k, t in safetensors.torch.load_file(file).items()}


def flat(model):
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
