# SPDX-License-Identifier: Apache-2.0
"""The optimizer's state in the host's memory between updates: the same updates, and none of it on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import subjects
from contracts.models import LLAMA

import jpeft
from jpeft.io.checkpoint import Checkpoints
from jpeft.train import config, loop
from jpeft.train.losses import lm_sums
from jpeft.train.step import begin, make_step

KEY = jax.random.key(0)
BATCH = {name: jnp.asarray(np.arange(64).reshape(1, 8, 8) % 7, jnp.int32) + 1 for name in ("input_ids", "labels")}


def kinds(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("devices", [1, 8])
def test_updates_are_the_same_and_the_state_lies_on_the_host(devices):
    model = jpeft.models.build(LLAMA, "CAUSAL_LM", key=KEY)
    model = jpeft.adapt(model, jpeft.LoRA(rank=2, targets=["q_proj", "down_proj"]), key=KEY)
    if devices > 1:
        model = jpeft.shard(model, jpeft.mesh(f"fsdp={devices}"))
    graphdef, trainable, frozen = jpeft.partition(model)
    tx = optax.adamw(1e-2)
    states = {}
    for offload in (False, True):
        update = make_step(graphdef, lm_sums, tx, groups=devices)
        state = begin(tx, trainable, offload=offload)
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        for _ in range(3):
            state, metrics = update(state, frozen, BATCH, None)
        assert kinds(state.optimizer) == ({"pinned_host"} if offload else {"device"})
        assert kinds(state.trainable) == {"device"}
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
        assert np.isfinite(metrics.loss)
        states[offload] = state
    for path, leaf in states[False].trainable.items():
        np.testing.assert_array_equal(leaf, states[True].trainable[path])
    moments = [jax.tree.leaves(states[offload].optimizer) for offload in (False, True)]
    assert all(subjects.error(b, a) == 0 for a, b in zip(*moments, strict=True))


def test_a_run_with_it_is_the_run_without_and_its_checkpoints_come_back_to_the_host(classify, tmp_path):
    told = ["train.epochs=null", "train.max_steps=4", "train.batch_size=8", "train.save_every=2", "data.num_widths=1"]

    def run(out, *more):
        overrides = [*told, *more, f"out={tmp_path / out}"]
        return loop.train(config.parse(config.overridden(classify, overrides))).state

    plain, offloaded = run("plain"), run("offloaded", "optimizer.offload=true")
    assert kinds(offloaded.optimizer) == {"pinned_host"}
    for path, leaf in plain.trainable.items():
        np.testing.assert_array_equal(leaf, offloaded.trainable[path])
    states = [
        Checkpoints(tmp_path / out / "checkpoints").restore(2, like=offloaded)[0] for out in ("plain", "offloaded")
    ]
    assert kinds(states[1].optimizer) == {"pinned_host"}
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
