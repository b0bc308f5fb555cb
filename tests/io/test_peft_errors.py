# SPDX-License-Identifier: Apache-2.0
"""What keeps an adapter from being written or read is an error that names it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle as oracle
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.models import CheckpointError

BERT, TIED = "bert cls", "llama tied"
PREFIX = "base_model.model."
QUERY = PREFIX + "bert.encoder.layer.1.attention.self.query."


def adapt(family, **options):
    return jpeft.adapt(oracle.jax_model(family), jpeft.LoRA(rank=3, **options), key=jax.random.key(0))


def load(folder, family=BERT):
    return jpeft.import_peft(oracle.jax_model(family), folder)


@pytest.fixture(name="folder")
def _folder(tmp_path):
    """A good adapter on BERT, to be spoiled."""
    return jpeft.export_peft(adapt(BERT, targets=["query", "value"]), tmp_path / "adapter")


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


# Reading: files -----------------------------------------------------------------------------------------------------


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*nowhere/adapter_config\.json; PEFT's save_pretrained writes it"):
        load(tmp_path / "nowhere")


def test_a_folder_of_folders(folder):
    with pytest.raises(FileNotFoundError, match=r"; did you mean .*/adapter\?"):
        load(folder.parent)


def test_no_weights(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*adapter_model\.safetensors"):
        load(folder)


def test_a_pickle_is_not_opened(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only adapter_model\.bin, a pickle, which can run code"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file(folder, kept):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors (is no safetensors file|should have)"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_configuration(folder, text):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json (is not JSON|must hold a JSON object)"):
        load(folder)


# Reading: tensors ---------------------------------------------------------------------------------------------------


def test_everything_wrong_with_the_tensors_is_one_error(folder):
    def spoil(tensors):
        del tensors[QUERY + "lora_A.weight"]
        tensors[QUERY + "lora_B.weight"] = np.zeros((16, 4), np.float32)
        tensors[PREFIX + "classifier.weight"] = np.zeros((3, 16), np.int8)
        tensors[PREFIX + "bert.encoder.layer.7.attention.self.query.lora_A.weight"] = np.zeros((3, 16), np.float32)

    change_tensors(folder, spoil)
    with pytest.raises(CheckpointError, match="does not fit the model") as error:
        load(folder)
    assert str(error.value).splitlines()[1:] == [
        f"  {QUERY}lora_A.weight is missing",
        f"  {PREFIX}bert.encoder.layer.7.attention.self.query.lora_A.weight is unknown",
        f"  {QUERY}lora_B.weight is [16, 4], the model needs [16, 3]",
        f"  {PREFIX}classifier.weight is I8, not one of F64, F32, F16, BF16",
    ]


def test_a_layer_that_is_missing_as_a_whole(folder):
    change_tensors(folder, lambda tensors: [tensors.pop(key) for key in [*tensors] if key.startswith(QUERY)])
    with pytest.raises(CheckpointError, match=rf"{QUERY}lora_A.weight is missing\n  {QUERY}lora_B.weight is missing"):
        load(folder)


def test_another_rank_than_the_configuration_s(folder):
    change_config(folder, r=2)
    with pytest.raises(CheckpointError, match=r"query.lora_A.weight is \[3, 16\], the model needs \[2, 16\]"):
        load(folder)


def test_an_adapter_of_another_architecture(folder):
    change_config(folder, task_type=None, modules_to_save=None)
    with pytest.raises(
        ValueError, match=r"adapter_config.json: target_modules=\['query', 'value'\] is no module of th"
    ):
        load(folder, "llama")


def test_an_adapter_of_a_wider_model(tmp_path):
    config = oracle.FAMILIES[BERT][2] | {"model_type": "bert", "hidden_size": 32}
    wide = jpeft.models.build(config, "SEQ_CLS", key=jax.random.key(0), num_labels=3)
    jpeft.export_peft(jpeft.adapt(wide, jpeft.LoRA(rank=3), key=jax.random.key(0)), tmp_path)
    with pytest.raises(CheckpointError, match=r"lora_A.weight is \[3, 32\], the model needs \[3, 16\]"):
        load(tmp_path)


def test_a_value_that_is_not_finite(folder):
    change_tensors(folder, lambda tensors: tensors[QUERY + "lora_A.weight"].fill(np.nan))
    with pytest.raises(CheckpointError, match=f"{QUERY}lora_A.weight has values that are not finite"):
        load(folder)


def test_a_copy_of_another_base(tmp_path):
    jpeft.export_peft(adapt(TIED, targets=["embed_tokens"]), tmp_path)
    key = PREFIX + "model.embed_tokens.base_layer.weight"
    table = np.array(oracle.jax_model(TIED).embed_tokens.embedding[...])
    change_tensors(tmp_path, lambda tensors: tensors.update({key: table}))
    load(tmp_path, TIED)
    table[3, 4] += 1e-3
    change_tensors(tmp_path, lambda tensors: tensors.update({key: table}))
    with pytest.raises(CheckpointError, match=f"{key} differs from the base model"):
        load(tmp_path, TIED)
    change_tensors(tmp_path, lambda tensors: tensors.update({key: table[:-1]}))
    with pytest.raises(CheckpointError, match=rf"{key} is \[47, 16\], the model needs \[48, 16\]"):
        load(tmp_path, TIED)


def test_a_head_that_went_its_own_way(tmp_path):
    jpeft.export_peft(adapt(TIED, targets=["embed_tokens"]), tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors[PREFIX + "lm_head.lora_A.weight"].fill(1.5))
    with pytest.raises(CheckpointError, match="differs from the tensor that it is tied to"):
        load(tmp_path, TIED)


# Reading: configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "BOFT"}, "peft_type 'BOFT'; jpeft reads LORA"),
        ({"peft_type": None}, "peft_type None; jpeft reads LORA"),
        ({"task_type": "TOKEN_CLS"}, "an adapter for TOKEN_CLS, the model is one for SEQ_CLS"),
        ({"use_dora": True, "lora_bias": True}, "does not do, or does not know: lora_bias=True"),
        (
            {"trainable_token_indices": {"wte": [1]}},
            "trainable_token_indices names 'wte', which this model does not have",
        ),
        ({"target_parameters": ["a.b"]}, r"target_parameters=\['a.b'\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"a_key_of_2030": "yes"}, "a_key_of_2030='yes'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4': PEFT changed the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora': PEFT changed the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq': PEFT changed the base"),
        ({"target_modules": None}, "target_modules is None"),
        ({"modules_to_save": ["classifier", "pooller"]}, "modules_to_save names 'pooller', which this model does not"),
        ({"r": 0}, "rank must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_a_configuration_that_jpeft_does_not_hold(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{message}"):
        load(folder)


def test_what_changes_nothing_is_accepted(folder):
    change_config(
        folder, a_key_of_2030=None, another=False, merge_weights=True, peft_version="9.9", megatron_core="x",
        eva_config={"rho": 2.0}, init_lora_weights="eva", revision="main", runtime_config={"x": 1}
    )  # fmt: skip
    (row,) = jpeft.summary(load(folder)).rows
    assert row.method.targets == ("query", "value")


def test_a_configuration_of_the_first_peft(folder):
    """What PEFT 0.3 wrote: fewer keys, and a head that only the task tells of."""
    config = json.loads((folder / "adapter_config.json").read_text())
    old = {key: config[key] for key in ("base_model_name_or_path", "bias", "lora_alpha", "peft_type", "r", "task_type")}
    old |= {"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0}
    old |= {
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "target_modules": ["query", "value"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(old))
    again = jpeft.export_peft(load(folder), folder.parent / "again")
    assert (again / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("one, other", [("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")])
def test_half_of_a_tied_table(tmp_path, field, one, other):
    jpeft.export_peft(adapt(TIED, targets=["q_proj"]), tmp_path)
    change_config(tmp_path, **{field: [one]})
    with pytest.raises(
        ValueError, match=f"{field} names .*{one} but not {other}, and in this model they are one table"
    ):
        load(tmp_path, TIED)


def test_a_name_that_is_taken(folder):
    with pytest.raises(ValueError, match=r"already has an adapter 'lora'"):
        jpeft.import_peft(adapt(BERT), folder)


# Writing ------------------------------------------------------------------------------------------------------------


def test_a_model_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter to export; jpeft\.adapt puts one on it"):
        jpeft.export_peft(oracle.jax_model(BERT), tmp_path)


def test_several_adapters(tmp_path):
    model = jpeft.adapt(adapt(BERT), jpeft.LoRA(rank=2, targets=["key"]), key=jax.random.key(1), name="second")
    with pytest.raises(ValueError, match="has the adapters lora, second, and a PEFT folder holds one: pass name="):
        jpeft.export_peft(model, tmp_path)
    with pytest.raises(ValueError, match="no adapter 'third'; it has lora, second"):
        jpeft.export_peft(model, tmp_path, name="third")
    jpeft.export_peft(model, tmp_path, name="second")
    (row,) = jpeft.summary(load(tmp_path)).rows
    assert row.method.targets == ("key",)


def test_a_model_without_hugging_face_names(tmp_path):
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    model = jpeft.adapt(model, jpeft.LoRA(rank=2, targets="all-linear"), key=jax.random.key(0))
    with pytest.raises(ValueError, match="Sequential has no table of Hugging Face names"):
        jpeft.export_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_method_without_a_peft_form(tmp_path, monkeypatch):
    monkeypatch.setattr(jpeft.LoRA, "kind", "houlsby")
    with pytest.raises(ValueError, match="no format for the adapter 'houlsby', a houlsby; it has one for lora"):
        jpeft.export_peft(adapt(BERT), tmp_path)


def test_an_adapter_on_the_head_of_a_classifier(tmp_path):
    model = adapt(BERT, targets=["classifier", "query"], modules_to_save=())
    with pytest.raises(ValueError, match="classifier carries lora, but PEFT puts no adapter on the head of a SEQ_CLS"):
        jpeft.export_peft(model, tmp_path)


def test_a_saved_module_whose_name_ends_others(tmp_path):
    model = adapt("llama states", modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"endings of names, so norm would take in layers\.0\.input_layernorm"):
        jpeft.export_peft(model, tmp_path)


def test_values_that_are_not_finite(tmp_path):
    graphdef, trainable, frozen = jpeft.partition(adapt(BERT))
    path = "layers/attention/self/query/adapters/lora/A"
    model = jpeft.combine(graphdef, trainable | {path: trainable[path].at[1].set(jnp.inf)}, frozen)
    with pytest.raises(ValueError, match=rf"not finite, in {QUERY}lora_A\.weight"):
        jpeft.export_peft(model, tmp_path)


# Writing: the folder ------------------------------------------------------------------------------------------------


def test_an_export_replaces_an_adapter_and_nothing_else(tmp_path):
    (tmp_path / "README.md").write_text("of the run")
    (tmp_path / "log.txt").write_text("kept")
    jpeft.export_peft(adapt(BERT), tmp_path)
    assert (tmp_path / "README.md").read_text() == "of the run"
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    jpeft.export_peft(adapt(BERT, targets=["key"]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "log.txt"
    ]  # fmt: skip
    (row,) = jpeft.summary(load(tmp_path)).rows
    assert row.method.targets == ("key",)


def test_a_save_that_is_killed_leaves_the_old_adapter(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("jpeft.models._safetensors.write", fail)
    with pytest.raises(OSError, match="disk full"):
        jpeft.export_peft(adapt(BERT, targets=["key"]), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_no_half_adapter_while_files_are_moved(folder, monkeypatch):
    """A kill between two renames leaves a folder that says it is no adapter, not one that is half old."""
    moved = []

    def replace(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(shutil.move(source, target))

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        jpeft.export_peft(adapt(BERT, targets=["key"]), folder)
    with pytest.raises(FileNotFoundError, match=r"no .*adapter_config\.json"):
        load(folder)
