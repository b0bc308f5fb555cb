# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files: every loader gives what is right, or an error of its own that names the file."""

import json
import re

import damage
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_bert import flat

import jpeft
from jpeft.models import CheckpointError
from jpeft.models._checkpoint import SINGLE
from jpeft.train import config, saved, tokenizer

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 4, "head_dim": 4,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 16, "tie_word_embeddings": True,
    "rope_theta": 1e4, "rope_scaling": None, "attention_dropout": 0.0, "pad_token_id": 0, "dtype": "float32",
    "id2label": {"0": "no", "1": "yes"},
}  # fmt: skip
#: What a loader may raise: these and nothing derived from them, such as a JSONDecodeError that names no file.
ERRORS = {CheckpointError, ValueError, FileNotFoundError, config.ConfigError}
#: How much memory may be taken by what is refused or tiny.
MEMORY = 300 * 2**20


@pytest.fixture(scope="module", name="honest")
def _honest(tmp_path_factory):
    """Bytes of a model's files, an adapter's, and the model itself."""
    folder = tmp_path_factory.mktemp("honest")
    model = jpeft.models.build(LLAMA, key=jax.random.key(0))
    jpeft.models.save(model, folder / "model")
    adapted = jpeft.adapt(model, jpeft.LoRA(rank=2, targets=["q_proj"]), key=jax.random.key(1))
    jpeft.export_peft(adapted, folder / "adapter")
    files = {file.name: file.read_bytes() for part in ("model", "adapter") for file in (folder / part).iterdir()}
    return files, model


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def high_water():
    with open("/proc/self/status") as status:
        return int(re.findall(r"VmHWM:\s+(\d+)", status.read())[0]) * 1024


def check(folder, action):
    """An error of `action` is one that it may raise, and names a file of the folder; neither way takes memory."""
    before = high_water()
    caught = None
    try:
        action()
    except Exception as error:
        if type(error) not in ERRORS:
            raise
        caught = str(error)
    assert caught is None or (str(folder) in caught and len(caught) < 20_000), caught
    assert high_water() - before < MEMORY


def load(folder):
    leaves = flat(jpeft.models.load(folder))
    assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in leaves.values())


# Anything -----------------------------------------------------------------------------------------------------------


def _models(honest, folder):
    files, _ = honest
    hf = json.loads(files["config.json"])
    configs = st.one_of(damage.json_objects(hf), damage.bytes_of(files["config.json"]))

    def run(data):
        name = data.draw(st.sampled_from(["config.json", SINGLE]))
        content = data.draw(configs if name == "config.json" else damage.safetensors_of(files[SINGLE]))
        write(folder, {k: files[k] for k in ("config.json", SINGLE)} | {name: content})
        check(folder, lambda: load(folder))

    return run


def _adapters(honest, folder):
    files, model = honest
    peft = json.loads(files["adapter_config.json"]) | {"r": 2, "rank_pattern": {"q_proj": 2}}
    configs = st.one_of(damage.json_objects(peft), damage.bytes_of(files["adapter_config.json"]))

    def run(data):
        name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
        tensors = damage.safetensors_of(files["adapter_model.safetensors"])
        content = data.draw(configs if name == "adapter_config.json" else tensors)
        write(folder, {k: files[k] for k in ("adapter_config.json", "adapter_model.safetensors")} | {name: content})
        check(folder, lambda: jpeft.import_peft(model, folder))

    return run


def _unions(honest, folder):
    """AdapterHub's folder of an adapter of three parts."""
    _, model = honest
    method = jpeft.PrefixTuning(num_tokens=1) | jpeft.LoRA(rank=2, targets=["q_proj"]) | jpeft.ParallelAdapter()
    jpeft.export_adapters(jpeft.adapt(model, method, key=jax.random.key(1)), folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    whole = json.loads(files["adapter_config.json"])
    parts = whole["config"]["configs"]

    def union(part, at):
        held = [json.loads(part) if i == at else other for i, other in enumerate(parts)]
        return json.dumps(whole | {"config": {"architecture": "union", "configs": held}}).encode()

    damaged = [damage.json_objects(part).map(lambda part, at=at: union(part, at)) for at, part in enumerate(parts)]
    config = damage.json_objects(whole["config"]).map(lambda c: json.dumps(whole | {"config": json.loads(c)}).encode())
    configs = st.one_of(*damaged, config, damage.json_objects(whole), damage.bytes_of(files["adapter_config.json"]))

    def run(data):
        name = data.draw(st.sampled_from(["adapter_config.json", "adapter.safetensors"]))
        tensors = damage.safetensors_of(files["adapter.safetensors"])
        write(folder, files | {name: data.draw(configs if name == "adapter_config.json" else tensors)})
        check(folder, lambda: jpeft.import_adapters(model, folder))

    return run


def _programs(honest, folder):
    plain = {
        "model": {"path": "base", "task": "SEQ_CLS"}, "data": {"train": "train.jsonl"}, "train": {"epochs": 1},
        "out": "out", "method": {"kind": "lora"}, "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    info = {"label_names": ["a", "b"], "max_length": 3, "quantize": None}
    contents = {
        "run.yaml": damage.json_objects(plain) | damage.bytes_of(json.dumps(plain).encode()),
        saved.INFO: damage.json_objects(info) | damage.bytes_of(json.dumps(info).encode()),
        "tokenizer.json": damage.bytes_of(b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}}}'),
        "config.json": damage.json_objects({"eos_token_id": 3}),
        "tokenizer_config.json": damage.json_objects({"eos_token": "x", "pad_token": {"content": "y"}}),
    }
    words = tokenizer.Tokenizer(None, 0, 3, "")
    readers = {
        "run.yaml": lambda: config.load(folder / "run.yaml"),
        saved.INFO: lambda: saved._info(folder),
        "tokenizer.json": lambda: tokenizer.load(folder),
        "config.json": lambda: tokenizer.ends(folder, words),
        "tokenizer_config.json": lambda: tokenizer._special(folder),
    }

    def run(data):
        name = data.draw(st.sampled_from(sorted(contents)))
        write(folder, {name: data.draw(contents[name])})
        check(folder, readers[name])

    return run


@pytest.mark.parametrize("what", [_models, _adapters, _unions, _programs])
def test_damage_is_refused_or_harmless(what, honest, tmp_path):
    damage.SHORT(given(st.data())(what(honest, tmp_path / "folder ü")))()


@pytest.mark.slow
@pytest.mark.parametrize("what", [_models, _adapters, _unions, _programs])
def test_much_damage_is_refused_or_harmless(what, honest, tmp_path):
    damage.LONG(given(st.data())(what(honest, tmp_path / "folder ü")))()
