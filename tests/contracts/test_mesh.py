# SPDX-License-Identifier: Apache-2.0
"""Every method on meshes of 8 fake devices: what one device computes, each part in its place, and no traffic in vain.

A method of the table joins by itself. Its lines take turns on the models. The slow lane has every line on every mesh,
the fast one those of `FAST`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import subjects
from contracts.models import ON_MESHES, VOCAB
from contracts.table import METHODS, QUICK, Case
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.train.planning.compiling import said

#: Loss and gradients in float32 through all layers, against float64; of the whole gradient's norm.
SAME = 1e-5

MESHES = {
    "fsdp": "fsdp=8",
    "tensor": "data=4,tensor=2",
    "mixed": "data=2,fsdp=2,tensor=2",
    "sequence": "data=2,fsdp=2,sequence=2",
}
MODELS = tuple(ON_MESHES)
FAST = (
    ("lora", "mixed"),
    ("prompt tuning", "sequence"),
    ("prefix tuning", "tensor"),
    ("houlsby with dropout", "fsdp"),
)

#: How often a program's text may gather what it needs, a layer counted once: forward, backward, and a part again.
TIMES = 2.5
#: Methods that make larger matrices of few numbers, whose gradients are summed as such; LoKr its w2, where that is the
#: cheapest order of its product.
DENSE = ("fourierft", "oft", "loha", "lokr", "compacter")

ROWS, SEQ, KEY = 16, 6, jax.random.key(9)
#: Virtual tokens that a method of the table may put in front, and the widest states of the models.
VIRTUAL, WIDEST = 5, 64
IDS = np.random.default_rng(0).integers(0, VOCAB, (ROWS, SEQ)).astype(np.int32)


def _subjects():
    """Every line of the table on one model, on every mesh."""
    for number, (name, line) in enumerate(METHODS.items()):
        models = [model for model in MODELS if model.removeprefix("wide ") in line.on]
        case = Case(name, models[number % len(models)])
        for mesh in MESHES:
            marks = () if (name, mesh) in FAST else pytest.mark.slow
            yield pytest.param(case, mesh, id=f"{name} on {case.model}, {mesh}", marks=marks)


each = pytest.mark.parametrize("subject, mesh", [*_subjects()])


@functools.cache
def made(mesh: str):
    return jpeft.mesh(MESHES[mesh])


@functools.cache
def expected(subject: Case):
    """Loss and gradients on one device, in float64 (of two float32 sums neither is the other's truth).

    The kernels are those that codes stand for in float32.
    """
    plain = jpeft.dequantize(subject.filled)
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, subject.step(subjects.in_float64(plain), IDS, KEY))


@each
def test_a_step_is_one_devices(subject, mesh):
    """Loss and gradients; where everything lies; and what the devices tell each other."""
    mesh = made(mesh)
    graphdef, trainable, frozen = jpeft.partition(jpeft.shard(subject.filled, mesh))
    check_places({**trainable, **frozen}, mesh)
    places = {path: leaf.sharding for path, leaf in trainable.items()}
    moments = jpeft.optimizer_state(optax.adam(1e-3), trainable)[0]
    for moment in (moments.mu, moments.nu):
        assert {path: leaf.sharding for path, leaf in moment.items()} == places
    step = jax.jit(jax.value_and_grad(subject.loss(graphdef)), out_shardings=(None, places), compiler_options=QUICK)
    batch = jpeft.shard_batch(IDS, mesh)
    assert batch.addressable_shards[0].data.shape == (ROWS // math.prod(batch_ways(mesh)), SEQ)
    program = step.lower(trainable, frozen, batch, KEY).compile()
    loss, grads = program(trainable, frozen, batch, KEY)
    want_loss, want = expected(subject)
    assert abs(float(loss) - float(want_loss)) < SAME * max(ROWS, abs(float(want_loss)))  # a sum over the rows
    whole = np.linalg.norm([np.linalg.norm(value) for value in want.values()])
    for path, value in want.items():
        assert np.linalg.norm(grads[path] - value) <= SAME * whole, path
    check_traffic(program.as_text(), subject, mesh)


def batch_ways(mesh):
    return mesh.shape["data"], mesh.shape["fsdp"]


def check_places(leaves, mesh):
    """A device holds its share of the base, and of every matrix of an adapter with an axis that `fsdp` divides."""
    base = {path: leaf for path, leaf in leaves.items() if "adapters" not in path.split("/")}
    kernels = [leaf for path, leaf in base.items() if leaf.ndim >= 2 and min(leaf.shape[-2:]) >= 16]
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in kernels)
    small = sum(leaf.nbytes for leaf in kernels if leaf.sharding.is_fully_replicated)
    assert small <= 0.2 * sum(leaf.nbytes for leaf in kernels)
    assert held - small <= sum(leaf.nbytes for leaf in kernels) / split
    for path, leaf in leaves.items():
        own, ways = _of_a_layer(path, leaf).shape, mesh.shape["fsdp"]
        if path not in base and "saved" not in path.split("/") and len(own) >= 2 and any(n % ways == 0 for n in own):
            assert leaf.addressable_shards[0].data.nbytes <= leaf.nbytes / ways, path
    for path, place in jpeft.shardings(leaves, mesh).items():
        assert leaves[path].sharding == place


def check_traffic(program, subject, mesh):
    """No row leaves its device, nothing comes that is larger than a layer's kernel, and each but a few times.

    What is summed are gradients of what is trained, in float32, and along `tensor` the rows of a device.
    """
    found = [(kind, dims) for kind, arrays in said(program) for dtype, dims in arrays if dtype[0] in "bf"]
    trained = jpeft.partition(subject.filled)[1]
    base = jpeft.partition(jpeft.dequantize(subject.base))[2]
    sizes = {path: _of_a_layer(path, leaf).size for path, leaf in {**base, **trained}.items()}
    own = ROWS // math.prod(batch_ways(mesh)) * (SEQ + VIRTUAL) * WIDEST
    splits_rows = mesh.shape["tensor"] * mesh.shape["sequence"] == 1
    most = max(*sizes.values(), 0 if splits_rows else own)
    dense = subject.method.startswith(DENSE)
    assert not [dims for _, dims in found if math.prod(dims) > (2 * most if dense else most)]
    assert not [dims for _, dims in found if dims in {leaf.shape for leaf in base.values() if leaf.ndim == 3}]
    gathered = sum(math.prod(dims) for kind, dims in found if kind == "all-gather")
    assert gathered <= TIMES * (sum(sizes.values()) + (0 if splits_rows else own))
    summed = [(dtype, dims) for kind, arrays in said(program) if kind == "all-reduce" for dtype, dims in arrays]
    assert {dtype for dtype, _ in summed if dtype[0] in "bf"} <= {"f32"}
    if splits_rows and not dense:
        largest = max(sizes[path] for path in trained)
        assert not [dims for _, dims in summed if math.prod(dims) > 4 * largest]


def _of_a_layer(path, leaf):
    """A leaf, of a stack one layer's."""
    return leaf[0] if path.startswith(("layers/", "encoder/block", "decoder/block")) else leaf


@each
def test_what_it_leaves_is_one_devices(subject, mesh):
    """Its own leaves and, where it merges, the merged model: gathered, they are what one device would save."""
    placed = jpeft.shard(subject.filled, made(mesh))
    for path, leaf in jpeft.gather(jpeft.partition(placed)[1]).items():
        np.testing.assert_array_equal(leaf, jpeft.partition(subject.filled)[1][path])
    if not subject.line.merges:
        return
    merged, want = jpeft.partition(jpeft.merge(placed))[2], jpeft.partition(jpeft.merge(subject.filled))[2]
    for path, leaf in jpeft.gather(merged).items():
        assert subjects.error(leaf, want[path]) < subjects.FLOAT32, path


@each
def test_it_writes_what_one_device_writes(subject, mesh):
    if not subject.row.caches:
        return
    placed = jpeft.shard(subject.filled, made(mesh))
    batch = jpeft.shard_batch(IDS, made(mesh))
    np.testing.assert_array_equal(written(placed, batch), written_by_one(subject))


def written(model, ids):
    return np.asarray(jpeft.models.generate(model, ids, max_new_tokens=4, bucket=SEQ))


@functools.cache
def written_by_one(subject):
    return written(subject.filled, IDS)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_keeps_the_cache_of_its_rows_and_heads(mesh):
    mesh, subject = made(mesh), Case("prompt tuning", "wide llama")
    graphdef, trainable, frozen = jpeft.partition(jpeft.shard(subject.filled, mesh))

    def read(trainable, frozen, ids):
        model = jpeft.combine(graphdef, trainable, frozen)
        cache = model.prefill(model.cache(ROWS, SEQ + 1), ids)[1]
        return cache.kv, model.step(cache, ids[:, :1])[1].kv

    caches = jax.jit(read, compiler_options=QUICK)(trainable, frozen, jpeft.shard_batch(IDS, mesh))
    for leaf in jax.tree.leaves(caches):
        heads = 2 // mesh.shape["tensor"]
        assert leaf.addressable_shards[0].data.shape == (2, ROWS // math.prod(batch_ways(mesh)), heads, SEQ + 4, 8)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_banks_adapters_lie_as_each_alone(mesh):
    mesh, subject = made(mesh), Case("lora", "wide llama")
    bank = jpeft.bank([subject.filled, subjects.fill(subject.fresh(), seed=1, scale=0.2)])
    placed, which = jpeft.shard(bank, mesh), np.arange(ROWS, dtype=np.int32) % 3
    alone = jpeft.shardings(subject.filled, mesh)
    for path, leaf in placed.trainable.items():
        assert leaf.sharding.spec == P(None, *alone[path].spec)
    for path, leaf in placed.frozen.items():
        assert leaf.sharding == alone[path]
    run = jax.jit(lambda bank, which, ids: jpeft.apply_bank(bank, which, subject.row.run, ids), compiler_options=QUICK)
    on_mesh = run(placed, *jpeft.shard_batch((which, IDS), mesh))
    assert subjects.error(np.asarray(on_mesh), np.asarray(run(bank, jnp.asarray(which), IDS))) < SAME
