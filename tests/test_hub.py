# SPDX-License-Identifier: Apache-2.0
"""The hub: what is fetched of it, from its cache or not at all, and what is put there; on a hub of this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from hub_server import Hub, Repository
from saved_bert import TINY, flat

import jpeft
from jpeft import models
from jpeft.io.card import Card
from jpeft.models import CheckpointError, _hub
from jpeft.models._checkpoint import INDEX, SINGLE
from jpeft.models._weights import save_leaves
from jpeft.train import cli, saved

#: How huggingface_hub uploads a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

WORDS = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}}'
MODEL, ADAPTER = "org/tiny-bert", "org/tiny_adapter.v1"


@pytest.fixture(name="hub")
def _hub_here(tmp_path, monkeypatch):
    """A hub that all requests go to, an empty cache, and a user who is logged in."""
    hub = Hub()
    for name, value in (
        ("ENDPOINT", hub.address), ("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_HUB_OFFLINE", False),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", True), ("HF_HUB_DISABLE_XET", True),
    ):  # fmt: skip
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(tmp_path)
    huggingface_hub.close_session()
    yield hub
    hub.stop()
    huggingface_hub.close_session()


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    """A folder with a model, one with an adapter on it, and the model."""
    folder = tmp_path_factory.mktemp("made")
    model = models.build(TINY | {"architectures": ["BertForSequenceClassification"]}, key=jax.random.key(0))
    models.save(model, folder / "model")
    (folder / "model" / "tokenizer.json").write_text(WORDS)
    adapted = jpeft.adapt(model, jpeft.LoRA(rank=2, targets=["query"]), key=jax.random.key(1))
    jpeft.export_peft(adapted, folder / "adapter", base=MODEL)
    return folder, model, adapted


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, flat(one), flat(other))


# Fetching -----------------------------------------------------------------------------------------------------------


def test_a_model_and_an_adapter_by_their_ids(hub, made):
    folder, model, adapted = made
    noise = {
        "pytorch_model.bin": b"pickle",
        "optimizer.pt": b"x",
        "flax.msgpack": b"x",
        "consolidated.safetensors": b"x",
    }
    hub.repositories[MODEL] = Repository(contents(folder / "model") | noise)
    hub.repositories[ADAPTER] = Repository(contents(folder / "adapter") | {"adapter_model.bin": b"pickle"})
    loaded = models.load(MODEL)
    same(loaded, model)
    assert hub.fetched == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.asked.clear()
    same(jpeft.import_peft(loaded, ADAPTER), adapted)
    assert hub.fetched == ["adapter_config.json", "adapter_model.safetensors"]


def test_shards_are_those_that_the_index_names(hub, made, tmp_path):
    folder, model, _ = made
    shutil.copytree(folder / "model", tmp_path / "shards")
    (tmp_path / "shards" / SINGLE).unlink()
    save_leaves(tmp_path / "shards", models.weights(model), flat(model), shard_bytes=4000)
    files = contents(tmp_path / "shards")
    hub.repositories[MODEL] = Repository(files | {SINGLE: b"another model", "model-00009-of-00009.safetensors": b"old"})
    same(models.load(MODEL), model)
    assert hub.fetched == sorted({*files})
    index = json.loads(files[INDEX])
    index["weight_map"]["classifier.bias"] = "pytorch_model.bin"
    hub.repositories[MODEL].commit("main", files | {INDEX: json.dumps(index).encode()}, "a trap")
    with pytest.raises(CheckpointError, match=r"files that are no safetensors: pytorch_model\.bin"):
        models.load(MODEL)


def test_a_folder_of_that_name_wins(hub, made):
    shutil.copytree(made[0] / "model", MODEL)
    same(models.load(MODEL), made[1])
    assert not hub.asked
    with pytest.raises(
        ValueError, match="revision='main' is of what lies on the hub, and org/tiny-bert is a folder here"
    ):
        models.load(MODEL, revision="main")


def test_a_revision_is_a_branch_or_a_commit(hub, made):
    folder, *_ = made
    hub.repositories[MODEL] = Repository(contents(folder / "model"))
    first = hub.repositories[MODEL].find("main")
    config = json.loads(contents(folder / "model")["config.json"]) | {"id2label": {"0": "a", "1": "b"}}
    hub.repositories[MODEL].commit(
        "other", contents(folder / "model") | {"config.json": json.dumps(config).encode()}, "labels"
    )
    assert "id2label" in models.load(MODEL, revision="other").config.to_hf()
    assert "id2label" not in models.load(MODEL, revision=first).config.to_hf()
    with pytest.raises(FileNotFoundError, match="org/tiny-bert has no revision 'third' on the hub"):
        models.load(MODEL, revision="third")


def test_the_cache_serves_without_a_hub(hub, made, monkeypatch):
    folder, model, adapted = made
    hub.repositories |= {
        MODEL: Repository(contents(folder / "model")),
        ADAPTER: Repository(contents(folder / "adapter")),
    }
    jpeft.import_peft(models.load(MODEL), ADAPTER)
    asked = len(hub.asked)
    same(models.load(MODEL, local_files_only=True), model)
    assert len(hub.asked) == asked
    hub.stop()
    same(jpeft.import_peft(models.load(MODEL), ADAPTER), adapted)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    same(jpeft.import_peft(models.load(MODEL), ADAPTER), adapted)


def test_what_the_cache_lacks(hub, made, monkeypatch):
    hub.repositories[MODEL] = Repository(contents(made[0] / "model"))
    with pytest.raises(
        FileNotFoundError, match=r"cache of the hub does not hold all of it.*is not asked \(local_files"
    ):
        models.load(MODEL, local_files_only=True)
    assert not hub.asked
    hub.stop()
    with pytest.raises(ConnectionError, match=r"no folder org/tiny-bert is here.*the hub cannot be reached"):
        models.load(MODEL)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(FileNotFoundError, match=r"at revision v2, and the hub is not asked"):
        models.load(MODEL, revision="v2")


def test_what_the_hub_does_not_give(hub, made, monkeypatch):
    files = contents(made[0] / "model")
    with pytest.raises(FileNotFoundError, match=r"no folder org/none is here, and the hub has no org/none.*hf auth"):
        models.load("org/none")
    hub.repositories["org/gated"] = Repository(files, gated=True)
    with pytest.raises(PermissionError, match="org/gated is gated on the hub: ask for access on its page there"):
        models.load("org/gated")
    hub.repositories["org/private"] = Repository(files, private=True)
    same(models.load("org/private"), made[1])
    monkeypatch.setenv("HF_TOKEN", "another")
    hub.repositories["org/secret"] = Repository(files, private=True)
    with pytest.raises(FileNotFoundError, match="if it is private, log in"):
        jpeft.import_peft(made[1], "org/secret")
    pickled = {k: c for k, c in files.items() if k != SINGLE} | {"pytorch_model.bin": b"pickle"}
    hub.repositories["org/old"] = Repository(pickled)
    with pytest.raises(
        FileNotFoundError, match=r"org/old has no model\.safetensors on the hub; of weights only safeten"
    ):
        models.load("org/old")
    assert "pytorch_model.bin" not in hub.fetched


def test_what_is_no_id_is_a_folder(hub):
    for name in ("one", "a/b/c", "../x", "/x/y", "a/", ".a/b", Path("org/name")):
        with pytest.raises(FileNotFoundError, match=r"no .*config\.json; a model folder"):
            models.load(name)
    assert not hub.asked


def test_without_the_package(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"need the package huggingface_hub: pip install 'jpeft\[hub\]'"):
        models.load(MODEL)


# Pushing ------------------------------------------------------------------------------------------------------------


def test_an_adapter_goes_in_one_commit_and_comes_back(hub, made, tmp_path):
    folder, model, adapted = made
    shutil.copytree(folder / "adapter", tmp_path / "mine")
    for name in ("optimizer.npz", "metrics.jsonl", ".cache", "adapter_model.bin", "notes.txt", "model.safetensors"):
        (tmp_path / "mine" / name).write_text("not yours")
    (tmp_path / "mine" / "checkpoint").mkdir()
    (tmp_path / "mine" / "jpeft.json").write_text("{}")
    address = jpeft.push(tmp_path / "mine", ADAPTER, private=True, message="first")
    repository = hub.repositories[ADAPTER]
    assert address == f"{hub.address}/{ADAPTER}/commit/{repository.find('main')}"
    assert repository.messages == ["start", "first"]
    assert repository.private
    files = repository.commits[repository.find("main")]
    assert {*files} == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "jpeft.json",
    }  # fmt: skip
    assert files["adapter_model.safetensors"] == (tmp_path / "mine" / "adapter_model.safetensors").read_bytes()
    same(jpeft.import_peft(model, ADAPTER), adapted)


def test_a_model_replaces_the_weights_that_were_there(hub, made):
    folder, model, _ = made
    old = {
        "pytorch_model.bin": b"",
        INDEX: b"",
        "model-00001-of-00001.safetensors": b"",
        "LICENSE": b"",
        "v/x.bin": b"",
    }
    hub.repositories[MODEL] = Repository(old)
    jpeft.push(folder / "model", MODEL, revision="new")
    repository = hub.repositories[MODEL]
    assert {*repository.commits[repository.find("main")]} == {*old}
    assert {*repository.commits[repository.find("new")]} == {
        "config.json", SINGLE, "tokenizer.json", "LICENSE", "v/x.bin"
    }  # fmt: skip
    same(models.load(MODEL, revision="new"), model)


def test_what_is_not_pushed(hub, made, tmp_path):
    folder, *_ = made
    for source, message in (
        (folder, r"holds no adapter \(adapter_config.json\) and no model .*did you mean .*/adapter\?"),
        (tmp_path, "holds no adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            jpeft.push(source, MODEL)
    with pytest.raises(FileNotFoundError, match="no folder"):
        jpeft.push(tmp_path / "nowhere", MODEL)
    with pytest.raises(ValueError, match=r"a repository is called org/name.*got 'name'"):
        jpeft.push(folder / "adapter", "name")
    shutil.copytree(folder / "adapter", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="by its own header"):
        jpeft.push(tmp_path / "damaged", MODEL)
    shutil.copytree(folder / "adapter", tmp_path / "linked")
    (tmp_path / "linked" / "README.md").unlink()
    (tmp_path / "linked" / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"has links in it, .*: README\.md"):
        jpeft.push(tmp_path / "linked", MODEL)
    assert not hub.asked


def test_what_the_hub_does_not_take(hub, made, monkeypatch):
    adapter = made[0] / "adapter"
    hub.repositories["org/public"] = Repository()
    with pytest.raises(ValueError, match="org/public is there already, and is public"):
        jpeft.push(adapter, "org/public", private=True)
    hub.ignored = ("adapter_model.safetensors",)
    with pytest.raises(ValueError, match=r"the hub left adapter_model\.safetensors out of org/ignoring"):
        jpeft.push(adapter, "org/ignoring")
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises((PermissionError, FileNotFoundError), match="log in by"):
        jpeft.push(adapter, ADAPTER)
    hub.stop()
    with pytest.raises(ConnectionError, match=f"the hub cannot be reached for {ADAPTER}"):
        jpeft.push(adapter, ADAPTER)


def test_a_base_that_others_cannot_load_is_said(hub, made, tmp_path, caplog):
    jpeft.export_peft(made[2], tmp_path / "local", base=str(tmp_path))
    jpeft.push(tmp_path / "local", ADAPTER)
    assert "names the base" in caplog.text


def test_the_program_takes_ids(hub, made, tmp_path, capsys):
    hub.repositories |= {MODEL: Repository(contents(made[0] / "model"))}
    cli.main(["push", str(made[0] / "adapter"), ADAPTER, "--private", "--message", "by hand"])
    assert capsys.readouterr().out.startswith(f"on the hub: {hub.address}/{ADAPTER}/commit/")
    assert hub.repositories[ADAPTER].messages[-1] == "by hand"
    opened = saved.open_model(None, ADAPTER)
    same(opened.model, made[2])
    assert (opened.name, opened.base.parent.name) == (MODEL, "snapshots")
    saved.save_adapter(opened.model, tmp_path / "again", opened.name, opened.info, Card())
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"] == MODEL
    cli.main(["inspect", "--model", MODEL])
    assert capsys.readouterr().out.startswith("bert for SEQ_CLS")
    with pytest.raises(SystemExit):
        cli.main(["push", str(made[0]), MODEL])
    assert "holds no adapter" in capsys.readouterr().err


@pytest.mark.slow
def test_the_environment_says_where_the_hub_is(hub, made, tmp_path):
    """In processes of their own: the settings are read when the library is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(offline, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "jpeft.train.program", *map(str, arguments)],
            env=environment | {"HF_HUB_OFFLINE": offline}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert run("0", "push", made[0] / "model", MODEL).stdout.startswith(f"on the hub: {hub.address}/{MODEL}/commit/")
    assert "is not asked" in run("1", "inspect", "--model", MODEL).stderr
    assert run("0", "inspect", "--model", MODEL).stdout.startswith("bert for SEQ_CLS")
    hub.stop()


def test_ids():
    assert all(map(_hub.is_id, ("a/b", "meta-llama/Llama-3.2-1B", "o_o/x.y")))
    assert not any(map(_hub.is_id, ("a", "a/b/c", "", "a//b", "a/b ", "-a/b", "a/..b/c", Path("a/b"))))
