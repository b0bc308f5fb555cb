# SPDX-License-Identifier: Apache-2.0
"""The zoo on meshes of 8 fake devices: losses, gradients, training, merging, saving and loading as on one device."""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.models import _safetensors
from jpeft.train.losses import SUMS
from jpeft.train.planning.compiling import said
from jpeft.train.step import begin, make_step

#: Loss and gradients in float32 against one device: sums of the same terms in another order.
SAME = 1e-5

CONFIGS = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    },
    "bert": {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    },
}
BATCH, SEQ = 16, 12


@functools.cache
def adapted(family: str):
    """A model whose A and B are both far from zero."""
    model = jpeft.models.build(CONFIGS[family], key=jax.random.key(0))
    method = jpeft.LoRA(rank=4, alpha=8, targets="all-linear", init="orthogonal")
    return jpeft.adapt(model, method, key=jax.random.key(1))


def batch_of(family: str) -> dict[str, np.ndarray]:
    """Rows of unequal length, padded on the right."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 96, (BATCH, SEQ)).astype(np.int32)
    mask = (np.arange(SEQ) < rng.integers(5, SEQ + 1, (BATCH, 1))).astype(np.int32)
    labels = np.where(mask, ids, -100) if family == "llama" else rng.integers(0, 2, BATCH)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels.astype(np.int32)}


def make_loss(graphdef, family: str):
    """The plain mean cross-entropy."""

    def loss(trainable, frozen, batch):
        logits = jpeft.combine(graphdef, trainable, frozen)(batch["input_ids"], batch["attention_mask"])
        labels = batch["labels"]
        if family == "llama":
            logits, labels = logits[:, :-1], labels[:, 1:]
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return (terms * (labels >= 0)).sum() / (labels >= 0).sum()

    return jax.value_and_grad(loss)


@functools.cache
def on_one_device(family: str):
    """(loss, gradients)."""
    graphdef, trainable, frozen = jpeft.partition(adapted(family))
    return jax.jit(make_loss(graphdef, family))(trainable, frozen, batch_of(family))


@pytest.mark.parametrize("axes", ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4"])
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_do_not_depend_on_the_mesh(family, axes):
    mesh = jpeft.mesh(axes)
    graphdef, trainable, frozen = jpeft.partition(jpeft.shard(adapted(family), mesh))
    batch = jpeft.shard_batch(batch_of(family), mesh)
    program = jax.jit(make_loss(graphdef, family)).lower(trainable, frozen, batch).compile()
    loss, grads = program(trainable, frozen, batch)
    expected_loss, expected = on_one_device(family)
    assert abs(float(loss) - float(expected_loss)) < SAME
    for path, grad in grads.items():
        want = np.asarray(expected[path])
        assert np.linalg.norm(grad - want) < SAME * np.linalg.norm(want), path
    check_traffic(program.as_text(), axes, frozen)


def check_traffic(program: str, axes: str, frozen):
    """Weights come to the rows, not rows to the weights; and never a whole stack of layers at once."""
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]*? (all-gather|all-reduce|all-to-all)\(", program)
    floats = [(op, tuple(map(int, dims.split(",")))) for kind, dims, op in found if kind == "f32" and dims]
    stacks = {leaf.shape for path, leaf in frozen.items() if path.startswith("layers/") and leaf.ndim == 3}
    assert not [dims for _, dims in floats if dims in stacks]
    if axes == "data=8":  # nothing but the sums of loss and gradients
        assert not [op for op, _ in floats if op != "all-reduce"]
    if axes == "fsdp=8":
        assert [op for op, _ in floats if op == "all-gather"]
        assert not [dims for op, dims in floats if op != "all-to-all" and dims[:2] == (BATCH, SEQ)]


@pytest.mark.parametrize(
    "family, heads, kv_heads, axes",
    [
        ("llama", 8, 2, "data=2,tensor=4"),
        ("llama", 8, 1, "fsdp=2,tensor=4"),
        ("llama", 12, 3, "tensor=8"),
        ("llama", 8, 2, "sequence=2,tensor=4"),
        ("bert", 12, 12, "tensor=8"),
        ("bert", 4, 4, "tensor=8"),
    ],
)
def test_heads_that_tensor_does_not_divide_stay_whole(family, heads, kv_heads, axes):
    """Fewer key heads than devices are repeated, query heads padded: no score is a sum over devices."""
    counts = {"num_attention_heads": heads, "hidden_size": 8 * heads}
    if family == "llama":
        counts["num_key_value_heads"] = kv_heads
    model = jpeft.models.build(CONFIGS[family] | counts, key=jax.random.key(0))
    model = jpeft.adapt(model, jpeft.PrefixTuning(num_tokens=3), key=jax.random.key(1))
    seq, mesh = 64, jpeft.mesh(axes)
    mask = (np.arange(seq) < np.random.default_rng(0).integers(30, seq + 1, (8, 1))).astype(np.int32)
    ids = np.random.default_rng(1).integers(1, 96, (8, seq)).astype(np.int32) * mask
    labels = np.where(mask, ids, -100) if family == "llama" else np.arange(8, dtype=np.int32) % 2
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    graphdef, trainable, frozen = jpeft.partition(model)
    want_loss, want = jax.jit(make_loss(graphdef, family))(trainable, frozen, batch)
    graphdef, trainable, frozen = jpeft.partition(jpeft.shard(model, mesh))
    batch = jpeft.shard_batch(batch, mesh)
    program = jax.jit(make_loss(graphdef, family)).lower(trainable, frozen, batch).compile()
    loss, grads = program(trainable, frozen, batch)
    assert abs(float(loss) - float(want_loss)) < SAME
    for path, grad in grads.items():
        assert np.linalg.norm(grad - np.asarray(want[path])) < SAME * np.linalg.norm(want[path]), path
    told = [dims for _, arrays in said(program.as_text()) for dtype, dims in arrays if dtype == "f32"]
    own, padded = 8 // (mesh.shape["data"] * mesh.shape["fsdp"]), -(-heads // mesh.shape["tensor"])
    assert max(map(math.prod, told)) <= own * (seq + 3) * max(8 * padded * mesh.shape["tensor"], 96)


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_lie_as_the_rules_say(family):
    mesh = jpeft.mesh("data=2,fsdp=2,tensor=2")
    _, trainable, frozen = jpeft.partition(jpeft.shard(adapted(family), mesh))
    column, row, table = {
        "llama": ("layers/self_attn/q_proj", "layers/mlp/down_proj", "embed_tokens"),
        "bert": ("layers/attention/self/query", "layers/output/dense", "embeddings/word_embeddings"),
    }[family]
    whole = {path: leaf.sharding.spec for path, leaf in {**trainable, **frozen}.items()}
    assert whole[f"{column}/kernel"] == P(None, "fsdp", "tensor")
    assert whole[f"{row}/kernel"] == P(None, "tensor", "fsdp")
    shapes = {p: leaf.addressable_shards[0].data.shape for p, leaf in {**trainable, **frozen}.items()}
    assert shapes[f"{column}/kernel"] == (2, 32, 32)
    assert shapes[f"{column}/adapters/lora/A"] == (2, 32, 4)
    assert shapes[f"{column}/adapters/lora/B"] == (2, 4, 16)
    assert shapes[f"{row}/kernel"] == (2, 64, 32)
    assert shapes[f"{row}/adapters/lora/A"] == (2, 32, 4)
    assert shapes[f"{table}/embedding"] == (48, 32)
    # Of the projections and the tables nothing is left whole but what no rule names.
    kept = {p for p, leaf in frozen.items() if p.endswith("kernel") and leaf.sharding.is_fully_replicated}
    assert kept == {"llama": set(), "bert": {"pooler/dense/kernel", "classifier/kernel"}}[family]


@pytest.mark.parametrize("family, task", [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_training_takes_the_steps_of_one_device_and_compiles_once(family, task, optimised):
    """Four steps of AdamW; a gradient as small as its rounding is not divided by itself, which `eps` is for."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-4))

    def train(mesh):
        model = adapted(family) if mesh is None else jpeft.shard(adapted(family), mesh)
        graphdef, trainable, frozen = jpeft.partition(model)
        update = make_step(graphdef, SUMS[task], tx, groups=1 if mesh is None else 4)
        state, losses = begin(tx, trainable), []
        micro = {name: rows.reshape(2, BATCH // 2, *rows.shape[1:]) for name, rows in batch_of(family).items()}
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        for _ in range(4):
            batch = micro if mesh is None else {n: place_micro(rows, mesh) for n, rows in micro.items()}
            state, metrics = update(state, frozen, batch, None)
            losses.append(float(metrics.loss))
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
        assert update.num_compiled == 1
        return losses, state.trainable

    losses, leaves = train(jpeft.mesh("data=2,fsdp=2,tensor=2"))
    expected, single = train(None)
    assert expected[0] - expected[-1] > 0.1
    np.testing.assert_allclose(losses, expected, rtol=0, atol=SAME)
    for path, leaf in leaves.items():
        assert leaf.sharding.mesh.size == 8
        assert np.linalg.norm(leaf - np.asarray(single[path])) < SAME * np.linalg.norm(single[path]), path


def place_micro(rows: np.ndarray, mesh):
    """Micro-batches `[accumulation, rows, ...]`, rows split."""
    return jax.device_put(rows, jax.sharding.NamedSharding(mesh, P(None, ("data", "fsdp"))))


def test_a_step_of_the_users_own_compiles_once():
    """The recipe of docs/sharding.md: with `optimizer_state` and out_shardings, the second call is the first's."""
    mesh = jpeft.mesh("fsdp=4,tensor=2")
    graphdef, trainable, frozen = jpeft.partition(jpeft.shard(adapted("llama"), mesh))
    tx = optax.adamw(1e-3)
    state = jpeft.optimizer_state(tx, trainable)
    gradients = make_loss(graphdef, "llama")

    def step(trainable, state, frozen, batch):
        loss, grads = gradients(trainable, frozen, batch)
        changes, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, changes), state, loss

    places = jax.tree.map(lambda leaf: leaf.sharding, (trainable, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, None))
    losses = []
    for _ in range(3):
        trainable, state, loss = jitted(trainable, state, frozen, jpeft.shard_batch(batch_of("llama"), mesh))
        losses.append(float(loss))
    assert losses[2] < losses[0]
    assert jitted._cache_size() == 1


def test_a_program_compiles_ahead_of_time_from_shapes():
    """No weights exist when it is compiled, and it runs on those that are placed later."""
    mesh = jpeft.mesh("fsdp=4,tensor=2")
    model = nnx.eval_shape(lambda: adapted.__wrapped__("llama"))
    places = jpeft.shardings(model, mesh)
    graphdef, *halves = jpeft.partition(model)
    shapes = [
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path]) for path, leaf in half.items()}
        for half in halves
    ]
    batch = jpeft.shard_batch(batch_of("llama"), mesh)
    program = jax.jit(make_loss(graphdef, "llama")).lower(*shapes, batch).compile()
    _, trainable, frozen = jpeft.partition(jpeft.shard(adapted("llama"), mesh))
    loss, _ = program(trainable, frozen, batch)
    assert abs(float(loss) - float(on_one_device("llama")[0])) < SAME


@pytest.mark.parametrize("family", CONFIGS)
def test_merging_and_saving_on_a_mesh(family, tmp_path):
    """A merged model saved from the mesh holds what one device would have saved."""
    model = adapted(family)
    jpeft.models.save(jpeft.merge(jpeft.shard(model, jpeft.mesh("data=2,fsdp=2,tensor=2"))), tmp_path / "mesh")
    jpeft.models.save(jpeft.merge(model), tmp_path / "one")
    files = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("mesh", "one")]
    assert files[0] == files[1]
    got, expected = (jpeft.partition(jpeft.models.load(tmp_path / name))[2] for name in ("mesh", "one"))
    for path, leaf in got.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=2e-7, atol=1e-8, err_msg=path)


@pytest.mark.parametrize("family", CONFIGS)
def test_loading_puts_each_slice_straight_on_its_device(family, tmp_path, monkeypatch):
    """Every slice is read once, none is larger than what one device holds, and no leaf is ever whole."""
    model = jpeft.models.build(CONFIGS[family], key=jax.random.key(0))
    jpeft.models.save(model, tmp_path / "model")
    read, original = {}, _safetensors.reading

    def count(tensor, targets):
        read.setdefault(tensor, []).extend(out.shape for _, out in targets)
        return original(tensor, targets)

    monkeypatch.setattr(_safetensors, "reading", count)
    mesh = jpeft.mesh("data=2,fsdp=2,tensor=2")
    loaded = jpeft.models.load(tmp_path / "model", sharding=jpeft.placement(mesh))
    _, _, expected = jpeft.partition(model)
    _, _, frozen = jpeft.partition(loaded)
    places = jpeft.shardings(model, mesh)
    for path, leaf in frozen.items():
        assert leaf.sharding == places[path]
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    for tensor, shapes in read.items():
        assert sum(map(np.prod, shapes)) == np.prod(tensor.shape)
    down = {"llama": "model.layers.1.mlp.down_proj.weight", "bert": "bert.encoder.layer.1.output.dense.weight"}[family]
    assert read[_safetensors.header(tmp_path / "model" / "model.safetensors")[down]] == [(32, 64)] * 4


def test_the_page_about_sharding_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "sharding.md").read_text()
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    assert float(names["value"]) < 6.1  # log(512) = 6.24 is what knowing nothing gives
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
