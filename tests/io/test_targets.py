# SPDX-License-Identifier: Apache-2.0
"""What a target is said to hold of an adapter, and that an export agrees with it."""

import adapterhub_oracle as oracle
import jax
import pytest

import jpeft

KEY = jax.random.key(0)


def found(method, target, family="llama", **options):
    return jpeft.io.check(jpeft.adapt(oracle.base(family), method, key=KEY, **options), target)


@pytest.mark.parametrize(
    "method, said",
    [
        (jpeft.LoRA(rank=2, targets=["q_proj"]), None),
        (jpeft.LoRA(rank=4, rslora=True, targets=["q_proj"]), None),
        (jpeft.DoRA(targets=["q_proj"]), "the adapter is a dora, and vLLM serves LoRA alone"),
        (jpeft.IA3(), "the adapter is a ia3, and vLLM serves LoRA alone"),
        (jpeft.LoRA(rank=2, targets=["q_proj", "v_proj"], rank_pattern={"q_proj": 1}), "rank_pattern"),
        (jpeft.LoRA(rank=2, targets=["q_proj"], modules_to_save=["embed_tokens"]), "embed_tokens is trained whole"),
        (jpeft.LoRA(rank=600, targets=["q_proj"]), "rank 600, and vLLM goes up to 512"),
    ],
)
def test_what_vllm_takes(method, said):
    findings = found(method, "vllm")
    assert bool(findings.refused) == (said is not None), findings
    assert said is None or said in findings.refused[0]


def test_vllm_is_told_of_ranks_and_embeddings():
    assert found(jpeft.LoRA(rank=16, targets=["q_proj"]), "vllm").notes == ()
    (note,) = found(jpeft.LoRA(rank=40, targets=["q_proj"]), "vllm").notes
    assert "--max-lora-rank 64" in note
    (note,) = found(jpeft.LoRA(rank=2, targets=["embed_tokens"]), "vllm").notes
    assert "embed_tokens is an embedding" in note


@pytest.mark.parametrize(
    "method, family, said",
    [
        (jpeft.Pfeiffer(reduction_factor=4), "bert", None),
        (jpeft.DoRA(targets=["query"]), "bert", "no format that computes what a dora does"),
        (
            jpeft.LoRA(targets=["query", "attention.output.dense"]),
            "bert",
            "attention.output.dense and 1 more would be left out",
        ),
        (jpeft.LoRA(targets=["c_attn"]), "gpt2", "a joint matrix of queries, keys and values is three"),
        (jpeft.LoRA(targets=["query"], rank_pattern={"0.attention.self.query": 2}), "bert", "one rank and one alpha"),
        (jpeft.LoRA(targets=["query"], bias="all"), "bert", "trains .* whole"),
        (jpeft.IA3(), "llama", "scales what goes into layers/mlp/down_proj"),
        (jpeft.PrefixTuning(shift_positions=True), "bert", "leaves the text's positions where they are"),
        (jpeft.PrefixTuning(layers=[0]), "bert", "adapt without layers="),
        (jpeft.PrefixTuning(), "t5", "distances over prefix and text together"),
        (jpeft.PrefixTuning(), "distilbert", "fails with one"),
        (jpeft.Pfeiffer(invertible="nice"), "bert", "invertible adapters act elsewhere"),
        (jpeft.Pfeiffer(modules_to_save=["pooler"]), "bert", "trains pooler/dense whole"),
        (jpeft.LoReFT(rank=16), "bert", "parametrises an R of 16 rows otherwise"),
    ],
)
def test_what_the_adapters_library_takes_is_what_is_written(method, family, said, tmp_path):
    model = jpeft.adapt(oracle.base(family), method, key=KEY)
    findings = jpeft.io.check(model, "adapters")
    assert bool(findings.refused) == (said is not None), findings
    if said is None:
        jpeft.export_adapters(model, tmp_path / "out")
    else:
        with pytest.raises(ValueError, match=said):
            jpeft.export_adapters(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method, target, said",
    [
        (jpeft.LoRA(rank=2, init="pissa", targets=["query"]), "peft", "the start by pissa"),
        (jpeft.PromptTuning(num_tokens=2), "peft", None),
        (jpeft.PTuning(num_tokens=2), "peft", "the network behind the virtual tokens"),
        (jpeft.DiReFT(last=2), "adapters", "written as the NoReFT"),
        (jpeft.NoReFT(first=2, last=2), "adapters", "fewer than 4 tokens"),
        (jpeft.Pfeiffer(gate=True), "adapters", "mean over padding too"),
    ],
)
def test_what_would_be_lost(method, target, said):
    findings = found(method, target, "bert")
    assert not findings.refused
    assert bool(findings.lost) == (said is not None)
    assert said is None or said in findings.lost[0]


def test_others_stay_behind_and_a_scaled_adapter_has_no_form():
    model = jpeft.adapt(oracle.base("bert"), jpeft.LoRA(targets=["query"]), key=KEY, name="a")
    model = jpeft.adapt(model, jpeft.LoRA(targets=["value"]), key=KEY, name="b")
    assert jpeft.io.check(model, "peft", "b").lost == ("the adapters a, which stay behind",)
    model = jpeft.scale(model, 0.5, "b")
    for target in ("peft", "vllm", "adapters"):
        assert "scaled" in jpeft.io.check(model, target, "b").refused[0]


def test_a_hybrid_goes_by_its_name_where_a_folder_holds_several():
    model = jpeft.adapt(oracle.base("bert"), jpeft.BitFit(), key=KEY, name="other")
    hybrid = jpeft.LoRA(targets=["query", "value"]) | jpeft.PrefixTuning(num_tokens=2, gate=True)
    model = jpeft.adapt(model, hybrid, key=KEY, name="mine")
    found = jpeft.io.check(model, "adapters", "mine")
    assert not found.refused
    assert "the adapters other, which stay behind" in found.lost
    assert any("the gate is a mean over padding too" in text for text in found.lost)
    (refused,) = jpeft.io.check(model, "peft", "mine").refused
    assert "no adapter 'mine'; it has mine_lora, mine_prefix_tuning, other, parts of a hybrid, of which" in refused


def test_a_fusion_of_parallel_adapters_is_refused(tmp_path):
    model = oracle.base("bert")
    for name in "ab":
        model = jpeft.adapt(model, jpeft.ParallelAdapter(reduction_factor=8), key=KEY, name=name)
    model = jpeft.adapt(model, jpeft.AdapterFusion(adapters=("a", "b")), key=KEY)
    assert "a second time" in jpeft.io.check(model, "adapters").refused[0]
    with pytest.raises(ValueError, match="a second time"):
        jpeft.export_adapters(model, tmp_path / "out")


def test_what_is_asked_for_must_be_there():
    model = jpeft.adapt(oracle.base("bert"), jpeft.LoRA(targets=["query"]), key=KEY)
    with pytest.raises(ValueError, match="target must be one of peft, vllm, adapters, got 'onnx'"):
        jpeft.io.check(model, "onnx")
    with pytest.raises(ValueError, match="no adapter 'b'; it has lora"):
        jpeft.io.check(model, "peft", "b")
    with pytest.raises(ValueError, match="no adapter to export"):
        jpeft.io.check(oracle.base("bert"), "peft")
