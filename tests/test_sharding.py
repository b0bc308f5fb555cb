# SPDX-License-Identifier: Apache-2.0
"""Places on a mesh, on 8 fake devices: rules, what derives from them, and that no number depends on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_toy import Toy

import jpeft

TARGETS = ("up_proj", "down_proj", "embed_tokens")


def adapted(**options):
    method = jpeft.LoRA(rank=4, targets=TARGETS, init="orthogonal", modules_to_save=("norm",), **options)
    return jpeft.adapt(Toy(rngs=nnx.Rngs(0)), method, key=jax.random.key(1))


def specs(leaves, mesh, **options):
    return {path: place.spec for path, place in jpeft.shardings(leaves, mesh, **options).items()}


# Meshes


def test_mesh_has_auto_axes_in_order():
    mesh = jpeft.mesh("tensor=4, data=2")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 4}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh == jpeft.mesh({"data": 2, "tensor": 4})
    assert list(mesh.devices.flat) == jax.devices()


def test_mesh_works_out_an_open_axis():
    assert dict(jpeft.mesh("fsdp=-1,tensor=2").shape) == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    assert jpeft.mesh({}, jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "axes, message",
    [
        ("model=8", "unknown mesh axis 'model'; the axes are data, fsdp, sequence, tensor"),
        ("data=two", "mesh axis data needs a size of at least 1, or -1 for the rest; got 'two'"),
        ("data", "mesh axis data needs a size of at least 1, or -1 for the rest; got ''"),
        ("data=8,tensor=0", "mesh axis tensor needs a size of at least 1"),
        ({"fsdp": -2}, "mesh axis fsdp needs a size of at least 1, or -1 for the rest; got '-2'"),
        ("data=2,data=4", "an axis stands twice in the mesh 'data=2,data=4'"),
        ("data=2,fsdp=2", "a mesh of data=2,fsdp=2,tensor=1 takes 4 devices; there are 8"),
        ("data=3,fsdp=-1", "8 devices do not divide by 3, so fsdp of data=3,fsdp=-1,tensor=1 has no size"),
        ("data=-1,fsdp=-1", "one axis of a mesh may be -1; data=-1,fsdp=-1,tensor=1 has 2"),
    ],
)
def test_mesh_refuses(axes, message):
    with pytest.raises(ValueError, match=message):
        jpeft.mesh(axes)


# Rules and what derives from them


def test_places_of_base_and_adapters():
    found = specs(adapted(bias="all"), jpeft.mesh("data=2,fsdp=2,tensor=2"))
    assert found["embed_tokens/embedding"] == P("tensor", "fsdp")
    assert found["layers/up_proj/kernel"] == P(None, "fsdp", "tensor")
    assert found["layers/up_proj/bias"] == P(None, "tensor")
    assert found["layers/down_proj/kernel"] == P(None, "tensor", "fsdp")
    assert found["layers/down_proj/bias"] == P(None, None)
    assert found["norm/scale"] == P(None)
    for module, lead, (d_in, d_out) in (
        ("layers/up_proj", (None,), ("fsdp", "tensor")),
        ("layers/down_proj", (None,), ("tensor", "fsdp")),
        ("embed_tokens", (), ("tensor", "fsdp")),
    ):
        within = {"fsdp": "fsdp", "tensor": ("tensor", "fsdp")}  # what `tensor` splits, `fsdp` splits further
        assert found[f"{module}/adapters/lora/A"] == P(*lead, within[d_in], None)
        assert found[f"{module}/adapters/lora/B"] == P(*lead, None, within[d_out])
    assert found["layers/up_proj/adapters/lora/saved/bias"] == P(None, "tensor")
    assert found["norm/adapters/lora/saved/scale"] == P(None)


def test_constants_of_an_adapter_follow_it():
    base = Toy(rngs=nnx.Rngs(0))
    model = jpeft.adapt(base, jpeft.LoRA(rank=4, targets=TARGETS, init="pissa"), key=jax.random.key(1))
    found = specs(model, jpeft.mesh("fsdp=2,tensor=4"))
    assert found["layers/down_proj/adapters/lora/A0"] == P(None, ("tensor", "fsdp"), None)
    assert found["layers/down_proj/adapters/lora/B0"] == P(None, None, "fsdp")


def test_matrices_that_no_rule_names_are_split_along_their_longest_axis():
    """What layers and vectors are is seen by the base's leaves; an axis that does not divide is passed over."""
    leaves = {
        "layers/w/kernel": (2, 16, 8), "layers/norm/scale": (2, 16), "norm/scale": (16,), "odd/kernel": (4, 4),
        "layers/residual/adapters/x/down": (2, 16, 3), "layers/residual/adapters/x/up": (2, 3, 16),
        "layers/residual/adapters/x/bias": (2, 16), "adapters/y/prompt": (5, 16), "adapters/y/bias": (16,),
        "layers/w/adapters/x/gate": (2, 7, 5), "layers/w/adapters/x/square": (2, 6, 6),
        "layers/w/adapters/x/second": (2, 7, 6),
    }  # fmt: skip
    rules = [("layers/w/kernel", P("fsdp", "tensor")), ("odd/kernel", P())]
    found = specs({k: jnp.ones(v) for k, v in leaves.items()}, jpeft.mesh("fsdp=2,tensor=4"), rules=rules)
    own = {path.partition("adapters/")[2]: spec for path, spec in found.items() if "adapters" in path}
    assert own == {
        "x/down": P(None, "fsdp", None), "x/up": P(None, None, "fsdp"), "x/bias": P(None, None),
        "y/prompt": P(None, "fsdp"), "y/bias": P(None), "x/gate": P(None, None, None),
        "x/square": P(None, None, "fsdp"), "x/second": P(None, None, "fsdp"),
    }  # fmt: skip
    without = specs({k: jnp.ones(v) for k, v in leaves.items()}, jpeft.mesh("data=2,tensor=4"), rules=rules)
    assert not [path for path, spec in without.items() if "adapters" in path and any(spec)]


def test_kernels_of_more_axes():
    """Heads laid into one axis keep a split of the heads, not one inside of them."""
    mesh = jpeft.mesh("fsdp=2,tensor=4")
    model = nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))
    names = ("query", "out")
    model = jpeft.adapt(model, jpeft.LoRA(rank=4, targets=names), key=jax.random.key(1))
    rules = [("query/kernel", P("fsdp", "tensor", None)), ("out/kernel", P("tensor", None, "fsdp"))]
    found = specs(model, mesh, rules=rules)
    assert found["query/adapters/lora/A"] == P("fsdp", None)
    assert found["query/adapters/lora/B"] == P(None, ("tensor", "fsdp"))
    assert found["out/adapters/lora/A"] == P(("tensor", "fsdp"), None)
    assert found["out/adapters/lora/B"] == P(None, "fsdp")
    within = specs(model, mesh, rules=[("query/kernel", P("fsdp", None, "tensor"))])
    assert within["query/adapters/lora/B"] == P(None, "fsdp")


def test_an_adapter_beside_a_rule_with_an_unknown_axis_is_named():
    rules = [("layers/up_proj/kernel", P(None, "model")), *jpeft.SHARDING_RULES]
    with pytest.raises(ValueError, match="the rule for layers/up_proj/kernel names the axis 'model'"):
        jpeft.shardings(adapted(), jpeft.mesh("fsdp=8"), rules)


def test_own_rules_come_first():
    rules = [("layers/up_proj/*", P()), *jpeft.SHARDING_RULES]
    found = specs(adapted(), jpeft.mesh("fsdp=8"), rules=rules)
    assert found["layers/up_proj/kernel"] == P(None, None, None)
    assert found["layers/up_proj/adapters/lora/A"] == P(None, "fsdp", None)
    assert found["layers/down_proj/adapters/lora/A"] == P(None, ("tensor", "fsdp"), None)


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("layers/up/kernel", P("fsdp"))], "selector 'layers/up/kernel' selects no leaf; nearest"),
        ([("norm/scale", P("fsdp", "tensor"))], r"'norm/scale' has .* of 2 axes; norm/scale is \[16\]"),
        ([("**/kernel", P("model"))], "names the axis 'model'; the mesh has data=1,fsdp=8,tensor=1"),
        ([("**/kernel", P())], "nothing splits any of the 7 leaves, such as embed_tokens/embedding"),
    ],
)
def test_rules_that_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        jpeft.shardings(Toy(rngs=nnx.Rngs(0)), jpeft.mesh("fsdp=8"), rules)


def test_an_adapter_needs_its_base():
    _, trainable, frozen = jpeft.partition(adapted())
    mesh = jpeft.mesh("fsdp=8")
    with pytest.raises(ValueError, match="no base leaf beside it; give the trainable and the frozen leaves together"):
        jpeft.shardings({**trainable, "layers/up_proj/kernel": frozen["layers/up_proj/kernel"]}, mesh)
    assert len(jpeft.shardings({**trainable, **frozen}, mesh)) == len(trainable) + len(frozen)


def test_shapes_are_enough():
    shapes = nnx.eval_shape(lambda: Toy(rngs=nnx.Rngs(0)))
    mesh = jpeft.mesh("fsdp=2,tensor=4")
    places = jpeft.shardings(shapes, mesh)
    place = jpeft.placement(mesh)
    for path, shape in jpeft.partition(shapes)[2].items():
        assert place(path, shape) == places[path]


# Placing


def test_shard_places_every_slice():
    model = adapted()
    mesh = jpeft.mesh("data=2,fsdp=2,tensor=2")
    placed = jpeft.shard(model, mesh)
    _, trainable, frozen = jpeft.partition(placed)
    before = {**jpeft.partition(model)[1], **jpeft.partition(model)[2]}
    for path, leaf in {**trainable, **frozen}.items():
        assert leaf.sharding == jpeft.shardings(model, mesh)[path]
        np.testing.assert_array_equal(leaf, before[path])
    assert frozen["layers/up_proj/kernel"].addressable_shards[0].data.shape == (2, 8, 16)
    assert trainable["layers/up_proj/adapters/lora/A"].addressable_shards[0].data.shape == (2, 8, 4)
    assert trainable["layers/down_proj/adapters/lora/A"].addressable_shards[0].data.shape == (2, 8, 4)


def test_shard_leaves_what_was_given_and_what_is_in_place():
    """Donating the placed leaves must not take the given ones along; placing twice must not copy."""
    _, trainable, frozen = jpeft.partition(adapted())
    mesh = jpeft.mesh("data=8")
    placed = jpeft.shard({**trainable, **frozen}, mesh)
    again = jpeft.shard(placed, mesh)
    assert all(again[path] is placed[path] for path in placed)
    jax.jit(lambda leaves: {path: leaf + 1 for path, leaf in leaves.items()}, donate_argnums=0)(placed)
    assert all(leaf.is_deleted() for leaf in placed.values())
    assert not any(leaf.is_deleted() for leaf in {**trainable, **frozen}.values())


def test_optimizer_state_lies_as_its_parameters():
    _, trainable, _ = jpeft.partition(jpeft.shard(adapted(), jpeft.mesh("fsdp=2,tensor=4")))
    adafactor = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    each = jpeft.optimizer({"a": optax.adamw(1e-3), "b": adafactor}, rules={"**/B": "b", "**": "a"})
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), each), every_k_schedule=2)
    state = jpeft.optimizer_state(tx.gradient_transformation(), trainable)
    found = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = next((key.key for key in keys if getattr(key, "key", None) in trainable), None)
        if path is not None and leaf.shape == trainable[path].shape:
            assert leaf.sharding == trainable[path].sharding
            found += 1
        else:
            assert leaf.sharding.is_fully_replicated
            assert len(leaf.sharding.device_set) == 8
    adam = [path for path in trainable if not path.endswith("/B")]
    assert found == len(trainable) + 2 * len(adam)  # accumulated gradients, and Adam's two moments


def test_optimizer_state_on_one_device():
    _, trainable, _ = jpeft.partition(adapted())
    state = jpeft.optimizer_state(optax.adam(1e-3), trainable)
    jax.tree.map(np.testing.assert_array_equal, state, optax.adam(1e-3).init(trainable))


def test_gathered_leaves_outlive_what_they_were_gathered_from():
    mesh = jpeft.mesh("data=2,fsdp=2,tensor=2")
    placed = jpeft.shard(jpeft.partition(Toy(rngs=nnx.Rngs(0)))[2], mesh)
    gathered = jpeft.gather(placed)
    jax.jit(lambda leaves: {path: leaf + 1 for path, leaf in leaves.items()}, donate_argnums=0)(placed)
    for path, leaf in jpeft.partition(Toy(rngs=nnx.Rngs(0)))[2].items():
        assert gathered[path].devices() == {jax.devices()[0]}
        np.testing.assert_array_equal(gathered[path], leaf)


def test_keys_are_placed_too():
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Dropout(0.1, rngs=nnx.Rngs(1)))
    placed = jpeft.shard(model, jpeft.mesh("fsdp=8"), [("**/kernel", P("fsdp"))])
    keys = [leaf for leaf in jpeft.partition(placed)[2].values() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert [key.sharding.is_fully_replicated for key in keys] == [True]


# Batches


def test_batches_split_over_data_and_fsdp():
    mesh = jpeft.mesh("data=2,fsdp=2,tensor=2")
    rows = np.arange(24).reshape(8, 3)
    placed = jpeft.shard_batch({"input_ids": rows}, mesh)["input_ids"]
    assert placed.sharding == NamedSharding(mesh, P(("data", "fsdp")))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(jpeft.gather(placed), rows)
    assert jpeft.local_rows(mesh, 8).tolist() == [*range(8)]


def test_batches_that_do_not_divide_are_refused():
    mesh = jpeft.mesh("data=2,fsdp=2,tensor=2")
    with pytest.raises(ValueError, match="a batch of 6 rows does not divide by the 4 devices along data and fsdp"):
        jpeft.shard_batch({"input_ids": np.zeros((6, 3))}, mesh)
