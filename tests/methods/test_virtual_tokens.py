# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens of both kinds together: on one model, beside LoRA, and on a mesh."""

import jax
import numpy as np
import pytest
import subjects
import virtual_oracle
from contracts.models import MODELS
from contracts.table import IDS
from flax import nnx
from virtual_oracle import run

import jpeft

KEY = jax.random.key(0)
#: Two layers in bfloat16, of 8 bits.
BFLOAT16 = 0.05
BOTH = jpeft.PromptTuning(num_tokens=2) | jpeft.PrefixTuning(num_tokens=3)


def test_a_prompt_sees_the_prefix():
    base = MODELS["foreign"].build()
    model = subjects.fill(jpeft.adapt(base, BOTH, key=KEY))
    leaves = subjects.as64(jpeft.partition(model)[1])
    expected = virtual_oracle.foreign64(
        subjects.as64(jpeft.partition(base)[2]),
        IDS,
        prompt=leaves["adapters/prompt_tuning/prompt"],
        prefix=leaves["adapters/prefix_tuning/prefix"],
    )
    assert subjects.error(run(model, IDS), expected) < subjects.FLOAT32


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_on_a_mesh_they_are_the_same(name):
    """Rows over data and fsdp, the base over fsdp and tensor; loss and gradients as on one device."""
    methods = BOTH | jpeft.LoRA(rank=2, targets=["query", "q_proj"][name == "llama" :][:1])
    model = subjects.fill(jpeft.adapt(MODELS[name].build(), methods, key=KEY))
    ids = np.random.default_rng(0).integers(1, 11, (8, 6)).astype(np.int32)
    mask = (np.arange(6) < np.arange(8)[:, None] + 1).astype(np.int32)

    @jax.jit
    def step(trainable, frozen, ids, mask):
        def loss(trainable):
            return (mask[..., None] * jax.numpy.sin(jpeft.combine(graphdef, trainable, frozen)(ids, mask))).sum()

        return jax.value_and_grad(loss)(trainable)

    graphdef, trainable, frozen = jpeft.partition(model)
    expected = step(trainable, frozen, ids, mask)
    mesh = jpeft.mesh("data=2,fsdp=2,tensor=2")
    placed = jpeft.partition(jpeft.shard(model, mesh, uneven="whole"))
    rows = jpeft.shard_batch({"ids": ids, "mask": mask}, mesh)
    got = step(placed[1], placed[2], rows["ids"], rows["mask"])
    assert abs(got[0] - expected[0]) < 1e-5 * abs(expected[0]) + 1e-5
    for path, gradient in expected[1].items():
        assert subjects.error(got[1][path], gradient) < 2e-5, path


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_on_a_bfloat16_base_they_are_trained_in_float32(name):
    model = subjects.fill(jpeft.adapt(MODELS[name].build(), BOTH, key=KEY))
    rounded = subjects.cast(model, jax.numpy.bfloat16)
    assert {leaf.dtype for leaf in jpeft.partition(rounded)[1].values()} == {jax.numpy.dtype("float32")}
    assert subjects.error(run(rounded, IDS), run(model, IDS)) < BFLOAT16


def test_an_adapter_serves_outside_of_a_call_of_its_model_by_an_error_that_says_so():
    model = jpeft.adapt(MODELS["llama"].build(), BOTH, key=KEY)
    with pytest.raises(ValueError, match="input_embedding reads what its adapter 'prompt_tuning' keeps at the model's"):
        model.input_embedding(jax.numpy.zeros((1, 2, 8)), np.arange(2)[None], None, None)
    assert isinstance(model, nnx.Module)
