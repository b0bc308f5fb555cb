# SPDX-License-Identifier: Apache-2.0
"""What a folder may not make a loader do: run code, read or write elsewhere, hang, or take all memory."""

import contextlib
import itertools
import json
import os
import string
import tempfile
from pathlib import Path

import damage
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from saved_bert import _folder, flat  # noqa: F401 (the fixture)

import jpeft
from jpeft import models
from jpeft.models import CheckpointError, _files, _safetensors
from jpeft.models._checkpoint import INDEX, SINGLE
from jpeft.train import _yaml, saved
from jpeft.train.folder import RunFolder

# Where files lie ----------------------------------------------------------------------------------------------------


def test_links_are_followed_to_files_and_to_nothing_else(folder, tmp_path):
    """As in a cache of downloads: names that link to blobs elsewhere."""
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    assert models.load(folder).task == "SEQ_CLS"
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors"):
        models.load(folder)
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)  # opening it would wait for ever
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors"):
        models.load(folder)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/b", "..", "", "a\0b", "*.safetensors", "model.bin"])
def test_an_index_names_files_of_its_folder(folder, name):
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"outside of its folder|that are no safetensors"):
        models.load(folder)


def test_a_folder_in_the_place_of_a_file(folder):
    for file, message in (("config.json", r"no .*config\.json"), (SINGLE, "has neither")):
        moved = (folder / file).rename(folder / "aside")
        (folder / file).mkdir()
        with pytest.raises(FileNotFoundError, match=message):
            models.load(folder)
        (folder / file).rmdir()
        moved.rename(folder / file)


@contextlib.contextmanager
def as_nobody():
    """The superuser may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "config.json")
        file.write_text("{}")
        file.chmod(0)
        Path(name).chmod(0o755)
        with as_nobody(), pytest.raises(PermissionError, match=r"config\.json"):
            models.load(name)


def test_nothing_is_written_through_a_link(folder, tmp_path):
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.write_text("mine")
    target.mkdir()
    (folder / "tokenizer.json").write_text("words")
    for name in ("tokenizer.json", "jpeft.json", "adapter_config.json", "adapter_model.safetensors", "README.md"):
        (target / name).symlink_to(outside)
    model = jpeft.adapt(models.load(folder), jpeft.LoRA(rank=2), key=jax.random.key(0))
    saved.save_adapter(model, target, folder, saved.Info(None, None), saved.Card())
    assert outside.read_text() == "mine"
    assert not any(file.is_symlink() for file in target.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "nothing yet")
    with pytest.raises(FileExistsError, match="holds a run already"):
        RunFolder(tmp_path / "run")


def test_a_link_to_a_folder_is_saved_into(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    models.save(models.load(folder, "TOKEN_CLS"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert models.load(folder).task == "TOKEN_CLS"


def test_a_tokenizer_is_copied_onto_itself_without_harm(folder):
    (folder / "tokenizer.json").write_text("words")
    models.copy_tokenizer(folder, folder)
    assert (folder / "tokenizer.json").read_text() == "words"


@pytest.mark.parametrize("name", ["../x", "a/b", "a.b", "", "a b"])
def test_an_adapter_s_name_is_no_path(folder, tmp_path, name):
    model = models.load(folder)
    jpeft.export_peft(jpeft.adapt(model, jpeft.LoRA(rank=2), key=jax.random.key(0)), tmp_path / "adapter")
    with pytest.raises(ValueError, match="must be an identifier"):
        jpeft.import_peft(model, tmp_path / "adapter", name=name)


# What they say ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1, "a": 2}', "says a twice"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "more than 64 levels deep"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[]", "must hold a JSON object, holds a list"),
        (b"\xff", "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_json_that_is_refused(tmp_path, content, message):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"file\.json .*{message}"):
        _files.read_json(tmp_path / "file.json")


def test_json_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "MOST_BYTES", 10)
    (tmp_path / "file.json").write_text('{"a": "12345"}')
    with pytest.raises(CheckpointError, match="more than 10 bytes"):
        _files.read_json(tmp_path / "file.json")


def test_a_header_of_many_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / SINGLE, "wb") as file:  # of which the disk holds a block
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**41)
    with pytest.raises(CheckpointError, match=r"its header cannot be read, it has 1,099,511,627,776 bytes"):
        _safetensors.header(tmp_path / SINGLE)


def _entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, r"b lies at byte \d+, and the tensors before it end at"),
        ({"a": _entry([2], 0, 8), "b": _entry([1], 0, 4)}, "lies at byte"),
        ({"a": _entry([1], 0, 4), "b": _entry([1], 8, 12)}, "lies at byte"),
        ({"a": _entry([3], 12, 0)}, r"a says F32 \[3\] but lies at bytes 12 to 0"),
        ({"a": _entry([-3], 0, 12)}, "a has no dtype, shape and data_offsets"),
        ({"a": _entry([3], -12, 0)}, "a has no dtype, shape and data_offsets"),
        ({"a": _entry([2**62, 2**62], 0, 12)}, "but lies at bytes 0 to 12"),
        ({"a": _entry([True, 3], 0, 12)}, "a has no dtype, shape and data_offsets"),
        ({"a": _entry([3], 0, 12, "I64")}, r"a says I64 \[3\] but lies"),
        ({"a": _entry([2], 0, 8)}, "should have .* bytes by its own header"),
    ],
)
def test_headers_that_are_refused(tmp_path, header, message):
    (tmp_path / SINGLE).write_bytes(damage.framed(header, bytes(12)))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        _safetensors.header(tmp_path / SINGLE)


def test_two_names_of_one_tensor_are_refused(folder):
    tensors = _safetensors.header(folder / SINGLE)
    key = "bert.embeddings.LayerNorm.weight"
    one = np.ones(12, np.float32)
    sources = {
        name: _safetensors.Source(t.shape, np.dtype("f4"), lambda t=t: np.ones(t.shape, "f4"))
        for name, t in tensors.items()
    }
    sources[key.replace("weight", "gamma")] = _safetensors.Source((12,), one.dtype, lambda: one)
    _safetensors.write(folder / SINGLE, sources, {})
    with pytest.raises(CheckpointError, match=r"under two names each: bert\.embeddings\.LayerNorm\.weight"):
        models.load(folder)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(dtype):
    top = float(np.finfo(dtype).max) if dtype != ml_dtypes.bfloat16 else float(ml_dtypes.finfo(dtype).max)
    good = np.array([0.0, -0.0, 1.5, -1.5, top, -top, 1e-30, -1e-30], dtype)
    assert _safetensors.is_finite(good)
    assert _safetensors.is_finite(good[:0])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for place in range(len(good)):
            broken = good.copy()
            broken[place] = bad
            assert not _safetensors.is_finite(broken), (bad, place)


def _poison(folder, value):
    tensor = _safetensors.header(folder / SINGLE)["bert.encoder.layer.1.output.dense.weight"]
    with open(folder / SINGLE, "r+b") as file:
        file.seek(tensor.stop - 4)
        file.write(np.float32(value).tobytes())


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite_are_refused_by_name(folder, value):
    _poison(folder, value)
    with pytest.raises(
        CheckpointError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight has values that are not f"
    ):
        models.load(folder)


def test_weights_that_are_too_large_for_the_dtype_are_refused_by_name(folder):
    _poison(folder, 1e6)
    assert np.isfinite(flat(models.load(folder, dtype=jnp.bfloat16))["layers/output/dense/kernel"].astype("f4")).all()
    with pytest.raises(CheckpointError, match=r"layer\.1\.output\.dense\.weight has values .* not finite as float16"):
        models.load(folder, dtype=jnp.float16)


def test_configs_of_no_model_are_refused_before_anything_is_made(folder):
    hf = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"hidden_size": "768", "vocab_size": -1}, "vocab_size=-1, hidden_size='768'"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"hidden_dropout_prob": 1.5}, r"hidden_dropout_prob=1\.5"),
        ({"layer_norm_eps": True}, "layer_norm_eps=True"),
        ({"architectures": "BertModel"}, "architectures='BertModel'"),
        ({"id2label": {"no": "x"}}, "id2label, whose keys are not whole numbers"),
        ({"model_type": ["bert"]}, r"model_type \['bert'\]"),
    ):
        (folder / "config.json").write_text(json.dumps(hf | change))
        with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
            models.load(folder)


#: Modules enough for an adapter of the highest rank to be of another order than its file.
WIDE = ("query", "key", "value", "dense")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 2**31 - 1}, "LoRA's rank must be at most 1,048,576, got 2147483647"),
        (
            {"r": 2**20, "target_modules": [*WIDE]},
            r"asks for an adapter of [\d,]+ numbers, and adapter_model",
        ),
        ({"r": "2"}, "r must be a whole number, got '2'"),
        ({"target_modules": "("}, "target_modules has the regular expression"),
        ({"target_modules": "(a+)+$"}, "repeats what is repeated, and could take for ever"),
        ({"modules_to_save": ["(x*)*"]}, "repeats what is repeated"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern has the regular expression"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform must be a whole number, or a list of them"),
        ({"trainable_token_indices": True}, "trainable_token_indices must be a list of whole numbers, or an object of"),
        ({"trainable_token_indices": {"word_embeddings": "12"}}, "trainable_token_indices must be a list of whole"),
    ],
)
def test_adapter_configs_that_are_refused(folder, tmp_path, change, message):
    model = models.load(folder)
    jpeft.export_peft(jpeft.adapt(model, jpeft.LoRA(rank=2), key=jax.random.key(0)), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{message}"):
        jpeft.import_peft(model, tmp_path / "adapter")


#: Each value is twice the one before: 2 ** 26 in all.
_DOUBLING = "a: &a x\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(string.ascii_lowercase))


@pytest.mark.parametrize(
    "text, message",
    [
        (_DOUBLING, "more than 100,000"),
        ("a: &a [*a]", "holds itself"),
        ("{a: 1, a: 2}", "says a twice"),
        ("[" * 100 + "]" * 100, "more than 64 levels deep"),
        ("a: 2021-99-99", "month must be in"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        _yaml.read(text)


def test_yaml_s_aliases_are_read():
    assert _yaml.read("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}
    assert _yaml.read("") is None
