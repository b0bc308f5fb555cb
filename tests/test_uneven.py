# SPDX-License-Identifier: Apache-2.0
"""Weights that a mesh does not divide: refused by name, or whole on every device."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from sharded_toy import Toy

import jpeft


def specs(leaves, mesh, **options):
    return {path: place.spec for path, place in jpeft.shardings(leaves, mesh, **options).items()}


ODD = (
    "the mesh data=1,fsdp=4,tensor=2 does not divide embed_tokens/embedding axis 1 of 14 over fsdp; "
    "layers/down_proj/kernel axis 2 of 14 over fsdp; layers/up_proj/kernel axis 1 of 14 over fsdp"
)


def odd():
    method = jpeft.LoRA(rank=4, targets=("up_proj", "down_proj"), modules_to_save=("embed_tokens",))
    return jpeft.adapt(Toy(d_model=14, rngs=nnx.Rngs(0)), method, key=jax.random.key(1))


def test_an_axis_that_does_not_divide_is_refused_by_name():
    mesh, model = jpeft.mesh("fsdp=4,tensor=2"), odd()
    bank = jpeft.bank([model, odd()])
    for place, leaves in ((jpeft.shardings, model), (jpeft.shard, model), (jpeft.shard, bank)):
        with pytest.raises(ValueError, match=f"{ODD}: take sizes that do, or keep such axes .* uneven=whole"):
            place(leaves, mesh)
    path, leaf = "layers/up_proj/kernel", jax.ShapeDtypeStruct((2, 14, 32), jnp.float32)
    with pytest.raises(ValueError, match="does not divide layers/up_proj/kernel axis 1 of 14 over fsdp: take"):
        jpeft.placement(mesh)(path, leaf)
    assert jpeft.placement(mesh, uneven="whole")(path, leaf).spec == P(None, None, "tensor")
    with pytest.raises(ValueError, match="does not divide w axis 0 of 9 over fsdp and tensor"):
        jpeft.shardings({"w": jnp.ones(9)}, mesh, [("w", P(("fsdp", "tensor")))])
    with pytest.raises(ValueError, match="uneven is one of refuse, whole; got 'pad'"):
        jpeft.shardings(model, mesh, uneven="pad")  # pyright: ignore[reportArgumentType]


def test_an_axis_that_does_not_divide_may_be_whole(caplog):
    """Its adapters are then split on their own, as others whose base does not split them."""
    mesh, model = jpeft.mesh("fsdp=4,tensor=2"), odd()
    with caplog.at_level(logging.INFO, "jpeft"):
        found = specs(model, mesh, uneven="whole")
    assert f"{ODD}: whole on every device" in caplog.text
    assert found["layers/up_proj/kernel"] == P(None, None, "tensor")
    assert found["embed_tokens/embedding"] == P("tensor", None)
    assert found["embed_tokens/adapters/lora/saved/embedding"] == P("tensor", None)
    assert found["layers/up_proj/adapters/lora/A"] == P(None, None, "fsdp")
    assert found["layers/up_proj/adapters/lora/B"] == P(None, None, ("tensor", "fsdp"))
    ids = np.arange(24).reshape(8, 3)
    expected = jax.jit(lambda m, x: m(x))(model, ids)
    placed = jpeft.shard(model, mesh, uneven="whole")
    got = jax.jit(lambda m, x: m(x))(placed, jpeft.shard_batch(ids, mesh))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    bank = jpeft.shard(jpeft.bank([model, odd()]), mesh, uneven="whole")
    assert bank.frozen["layers/up_proj/kernel"].sharding.spec == P(None, None, "tensor")


def test_scales_of_codes_are_whole_where_they_do_not_divide():
    """Blocks of 64 inputs are fewer than inputs: 12 of 768 over 8 devices are kept, and the codes are split."""
    model = nnx.Sequential(nnx.Linear(768, 16, rngs=nnx.Rngs(0)))
    found = specs(jpeft.quantize(model, "int4_64"), jpeft.mesh("fsdp=8"), rules=[("**/kernel", P("fsdp", "tensor"))])
    assert found["layers/0/kernel/codes"][0] == "fsdp"
    assert found["layers/0/kernel/scales"] == P(None, "tensor")


def test_a_mesh_that_splits_nothing_in_the_end_is_refused():
    """What a rule names, and no axis of which divides, is whole on every device."""
    model = Toy(d_model=12, d_ff=20, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="nothing splits any of the 7 leaves"):
        jpeft.shardings(model, jpeft.mesh("fsdp=8"), uneven="whole")
    whole = specs(model, jpeft.mesh("sequence=8"), rules=[])
    assert not any(map(any, whole.values()))
