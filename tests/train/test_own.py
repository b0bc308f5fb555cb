# SPDX-License-Identifier: Apache-2.0
"""The folder of adapters in jpeft's own format: every leaf comes back, and nothing else is taken for it."""

import json

import jax
import numpy as np
import pytest
import safetensors.flax
import subjects
from saved_bert import TINY

import jpeft
from jpeft.models import CheckpointError
from jpeft.train import config, own

KEY = jax.random.key(7)
METHODS = {
    "lora, vera": [{"kind": "lora", "rank": 2, "init": "olora"}, {"kind": "vera", "rank": 4}],
    "unipelt's parts": [{"kind": "prefix_tuning", "num_tokens": 3, "projection": True}, {"kind": "pfeiffer"}],
    "full": {"kind": "full"},
    "reft": {"kind": "loreft", "rank": 2},
    "tokens beside": {"kind": "lora", "rank": 2, "trainable_token_indices": [1, 4]},
    "adalora": {"kind": "adalora", "total_steps": 9, "init_rank": 4, "target_rank": 2},
}


def base(**options):
    return jpeft.models.build(TINY | options, "SEQ_CLS", key=jax.random.key(0))


def filled(method):
    return subjects.fill(jpeft.adapt(base(), config.method(method), key=KEY))


FAST = ("lora, vera", "reft", "tokens beside")


@pytest.mark.parametrize(
    "method", [pytest.param(m, id=i, marks=() if i in FAST else pytest.mark.slow) for i, m in METHODS.items()]
)
def test_every_leaf_comes_back(method, tmp_path):
    model = filled(method)
    own.write(model, method, tmp_path / "adapter ü", "base")
    back = own.read(base(), tmp_path / "adapter ü")
    for ours, theirs in zip(jpeft.partition(model)[1:], jpeft.partition(back)[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for path in ours:
            np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    ids = np.array([[1, 5, 4, 2]])
    np.testing.assert_array_equal(model(ids), back(ids))
    assert "jpeft adapter for base" in (tmp_path / "adapter ü" / "README.md").read_text()


@pytest.fixture(name="folder")
def _folder(tmp_path):
    return own.write(filled(METHODS["reft"]), METHODS["reft"], tmp_path / "adapter", "base")


def _leaves(folder, change):
    leaves = safetensors.flax.load_file(folder / own.WEIGHTS)
    change(leaves)
    safetensors.flax.save_file(leaves, folder / own.WEIGHTS)


def test_other_leaves_are_refused_by_name(folder):
    def change(leaves):
        first, second, third, *_ = sorted(leaves)
        leaves["more"] = leaves.pop(first)
        leaves[second] = leaves[second][..., :1]
        leaves[third] = leaves[third] * np.nan

    _leaves(folder, change)
    with pytest.raises(CheckpointError) as error:
        own.read(base(), folder)
    for said in ("more is in the file, and", "is not in the file", "in the file, here float32", "not finite"):
        assert said in str(error.value)


def test_another_model_is_refused(folder):
    with pytest.raises(CheckpointError, match="does not fit the model"):
        own.read(base(hidden_size=24), folder)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"version": 2}, "is of version 2; this jpeft reads version 1"),
        ({"method": "lora"}, "must hold version, method"),
        ({"method": {"kind": "lara"}}, "jpeft_adapter.json: method.kind is one of"),
        ({"num_labels": "2"}, "must hold version, method"),
    ],
)
def test_another_description_is_refused(change, said, folder):
    file = folder / own.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        own.read(base(), folder)


def test_missing_and_cut_files(folder):
    weights = folder / own.WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=own.WEIGHTS):
        own.read(base(), folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="which belongs to"):
        own.read(base(), folder)


def test_what_is_not_finite_is_not_written(tmp_path):
    model = jax.tree.map(lambda x: x, filled(METHODS["reft"]))
    graphdef, trainable, frozen = jpeft.partition(model)
    path = min(trainable)
    broken = jpeft.combine(graphdef, trainable | {path: trainable[path] * np.inf}, frozen)
    with pytest.raises(ValueError, match=f"{path}.*not finite"):
        own.write(broken, METHODS["reft"], tmp_path / "adapter", "base")
    assert not (tmp_path / "adapter").exists()
