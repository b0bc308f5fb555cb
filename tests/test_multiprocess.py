# SPDX-License-Identifier: Apache-2.0
"""Two real processes on one machine, 4 fake devices each, through `jax.distributed`. Run as a script it is one of them.

python tests/test_multiprocess.py FOLDER PORT PROCESS     # prints what it found as a line of JSON
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from processes import run_all
from safetensors.numpy import load_file
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import jpeft
from jpeft.train.cli import main

#: Losses in float32 against one device: sums of the same terms in another order.
SAME = 1e-5

MESH = "data=2,fsdp=2,tensor=2"
#: What the model writes after its evaluation: two rows, which four devices along `data` and `fsdp` do not divide.
SAMPLES = ("train.samples=2", "train.sample_tokens=6")
BATCH, SEQ, UPDATES = 8, 10, 4
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def train(folder: Path, mesh) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses of a few LoRA updates of the model in `folder`, and the adapter's leaves after them."""
    model = jpeft.models.load(folder, sharding=None if mesh is None else jpeft.placement(mesh))
    method = jpeft.LoRA(rank=4, alpha=8, targets="all-linear", init="pissa", modules_to_save=("norm",))
    model = jpeft.adapt(model, method, key=jax.random.key(1))
    graphdef, trainable, frozen = jpeft.partition(model if mesh is None else jpeft.shard(model, mesh))
    tx = optax.adamw(1e-2)
    state = jpeft.optimizer_state(tx, trainable)

    def loss(trainable, frozen, ids):
        logits = jpeft.combine(graphdef, trainable, frozen)(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    def update(trainable, state, frozen, ids):
        value, grads = jax.value_and_grad(loss)(trainable, frozen, ids)
        changes, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, changes), state, value

    places = jax.tree.map(lambda leaf: leaf.sharding, (trainable, state))
    step = jax.jit(update, donate_argnums=(0, 1), out_shardings=(*places, None))
    losses = []
    ids = np.random.default_rng(0).integers(0, 64, (BATCH, SEQ)).astype(np.int32)
    for _ in range(UPDATES):
        batch = jnp.asarray(ids) if mesh is None else jpeft.shard_batch(ids[jpeft.local_rows(mesh, BATCH)], mesh)
        trainable, state, value = step(trainable, state, frozen, batch)
        losses.append(float(value))
    assert mesh is None or step._cache_size() == 1
    return losses, jpeft.gather(trainable)


def rows_fed(mesh) -> list[int]:
    """The rows that this process feeds on a mesh, whose batch must come out whole."""
    rows = jpeft.local_rows(mesh, BATCH)
    whole = np.arange(BATCH * 3).reshape(BATCH, 3)
    placed = jpeft.shard_batch({"ids": whole[rows]}, mesh)["ids"]
    assert placed.shape == whole.shape
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    return rows.tolist()


def work(folder: Path, port: str, process: int) -> None:
    """What one of the two processes does."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    losses, leaves = train(folder, jpeft.mesh(MESH))
    if process == 0:
        np.savez(folder / "leaves.npz", **{path.replace("/", "|"): leaf for path, leaf in leaves.items()})
    fed = {axes: rows_fed(jpeft.mesh(axes)) for axes in (MESH, "data=8", "tensor=8")}
    turns = [device for pair in zip(jax.devices()[:4], jax.devices()[4:], strict=True) for device in pair]
    fed["taking turns"] = rows_fed(jpeft.mesh("fsdp=8", turns))
    print(json.dumps({"devices": jax.device_count(), "losses": losses, "fed": fed}))


def run_both(command, devices: int = 4) -> list[str]:
    """What two processes print, started as `command(port, process)`; an error shows all that they said."""
    ended = run_all(command, 2, devices)
    if any(code for code, _ in ended):
        print("\n".join(f"--- process {i}, exit status {code}\n{said}" for i, (code, said) in enumerate(ended)))
    assert [code for code, _ in ended] == [0, 0]
    return [said for _, said in ended]


def test_two_processes_train_as_one_device(tmp_path):
    jpeft.models.save(jpeft.models.build(CONFIG, key=jax.random.key(0)), tmp_path)
    said = run_both(lambda port, process: [sys.executable, __file__, str(tmp_path), port, str(process)])
    first, second = (json.loads(text.splitlines()[-1]) for text in said)
    assert first["devices"] == second["devices"] == 8
    assert first["losses"] == second["losses"]
    expected, leaves = train(tmp_path, None)
    assert expected[0] - expected[-1] > 0.05
    np.testing.assert_allclose(first["losses"], expected, rtol=0, atol=SAME)
    with np.load(tmp_path / "leaves.npz") as gathered:
        for path, leaf in leaves.items():
            np.testing.assert_allclose(gathered[path.replace("/", "|")], leaf, rtol=0, atol=SAME, err_msg=path)
    low, high = [0, 1, 2, 3], [4, 5, 6, 7]
    assert first["fed"] == {MESH: low, "data=8": low, "tensor=8": low + high, "taking turns": [0, 2, 4, 6]}
    assert second["fed"] == {MESH: high, "data=8": high, "tensor=8": low + high, "taking turns": [1, 3, 5, 7]}


def recipe(folder: Path) -> Path:
    """A model folder with a tokenizer, texts, and a configuration of a few updates.

    A gradient as small as its rounding is not divided by itself, which Adam's `eps` is for.
    """
    jpeft.models.save(jpeft.models.build(CONFIG, key=jax.random.key(0)), folder / "model")
    words = ["[UNK]", *(f"w{i}" for i in range(1, 64))]
    tokenizer = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    for name, rows in (("train", 24), ("eval", 10)):
        texts = [" ".join(rng.choice(words[1:8], rng.integers(4, 15))) for _ in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "config.yaml").write_text(f"""
model: {{path: {folder}/model, task: CAUSAL_LM}}
data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, max_length: 16, num_widths: 1}}
method: {{kind: lora, rank: 4, alpha: 8, targets: all-linear, dropout: 0.1}}
optimizer: {{lr: 1.0e-2, eps: 1.0e-4}}
train: {{max_steps: 4, batch_size: 4, accumulation: 2, log_every: 2, eval_every: 4}}
out: {folder}/run
""")
    return folder / "config.yaml"


def figures(run: Path) -> tuple[list[float], float]:
    """Losses of all updates, and of the last evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return [loss for line in lines for loss in line.get("losses", [])], evaluated[-1]


@pytest.fixture(scope="module", name="single")
def _single(tmp_path_factory):
    """The configuration, and what `jpeft train` measures on one device."""
    folder = tmp_path_factory.mktemp("cli")
    main(["train", str(recipe(folder)), "--out", str(folder / "one"), *SAMPLES])
    return folder, figures(folder / "one")


@pytest.mark.parametrize("axes", [MESH, "data=2,sequence=4"])
def test_the_program_on_a_mesh_gives_the_losses_of_one_device(single, axes):
    """Dropout is on: the masks, too, are those of one device."""
    folder, (losses, evaluated) = single
    main(["train", str(folder / "config.yaml"), "--out", str(folder / axes), "--mesh", axes])
    on_mesh = figures(folder / axes)
    assert len(losses) == 4
    assert losses[0] - losses[-1] > 0.05
    np.testing.assert_allclose(on_mesh[0], losses, rtol=0, atol=SAME)
    np.testing.assert_allclose(on_mesh[1], evaluated, rtol=0, atol=SAME)


@pytest.mark.slow
def test_the_program_in_two_processes_gives_the_losses_of_one_device(single):
    folder, (losses, evaluated) = single

    def command(port: str, process: int) -> list[str]:
        code = "from jpeft.train.cli import main; main()"
        options = ["--out", str(folder / "two"), "--mesh", MESH, "--distributed", f"localhost:{port},2,{process}"]
        return [sys.executable, "-c", code, "train", str(folder / "config.yaml"), *options, *SAMPLES]

    said = run_both(command)
    in_two = figures(folder / "two")
    np.testing.assert_allclose(in_two[0], losses, rtol=0, atol=SAME)
    np.testing.assert_allclose(in_two[1], evaluated, rtol=0, atol=SAME)
    written = [(folder / run / "samples.jsonl").read_text() for run in ("one", "two")]
    assert written[0] == written[1]
    assert len(written[0].splitlines()) == 2
    first = json.loads(written[0].splitlines()[0])
    assert len(first["text"].split()) == 6
    assert [repr(first["text"]) in text for text in said] == [True, False], "one process writes"
    names = [sorted(file.name for file in (folder / run / "adapter").iterdir()) for run in ("one", "two")]
    assert names[0] == names[1]
    one, two = (load_file(folder / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=SAME, err_msg=name)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
