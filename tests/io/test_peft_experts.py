# SPDX-License-Identifier: Apache-2.0
"""LoRA on the experts and routers of a mixture, held against the real peft, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle as oracle
import pytest
from peft_oracle import config_of, real_outputs

import jpeft

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

#: float32 against float32 at unit scale, through three layers.
ATOL = 1e-5
EXPERTS = ["q_proj", "gate", "w1", "w2", "w3"]


def adapted(seed=0, **options):
    """The tiny Mixtral with a LoRA of which no leaf is at its start."""
    method = jpeft.LoRA(**{"rank": 3, "alpha": 5, "targets": EXPERTS, **options})
    model = jpeft.adapt(oracle.jax_model("mixtral"), method, key=jax.random.key(seed))
    graphdef, trainable, frozen = jpeft.partition(model)
    rng = np.random.default_rng(seed)
    noisy = {p: leaf + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for p, leaf in trainable.items()}
    return jpeft.combine(graphdef, noisy, frozen)


def outputs(model):
    return oracle.seen(np.asarray(oracle.jax_outputs(model)))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="all"),
        pytest.param({"targets": ["w2", "v_proj"], "rslora": True}, id="w2"),
        pytest.param({"targets": ["w1", "w2", "w3"], "init": "pissa"}, id="pissa", marks=pytest.mark.slow),
    ],
)
def test_peft_loads_what_we_write(options, tmp_path):
    model = adapted(**options)
    jpeft.export_peft(model, tmp_path / "adapter")
    real, result = oracle.load_real("mixtral", tmp_path / "adapter")
    assert not result.unexpected_keys
    np.testing.assert_allclose(outputs(model), real_outputs(real, "mixtral"), atol=ATOL)
    assert np.abs(outputs(model) - outputs(oracle.jax_model("mixtral"))).max() > 0.1
    again = jpeft.import_peft(oracle.jax_model("mixtral"), tmp_path / "adapter")
    np.testing.assert_allclose(outputs(again), outputs(model), atol=ATOL)


#: What PEFT saves on transformers 5: parameters in the place of modules.
TRAINED = {
    "by modules' names": {"target_modules": EXPERTS},
    "gate and up alone": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "some layers": {
        "target_modules": ["k_proj"],
        "target_parameters": ["layers.1.mlp.experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        "rank_pattern": {"down_proj": 4, "layers.1.mlp.experts.gate_up_proj": 2, "gate.weight": 1, "k_proj": 2},
        "alpha_pattern": {"down_proj": 7, "k_proj": 1},
    },
}


@pytest.mark.parametrize("name", TRAINED)
def test_we_read_what_peft_trained(name, tmp_path):
    real = oracle.train_real("mixtral", {"r": 3, "lora_alpha": 5, **TRAINED[name]}, tmp_path, noise=0.2)
    assert config_of(tmp_path)["target_parameters"]
    ours = jpeft.import_peft(oracle.jax_model("mixtral"), tmp_path)
    np.testing.assert_allclose(outputs(ours), real_outputs(real, "mixtral"), atol=ATOL)
    np.testing.assert_allclose(outputs(jpeft.merge(ours)), real_outputs(real, "mixtral"), atol=ATOL)


def test_an_expert_has_matrices_of_its_own():
    """A and B of one expert alone change the logits as a change of its kernel does."""
    model = adapted()
    graphdef, trainable, frozen = jpeft.partition(model)
    one = {
        path: leaf * (jnp.arange(3) == 1).reshape(1, 3, 1, 1) if "experts" in path else 0 * leaf
        for path, leaf in trainable.items()
    }
    base = oracle.jax_model("mixtral")
    shapes = {path: leaf.shape for path, leaf in trainable.items() if "w1" in path}
    assert sorted(shapes.values()) == [(3, 3, 3, 20), (3, 3, 16, 3)]
    changed = jpeft.combine(graphdef, one, frozen)
    merged = {path: leaf for path, leaf in jpeft.partition(jpeft.merge(changed))[2].items() if "experts/" in path}
    own = {path: leaf for path, leaf in jpeft.partition(base)[2].items() if "experts/" in path}
    for path, leaf in own.items():
        w = path.split("/")[-2]
        a, b = (np.asarray(trainable[f"layers/block_sparse_moe/experts/{w}/adapters/lora/{n}"]) for n in "AB")
        expected = np.asarray(leaf).copy()
        expected[:, 1] += 5 / 3 * a[:, 1] @ b[:, 1]
        np.testing.assert_allclose(merged[path], expected, atol=ATOL)
    np.testing.assert_allclose(outputs(changed), outputs(jpeft.merge(changed)), atol=ATOL)


REFUSED = {
    "w1 alone": ({"targets": ["w1"]}, "w1 is adapted and w2 and w3 not"),
    "w1 and w3": ({"targets": ["w1", "w3"]}, "w1 is adapted and w2 not"),
    "one layer": ({"layers": [1]}, "of all layers or of none"),
    "one expert": ({"targets": r".*experts\.1\.w2"}, "of all layers or of none"),
    "ranks": ({"targets": ["w2"], "rank_pattern": {r"experts\.0\.w2": 2}}, "rank_pattern and alpha_pattern for none"),
    "rslora": ({"targets": ["w1", "w2", "w3"], "rslora": True}, "rslora=True scales by another factor"),
    "router's dropout": ({"targets": ["gate"], "dropout": 0.1}, "has no dropout"),
    "saved": ({"targets": ["q_proj"], "modules_to_save": ["gate"]}, "no module of this name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_has_no_form_for_is_refused(name, tmp_path):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        jpeft.export_peft(adapted(**options), tmp_path)


def test_other_methods_on_a_router_are_refused(tmp_path):
    model = jpeft.adapt(oracle.jax_model("mixtral"), jpeft.DoRA(targets=["gate"]), key=jax.random.key(0))
    with pytest.raises(ValueError, match="LoRA alone on parameters, not dora"):
        jpeft.export_peft(model, tmp_path)


@pytest.mark.parametrize(
    "method", [jpeft.DoRA(targets=["w1"]), jpeft.IA3(targets=["w2"], feedforward=[])], ids=lambda m: m.kind
)
def test_methods_about_one_matrix_are_refused_on_experts(method):
    with pytest.raises(ValueError, match=rf"experts/w. are experts: .* {type(method).__name__} is about one matrix"):
        jpeft.adapt(oracle.jax_model("mixtral"), method, key=jax.random.key(0))


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"gate": True}], ids=str)
def test_lora_s_options_that_read_whole_texts_are_refused_on_experts(options):
    with pytest.raises(ValueError, match=r"LoRA has no (dropout=0.1|gate=True) there"):
        jpeft.adapt(oracle.jax_model("mixtral"), jpeft.LoRA(targets=["w2"], **options), key=jax.random.key(0))


def test_an_unknown_parameter_is_named(tmp_path):
    oracle.train_real("mixtral", {"target_modules": [], "target_parameters": ["q_proj.weight"]}, tmp_path)
    with pytest.raises(ValueError, match=r"\['q_proj.weight'\]: of parameters jpeft adapts .* mlp.experts.down_proj"):
        jpeft.import_peft(oracle.jax_model("mixtral"), tmp_path)
