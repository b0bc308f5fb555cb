# SPDX-License-Identifier: Apache-2.0
"""What keeps an adapter of a method on modules from being written or read is an error that names it."""

import json

import jax
import numpy as np
import peft_oracle as oracle
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.models import CheckpointError

BERT = "bert cls"
METHODS = {
    "ia3": jpeft.IA3(),
    "vera": jpeft.VeRA(rank=3),
    "loha": jpeft.LoHa(rank=3),
    "lokr": jpeft.LoKr(rank=1),
    "oft": jpeft.OFT(block_size=4),
    "norm_tuning": jpeft.NormTuning(),
    "fourierft": jpeft.FourierFT(n_frequency=9),
}


def adapt(family, method):
    return jpeft.adapt(oracle.jax_model(family), method, key=jax.random.key(0))


def load(folder, family=BERT):
    return jpeft.import_peft(oracle.jax_model(family), folder)


@pytest.fixture(name="folder")
def _folder(tmp_path, request):
    """A good adapter of the method that the test names, to be spoiled."""
    return jpeft.export_peft(adapt(BERT, METHODS[request.param]), tmp_path / "adapter")


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("folder", METHODS, indirect=True)
def test_everything_wrong_with_the_tensors_is_one_error(folder):
    own = sorted(key for key in load_file(folder / "adapter_model.safetensors") if "classifier" not in key)
    gone, bent = own[0], own[-1]

    def spoil(tensors):
        del tensors[gone]
        tensors[bent] = np.zeros((*tensors[bent].shape, 2), np.float32)
        tensors[gone.replace(".layer.0.", ".layer.7.") + "_more"] = np.zeros(3, np.float32)

    change_tensors(folder, spoil)
    with pytest.raises(CheckpointError, match="does not fit the model") as error:
        load(folder)
    missing, unknown, ill_shaped = str(error.value).splitlines()[1:]
    assert missing == f"  {gone} is missing"
    assert unknown.endswith("_more is unknown")
    assert ill_shaped.startswith(f"  {bent} is [")


@pytest.mark.parametrize("folder", METHODS, indirect=True)
def test_unknown_keys_are_one_error_unless_they_are_empty(folder):
    change_config(folder, a_key_of_2030=None, another=False)
    load(folder)
    change_config(folder, a_key_of_2030="yes", another=[1])
    with pytest.raises(ValueError, match=r"does not do, or does not know: a_key_of_2030='yes', another=\[1\]"):
        load(folder)


@pytest.mark.parametrize(
    "folder, changes, message",
    [
        ("ia3", {"feedforward_modules": None}, "feedforward_modules is None; an adapter that PEFT saved says whose"),
        ("ia3", {"layers_to_transform": [1], "target_modules": ["pooler.word"]}, "is no module of this model"),
        ("vera", {"bias": "all"}, "jpeft's VeRA does not do, or does not know: bias='all'"),
        ("vera", {"target_modules": ["word_embeddings"]}, "is no module of this model that it could act on"),
        ("loha", {"use_effective_conv2d": True}, "use_effective_conv2d=True"),
        ("oft", {"bias": "oft_only"}, "bias='oft_only'"),
        ("oft", {"peft_version": "0.17.1"}, "peft_version is 0.17.1, and before 0.18 PEFT's series"),
        ("oft", {"peft_version": None}, "peft_version is 0, and before 0.18"),
        ("oft", {"num_cayley_neumann_terms": 2}, "neumann_terms must be a whole number of at least 4, got 2"),
        ("oft", {"oft_block_size": 32}, "does not part into blocks"),
        ("norm_tuning", {"target_modules": ["LayerNorm", "query"]},
         "takes in bert.encoder.layer.0.attention.self.query, .*, and jpeft's NormTuning trains norms alone"),
        ("fourierft", {"n_frequency_pattern": {"query": 3}}, "n_frequency_pattern={'query': 3}"),
        ("fourierft", {"random_loc_seed": -1}, "location_key must be a whole number"),
    ],
    indirect=["folder"],
)  # fmt: skip
def test_a_configuration_that_jpeft_does_not_hold(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{message}"):
        load(folder)


def test_a_wish_for_all_matrices(tmp_path):
    """PEFT writes names in its place; others may not."""
    jpeft.export_peft(adapt(BERT, jpeft.LoHa(rank=3, targets="all-linear")), tmp_path)
    change_config(tmp_path, target_modules="all-linear")
    (row,) = jpeft.summary(load(tmp_path)).rows
    assert row.method.targets == ("dense", "key", "query", "value")


def test_a_series_of_three_terms_is_that_of_four(tmp_path):
    jpeft.export_peft(adapt(BERT, jpeft.OFT(block_size=4, neumann_terms=4)), tmp_path)
    change_config(tmp_path, num_cayley_neumann_terms=3)
    (row,) = jpeft.summary(load(tmp_path)).rows
    assert row.method.neumann_terms == 4


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_a_conv1d_on_which_peft_has_no_such_method(kind, tmp_path):
    with pytest.raises(ValueError, match="is a Conv1D in transformers, on which PEFT puts no"):
        jpeft.export_peft(adapt("gpt2", METHODS[kind]), tmp_path)


@pytest.mark.parametrize(
    "method", [jpeft.LoHa(targets=["wte"]), jpeft.IA3(targets=["wte"], feedforward=())], ids=["loha", "ia3"]
)
def test_an_embedding(method, tmp_path):
    with pytest.raises(ValueError, match=r"is a TokenTable; PEFT.s .* files are written of matrices"):
        jpeft.export_peft(adapt("gpt2", method), tmp_path)


def test_places_of_another_origin(tmp_path):
    model = adapt(BERT, METHODS["fourierft"])
    graphdef, trainable, frozen = jpeft.partition(model)
    path = next(path for path in frozen if path.endswith("fourierft/places"))
    model = jpeft.combine(graphdef, trainable, frozen | {path: frozen[path].at[1, 0].set(255)})
    with pytest.raises(ValueError, match="are not those that PEFT would draw from random_loc_seed=777"):
        jpeft.export_peft(model, tmp_path)
