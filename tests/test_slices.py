# SPDX-License-Identifier: Apache-2.0
"""Meshes over the slices of a pod, on 8 fake devices that say of which slice they are."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.train.losses import SUMS
from jpeft.train.planning.exchange import over_dcn
from jpeft.train.step import begin, make_step

#: More words than a step has tokens, as models have: the compiler moves what is smaller, vectors or the table.
VOCAB = 8192
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,
}


@dataclasses.dataclass(frozen=True)
class OfASlice:
    """A fake device that says which slice of a pod it is of."""

    device: Any
    slice_index: int

    def __getattr__(self, name):
        return getattr(self.device, name)


def of_slices(count: int) -> list[OfASlice]:
    """The fake devices, taking turns on the slices."""
    return [OfASlice(device, i % count) for i, device in enumerate(jax.devices())]


def test_the_parts_of_an_axis_over_slices():
    """Every axis but `dcn`'s stays within a slice."""
    mesh = jpeft.mesh("dcn.data=2,fsdp=2,tensor=-1", of_slices(2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    for slice_, grid in enumerate(mesh.devices):
        assert {device.slice_index for device in grid.flat} == {slice_}
    both = jpeft.mesh({"dcn.data": 2, "data": 2, "fsdp": 2}, of_slices(2))
    assert [{device.slice_index for device in grid.flat} for grid in both.devices] == [{0}, {0}, {1}, {1}]
    assert dict(both.shape) == {"data": 4, "fsdp": 2, "sequence": 1, "tensor": 1}


def over_slices(axes: str) -> tuple[jax.sharding.Mesh, list[int]]:
    """A mesh over two slices, of devices that can compute, and the slice of each in the mesh's order."""
    made = jpeft.mesh(axes, of_slices(2))
    real = np.vectorize(lambda device: device.device)(made.devices)
    slices = [device.slice_index for device in made.devices.flat]
    return jax.sharding.Mesh(real, made.axis_names, axis_types=made.axis_types), slices


@pytest.mark.parametrize(
    "axes",
    [
        "dcn.data=2,fsdp=2,tensor=2",
        *(
            pytest.param(axes, marks=pytest.mark.slow)
            for axes in ("dcn.data=2,fsdp=4", "dcn.data=2,data=2,sequence=2", "dcn.fsdp=2,fsdp=4")
        ),
    ],
)
def test_training_over_slices_is_one_devices(axes):
    """Three updates of AdamW. Over `dcn.data` goes what is trained, once an update, and nothing of the base."""
    mesh, slices = over_slices(axes)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCAB, (3, 2, 8, 128)).astype(np.int32)  # updates, micro-batches, rows, tokens
    mask = (np.arange(128) < rng.integers(64, 129, (3, 2, 8, 1))).astype(np.int32)
    batches = [
        {"input_ids": i, "attention_mask": m, "labels": np.where(m, i, -100)} for i, m in zip(ids, mask, strict=True)
    ]
    method = jpeft.LoRA(rank=4, targets="all-linear", init="orthogonal")
    model = jpeft.adapt(jpeft.models.build(LLAMA, key=jax.random.key(0)), method, key=jax.random.key(1))
    tx = optax.adamw(1e-2, eps=1e-4)

    def train(model, place):
        graphdef, trainable, frozen = jpeft.partition(model)
        update = make_step(graphdef, SUMS["CAUSAL_LM"], tx, groups=mesh.shape["data"] * mesh.shape["fsdp"])
        state, losses = begin(tx, trainable), []
        text = update.lower(state, frozen, place(batches[0]), None).compile().as_text()
        for batch in batches:
            state, metrics = update(state, frozen, place(batch), None)
            losses.append(float(metrics.loss))
        return losses, state.trainable, text

    rows = jax.sharding.NamedSharding(mesh, P(None, ("data", "fsdp")))
    want_losses, want, _ = train(model, lambda batch: batch)
    losses, trained, text = train(jpeft.shard(model, mesh), lambda batch: jax.device_put(batch, rows))
    np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-5)
    for path, leaf in trained.items():
        assert np.linalg.norm(leaf - np.asarray(want[path])) < 1e-4 * np.linalg.norm(want[path]), path
    sent = over_dcn(text, slices)
    if "dcn.data" in axes:
        assert {*sent} == {"all-reduce"}
        trained_bytes = sum(leaf.nbytes for leaf in want.values())
        assert sent["all-reduce"][1] <= trained_bytes + 64  # and the sums of losses and counts
    else:  # fsdp over slices gathers the base over them, which `dcn.data` is there to avoid
        assert "all-gather" in sent


@pytest.mark.parametrize(
    "axes, message",
    [
        ("dcn.data=4,fsdp=2", "the dcn axes of a mesh make up 4 slices of 2 devices; there are 2, of 4"),
        ("dcn.data=2,dcn.fsdp=2,fsdp=4", "a mesh of dcn.data=2,dcn.fsdp=2,data=1,fsdp=4,tensor=1 takes 16 devices"),
        ("dcn.model=2", "unknown mesh axis 'dcn.model'"),
    ],
)
def test_slices_that_are_not_there_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        jpeft.mesh(axes, of_slices(2))


def test_hosts_are_slices_where_there_are_none():
    with pytest.raises(ValueError, match="the dcn axes of a mesh make up 2 processes of 4 devices; there are 1, of 8"):
        jpeft.mesh("dcn.data=2,fsdp=4")
