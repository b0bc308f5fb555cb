# SPDX-License-Identifier: Apache-2.0
"""Loading onto devices, in little memory; and replacing a folder without ever losing it."""

import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from saved_bert import _folder, assert_equal, flat, read_tensors  # noqa: F401 (the fixture)

from jpeft import models
from jpeft.models import CheckpointError, _safetensors
from jpeft.models._checkpoint import SINGLE

# Places and memory --------------------------------------------------------------------------------------------------


def test_each_device_gets_its_slice_and_each_is_read_once(folder, monkeypatch):
    expected = flat(models.load(folder))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    fill, counted = _safetensors._fill, []
    monkeypatch.setattr(_safetensors, "_fill", lambda s, block, f: (counted.append(block.nbytes), fill(s, block, f)))
    monkeypatch.setattr(_safetensors, "_BLOCK_BYTES", 200)

    def place(path, shape):
        axes = ["fsdp" if size % 2 == 0 and len(shape.shape) > 1 else None for size in shape.shape]
        names = [axis if axes.index(axis) == at else None for at, axis in enumerate(axes)]
        if path.endswith("kernel"):
            names[-1] = "tensor" if shape.shape[-1] % 2 == 0 and names[-1] is None else names[-1]
        return NamedSharding(mesh, P(*names))

    leaves = flat(models.load(folder, sharding=place))
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
        assert leaf.sharding == place(path, leaf), path
    assert sum(counted) == sum(leaf.nbytes for leaf in expected.values())
    assert max(counted) <= 200

    fresh = flat(models.load(folder, "TOKEN_CLS", num_labels=4, sharding=place))["classifier/kernel"]
    assert fresh.sharding == place("classifier/kernel", fresh)


_MEMORY = """
    import resource, sys
    import jax, jax.numpy as jnp
    from jpeft import models

    def peak():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

    jax.block_until_ready(jnp.ones(3) + 1)
    before = peak()
    model = models.load(sys.argv[1])
    loaded = peak()
    models.save(model, sys.argv[2])
    print(loaded - before, peak() - loaded)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="data absent: no /proc/self/status to measure by")
def test_loading_and_saving_hold_one_model_and_one_leaf(tmp_path):
    """A leaf is an eighth of this model; a second copy would be eight."""
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=1024, num_hidden_layers=8, num_attention_heads=2, intermediate_size=1024
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "model", max_shard_size="60MB")
    size = sum(file.stat().st_size for file in tmp_path.glob("model/*.safetensors"))
    leaf, slack = 8 * 1024 * 1024 * 4, 100 * 2**20
    assert size > 6 * leaf
    loading, saving = map(int, _python(_MEMORY, tmp_path / "model", tmp_path / "saved").split())
    assert loading < size + leaf + slack
    assert saving < 2 * leaf + slack
    assert_equal(read_tensors(tmp_path / "saved"), read_tensors(tmp_path / "model"))


def _python(script, *args):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Replacing a folder -------------------------------------------------------------------------------------------------


def test_saving_over_a_folder_replaces_the_model_and_keeps_the_rest(folder):
    model = models.load(folder, "TOKEN_CLS")
    (folder / "tokenizer.json").write_text("words")
    (folder / "pytorch_model.bin").write_text("old weights")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("pooling")
    models.save(model, folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", SINGLE, "tokenizer.json", "1_Pooling/config.json"}
    assert (folder / "tokenizer.json").read_text() == "words"
    assert models.load(folder).task == "TOKEN_CLS"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_save_leaves_the_old_folder(folder, monkeypatch):
    model, before = models.load(folder, "TOKEN_CLS"), {f.name: f.read_bytes() for f in folder.iterdir()}

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(models, "save_leaves", full)
    with pytest.raises(OSError, match="disk full"):
        models.save(model, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


_KILLED = """
    import os, signal, sys
    from jpeft import models
    from jpeft.models import _safetensors

    model = models.load(sys.argv[1], "TOKEN_CLS")
    host, count = models._weights._host, []

    def dying(path, leaf):
        count.append(path)
        if len(count) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return host(path, leaf)

    models._weights._host = dying
    models.save(model, sys.argv[1])
"""


def test_a_killed_save_leaves_the_old_folder(folder):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_KILLED), str(folder)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_what_is_no_model_folder_is_not_replaced(folder, tmp_path):
    model = models.load(folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("text")
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "thesis", tmp_path / "file"):
        with pytest.raises(FileExistsError, match="exists and is no model folder"):
            models.save(model, path)
    (tmp_path / "empty").mkdir()
    models.save(model, tmp_path / "empty")
    models.save(model, tmp_path / "new" / "below")
    assert (tmp_path / "new" / "below" / SINGLE).is_file()


def test_the_tokenizer_is_copied(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none of a tokenizer's or processor's files"):
        models.copy_tokenizer(folder, tmp_path / "copy")
    (folder / "tokenizer.json").write_text("words")
    assert models.copy_tokenizer(folder, tmp_path / "copy") == ["tokenizer.json"]
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "words"


def test_adapters_are_not_saved_with_a_model(folder, tmp_path):
    model = models.load(folder)
    model.layers.intermediate.dense.extra = nnx.Param(jnp.ones(3))
    with pytest.raises(CheckpointError, match="disagree about layers/intermediate/dense/extra; merge or strip"):
        models.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
