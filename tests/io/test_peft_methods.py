# SPDX-License-Identifier: Apache-2.0
"""The formats of all methods that sit on modules, both ways, on every family: held against the real peft."""

import json
from typing import Any

import jax
import numpy as np
import peft
import peft_oracle as oracle
import pytest
from peft_oracle import real_outputs, tensors

import jpeft

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

#: float32 against float32 at unit scale, through three layers.
ATOL = 1e-5

#: What is adapted: for each family a projection that reads the stream, and one that reads a wider hidden state.
TARGETS = {
    "bert cls": ["query", "intermediate.dense"],
    "distilbert": ["q_lin", "lin2"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["k_proj", "down_proj"],
    "qwen3": ["q_proj", "down_proj"],
    "t5": ["q", "wo"],
}
NORMS = {
    "bert cls": ["LayerNorm"],
    "distilbert": ["sa_layer_norm", "output_layer_norm"],
    "gpt2": ["ln_1", "ln_f"],
    "llama": ["input_layernorm", "norm"],
    "qwen3": ["post_attention_layernorm", "q_norm"],
    "t5": ["layer_norm", "final_layer_norm"],
}
#: name -> (jpeft's method and options, peft's config and options); targets are added by family. No change of a kernel
#: is larger than the kernel: beyond unit scale torch's own float32 is further than the tolerance from its float64.
METHODS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any]]] = {
    "ia3": (jpeft.IA3, {}, peft.IA3Config, {}),
    "vera": (jpeft.VeRA, {"rank": 5, "projection_key": 3}, peft.VeraConfig, {"r": 5, "projection_prng_key": 3}),
    "loha": (jpeft.LoHa, {"rank": 3, "alpha": 5}, peft.LoHaConfig, {"r": 3, "alpha": 5}),
    "lokr": (jpeft.LoKr, {"rank": 2, "alpha": 5}, peft.LoKrConfig, {"r": 2, "alpha": 5}),
    "oft": (jpeft.OFT, {"block_size": 4}, peft.OFTConfig, {"oft_block_size": 4}),
    "norm_tuning": (jpeft.NormTuning, {}, peft.LNTuningConfig, {}),
    "fourierft": (jpeft.FourierFT, {"n_frequency": 30, "scaling": 9, "location_key": 5},
                  peft.FourierFTConfig, {"n_frequency": 30, "scaling": 9, "random_loc_seed": 5}),
}  # fmt: skip
#: On GPT-2's Conv1D PEFT has none of these.
NOT_ON_GPT2 = ("loha", "lokr", "oft")

#: more options of jpeft's method, the same of peft's, by method, family and what they are about.
VARIANTS: dict[tuple[str, str, str], tuple[dict[str, Any], dict[str, Any]]] = {
    ("ia3", "bert cls", "defaults"): ({"targets": None, "feedforward": None},
                                      {"target_modules": None, "feedforward_modules": None}),
    ("ia3", "t5", "an ending of another"): ({"targets": ["o", "wo"], "feedforward": ["o"]},
                                            {"target_modules": ["SelfAttention.o", "EncDecAttention.o", "wo"],
                                             "feedforward_modules": ["SelfAttention.o", "EncDecAttention.o"]}),
    ("ia3", "llama", "no inputs"): ({"feedforward": ()}, {"feedforward_modules": []}),
    ("vera", "llama", "one layer, dropout"): ({"layers": [1], "dropout": 0.2, "d_initial": 0.5},
                                              {"layers_to_transform": [1], "vera_dropout": 0.2, "d_initial": 0.5}),
    ("loha", "bert cls", "patterns"): ({"rank_pattern": {"query": 4, "0.intermediate.dense": 1},
                                        "alpha_pattern": {"dense": 2.5}, "rank_dropout": 0.1, "module_dropout": 0.2},
                                       {"rank_pattern": {"query": 4, "0.intermediate.dense": 1},
                                        "alpha_pattern": {"dense": 2.5}, "rank_dropout": 0.1, "module_dropout": 0.2}),
    ("lokr", "bert cls", "whole"): ({"rank": 7, "init": "lycoris", "layers": [0, 2]},
                                    {"r": 7, "init_weights": "lycoris", "layers_to_transform": [0, 2]}),
    ("lokr", "llama", "both decomposed"): ({"rank": 1, "decompose_both": True, "decompose_factor": 8,
                                            "rank_pattern": {"1.self_attn.k_proj": 2}, "rank_dropout_scale": True},
                                           {"r": 1, "decompose_both": True, "decompose_factor": 8,
                                            "rank_pattern": {"1.self_attn.k_proj": 2}, "rank_dropout_scale": True}),
    ("oft", "bert cls", "exact"): ({"neumann_terms": None, "layers": [1]},
                                   {"use_cayley_neumann": False, "layers_to_transform": [1]}),
    ("oft", "llama", "bounded, shared"): ({"coft": True, "eps": 0.2, "block_share": True, "neumann_terms": 6},
                                          {"coft": True, "eps": 0.2, "block_share": True,
                                           "num_cayley_neumann_terms": 6}),
    ("oft", "t5", "by number"): ({"block_size": None, "rank": 2, "block_dropout": 0.1},
                                 {"oft_block_size": 0, "r": 2, "module_dropout": 0.1}),
    ("norm_tuning", "llama", "some layers"): ({"targets": ["layers.0.input_layernorm", "layers.2.input_layernorm"]},
                                              {"target_modules": ["model.layers.0.input_layernorm",
                                                                  "model.layers.2.input_layernorm"]}),
    ("norm_tuning", "llama", "beside a saved norm"): ({"targets": ["input_layernorm"],
                                                       "modules_to_save": ["model.norm"]},
                                                      {"target_modules": ["input_layernorm"],
                                                       "modules_to_save": ["model.norm"]}),
    ("fourierft", "llama", "one layer, zero"): ({"init": "zero", "layers": [1]},
                                                {"init_weights": True, "layers_to_transform": [1]}),
}  # fmt: skip

_PLAIN = [(method, family, "") for method in METHODS for family in TARGETS]
_PLAIN = [case for case in _PLAIN if not (case[0] in NOT_ON_GPT2 and case[1] == "gpt2")]
#: The fast lane: one family a method, and of the variants those that go a way of their own.
_FAST = {
    ("ia3", "gpt2", ""),
    ("ia3", "t5", "an ending of another"),
    ("vera", "t5", ""),
    ("loha", "distilbert", ""),
    ("lokr", "qwen3", ""),
    ("oft", "bert cls", "exact"),
    ("oft", "llama", "bounded, shared"),
    ("norm_tuning", "gpt2", ""),
    ("norm_tuning", "llama", "beside a saved norm"),
    ("fourierft", "gpt2", ""),
}
CASES = [
    pytest.param(*case, marks=() if case in _FAST else pytest.mark.slow, id=", ".join(filter(None, case)))
    for case in [*_PLAIN, *VARIANTS]
]


def ours(kind, family, variant):
    """The method of a case."""
    method, options, _, _ = METHODS[kind]
    more, _ = VARIANTS.get((kind, family, variant), ({}, {}))
    inward = {"feedforward": tuple(_inward(family))} if kind == "ia3" else {}
    return method(**{"targets": _targets(kind, family)} | inward | options | more)


def theirs(kind, family, variant):
    """(peft's config, its options) of a case."""
    _, _, config, options = METHODS[kind]
    _, more = VARIANTS.get((kind, family, variant), ({}, {}))
    inward = {"feedforward_modules": _inward(family)} if kind == "ia3" else {}
    return config, {"target_modules": _targets(kind, family)} | inward | options | more


def _inward(family):
    """Those of the targets whose input (IA)³ scales."""
    return [] if family == "bert cls" else TARGETS[family][1:]


def _targets(kind, family):
    return NORMS[family] if kind == "norm_tuning" else TARGETS[family]


def adapted(family, method):
    """A model with `method` on it, and every trainable leaf away from its start."""
    model = jpeft.adapt(oracle.jax_model(family), method, key=jax.random.key(0))
    graphdef, trainable, frozen = jpeft.partition(model)
    rng = np.random.default_rng(3)
    moved = {path: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in trainable.items()}
    return jpeft.combine(graphdef, moved, frozen)


def outputs(model):
    return oracle.seen(np.array(jax.jit(oracle.jax_outputs)(model)))


def config_of(folder):
    """adapter_config.json, with the lists that stand for sets in order."""
    return {key: sorted(value) if isinstance(value, list) else value for key, value in oracle.config_of(folder).items()}


@pytest.mark.parametrize("kind, family, variant", CASES)
def test_real_peft_computes_the_same_from_our_files(kind, family, variant, tmp_path):
    model = adapted(family, ours(kind, family, variant))
    jpeft.export_peft(model, tmp_path / "adapter")
    real, loaded = oracle.load_real(family, tmp_path / "adapter")
    assert loaded.unexpected_keys == []
    assert loaded.missing_keys == []
    assert peft.get_peft_model_state_dict(real).keys() == tensors(tmp_path / "adapter").keys()
    logits = real_outputs(real, family)
    np.testing.assert_allclose(outputs(model), logits, atol=ATOL, rtol=0)
    assert np.abs(logits - real_outputs(oracle.torch_model(family), family)).max() > 0.05, "the adapter must count"
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written.keys() == METHODS[kind][2]().to_dict().keys()

    back = jpeft.import_peft(oracle.jax_model(family), tmp_path / "adapter")
    jpeft.export_peft(back, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("kind, family, variant", CASES)
def test_we_compute_the_same_from_real_peft_files(kind, family, variant, tmp_path):
    config, options = theirs(kind, family, variant)
    real = oracle.train_real(family, config(**options), tmp_path / "real")
    model = jpeft.import_peft(oracle.jax_model(family), tmp_path / "real")
    logits = real_outputs(real, family)
    np.testing.assert_allclose(outputs(model), logits, atol=ATOL, rtol=0)
    assert np.abs(logits - real_outputs(oracle.torch_model(family), family)).max() > 0.01, "the adapter must count"

    saved = tensors(tmp_path / "real")
    assert all(np.abs(tensor).max() > 0 for tensor in saved.values()), "every tensor must be trained"
    base = config_of(tmp_path / "real")["base_model_name_or_path"]
    written = tensors(jpeft.export_peft(model, tmp_path / "ours", base=base))
    assert written.keys() == saved.keys()
    for key, tensor in written.items():
        assert tensor.tobytes() == saved[key].tobytes(), key
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "real")


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
def test_projections_that_peft_left_out_are_drawn_as_it_draws_them(tmp_path):
    options = {"target_modules": TARGETS["llama"], "r": 5, "projection_prng_key": 11, "save_projection": False}
    real = oracle.train_real("llama", peft.VeraConfig(**options), tmp_path / "real")
    assert not [key for key in tensors(tmp_path / "real") if "vera_A" in key]
    model = jpeft.import_peft(oracle.jax_model("llama"), tmp_path / "real")
    np.testing.assert_allclose(outputs(model), real_outputs(real, "llama"), atol=ATOL, rtol=0)
    written = tensors(jpeft.export_peft(model, tmp_path / "ours"))
    for key, tensor in {"vera_A": real.base_model.vera_A, "vera_B": real.base_model.vera_B}.items():
        np.testing.assert_array_equal(written[f"base_model.{key}"], tensor["default"].numpy())
