# SPDX-License-Identifier: Apache-2.0
"""Unions of `adapters`, which are hybrids in jpeft: their names, their order, and what is refused."""

import json

import adapterhub_oracle as oracle
import jax
import numpy as np
import pytest
import subjects

import jpeft

KEY = jax.random.key(0)
MIXED = ("bert", "adapters of two sorts and reft")
UNION = {"architecture": "union"}
LORA, PREFIX = {"architecture": "lora"}, {"architecture": "prefix_tuning", "flat": True}


def adapted(*methods, name=None):
    hybrid = methods[0]
    for method in methods[1:]:
        hybrid = hybrid | method
    return jpeft.adapt(oracle.base("bert"), hybrid, key=KEY, name=name)


def saved(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def names(model):
    return {path.split("adapters/")[1].split("/")[0] for path in jpeft.partition(model)[1]}


@pytest.mark.parametrize(
    "name, inside, outside",
    [(None, {"prefix_tuning", "parallel_adapter"}, "union"), ("a", {"a_prefix_tuning", "a_parallel_adapter"}, "a")],
)
def test_a_hybrid_is_one_adapter_there_and_comes_back_as_one(name, inside, outside, tmp_path):
    model = adapted(jpeft.MAM(num_tokens=2, hidden_size=3), name=name)
    assert names(model) == inside
    jpeft.export_adapters(model, tmp_path / "out")
    config = saved(tmp_path / "out")
    assert (config["name"], config["config"]["architecture"]) == (outside, "union")
    assert [part.get("architecture") for part in config["config"]["configs"]] == ["prefix_tuning", None]
    again = jpeft.import_adapters(oracle.base("bert"), tmp_path / "out")
    assert names(again) == {f"{outside}_prefix_tuning", f"{outside}_parallel_adapter"}
    mine = jpeft.import_adapters(oracle.base("bert"), tmp_path / "out", name="mine")
    assert names(mine) == {"mine_prefix_tuning", "mine_parallel_adapter"}


def test_a_hybrid_is_found_by_its_name_beside_other_adapters(tmp_path):
    model = jpeft.adapt(adapted(jpeft.LoRA() | jpeft.Houlsby(), name="a"), jpeft.IA3(), key=KEY, name="mine")
    jpeft.export_adapters(model, tmp_path / "a", name="a")
    assert (saved(tmp_path / "a")["name"], len(saved(tmp_path / "a")["config"]["configs"])) == ("a", 2)
    jpeft.export_adapters(model, tmp_path / "one", name="a_houlsby")
    assert (saved(tmp_path / "one")["name"], saved(tmp_path / "one")["config"]["mh_adapter"]) == ("a_houlsby", True)
    with pytest.raises(ValueError, match="the adapters a_houlsby, a_lora, mine, and a folder of adapters holds one"):
        jpeft.export_adapters(model, tmp_path / "b")
    with pytest.raises(ValueError, match="the model has no adapter 'b'; it has a_houlsby, a_lora, mine"):
        jpeft.export_adapters(model, tmp_path / "b", name="b")


def test_parts_act_in_the_librarys_order_whatever_the_lists(tmp_path):
    """There a ReFT edits what the bottleneck adapters of its layer gave."""
    folder = oracle.unpacked(*MIXED, tmp_path)
    held = saved(folder)
    held["config"]["configs"].reverse()
    (folder / "adapter_config.json").write_text(json.dumps(held))
    model = jpeft.import_adapters(oracle.model_of(*MIXED), folder)
    mask = oracle.golden("bert")["mask"] == 1
    assert subjects.error(oracle.output(model, *MIXED)[mask], oracle.expected(*MIXED)[mask]) < 1e-5


def test_an_order_that_the_library_has_not(tmp_path):
    model = adapted(jpeft.LoReFT(), jpeft.Houlsby(original_ln_after=False))
    with pytest.raises(
        ValueError, match="residual: the loreft was put on before the houlsby, and in the library it acts"
    ):
        jpeft.export_adapters(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    jpeft.export_adapters(adapted(jpeft.Houlsby(original_ln_after=False), jpeft.LoReFT()), tmp_path / "a")


@pytest.mark.parametrize(
    "methods, sort",
    [
        ((jpeft.LoRA(targets=["query"]), jpeft.LoRA(targets=["value"])), "lora"),
        ((jpeft.LoRA(), jpeft.IA3(placement="adapterhub")), "lora"),
        ((jpeft.Pfeiffer(), jpeft.ParallelAdapter()), "bottleneck"),
        ((jpeft.LoReFT(layers=[0]), jpeft.NoReFT(layers=[1])), "reft"),
    ],
)
def test_two_parts_that_meet_are_refused(methods, sort, tmp_path):
    with pytest.raises(ValueError, match=f"have one {sort} configuration in a layer.*here two would meet"):
        jpeft.export_adapters(adapted(*methods), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_two_compacters_would_share_one_rule(tmp_path):
    methods = [jpeft.Compacter(reduction_factor=4, blocks=[block]) for block in ("attention", "mlp")]
    with pytest.raises(ValueError, match=r"two of the adapters have a bert\.shared_parameters\.union\.phm_rule"):
        jpeft.export_adapters(adapted(*methods), tmp_path / "a")


@pytest.mark.parametrize(
    "config, said",
    [
        (UNION, "has a list of its parts' as configs, and this has None"),
        ({**UNION, "configs": []}, r"as configs, and this has \[\]"),
        ({**UNION, "configs": [LORA, 3]}, "as configs, and this has"),
        ({**UNION, "configs": [LORA], "weights": [1]}, "has its parts' alone, and this has weights"),
        ({**UNION, "configs": [LORA, {**UNION, "configs": [LORA]}]}, "architecture 'union', which jpeft does not read"),
        ({**UNION, "configs": [LORA | {"leave_out": 3}]}, "leave_out must be a list of whole numbers, got 3"),
        (
            {**UNION, "configs": [LORA | {"r": -1, "alpha": "x"}]},
            "r must be a whole number, got -1; alpha must be a ",
        ),
        ({**UNION, "configs": [LORA, LORA]}, "have one lora configuration in a layer"),
        ({**UNION, "configs": [{}, {"is_parallel": True}]}, "have one bottleneck configuration in a layer"),
        ({**UNION, "configs": [LORA, {**PREFIX, "novelty": 3}]}, "that adapters 1.3.0 does not know: novelty=3"),
        ({**UNION, "configs": [{**PREFIX, "use_gating": True, "shared_gating": False}]}, "not do: shared_gating=False"),
        ({**UNION, "configs": [{**LORA, "composition_mode": "scale", "r": 1, "use_gating": True}]}, "use_gating=True"),
    ],
)
def test_configurations_of_unions_that_are_refused(config, said, tmp_path):
    folder = oracle.unpacked("bert", "unipelt", tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps(saved(folder) | {"config": config}))
    with pytest.raises(ValueError, match=said):
        jpeft.import_adapters(oracle.base("bert"), folder)


def test_a_part_whose_tensors_are_absent_is_named(tmp_path):
    folder = oracle.unpacked("bert", "unipelt", tmp_path)
    held = saved(folder)
    held["config"]["configs"][2]["intermediate_lora"] = True
    (folder / "adapter_config.json").write_text(json.dumps(held))
    with pytest.raises(jpeft.models.CheckpointError, match=r"intermediate\.dense\.loras\.a\.gate\.weight is missing"):
        jpeft.import_adapters(oracle.base("bert"), folder)


def test_a_gated_loras_factor_goes_into_its_b(tmp_path):
    """The library leaves alpha / r out, so what is written has none: alpha = r."""
    model = adapted(jpeft.LoRA(rank=2, alpha=6, rslora=True, gate=True, targets=["query"]))
    graphdef, trainable, frozen = jpeft.partition(model)
    moved = {path: value + 0.1 for path, value in trainable.items()}
    model = jpeft.combine(graphdef, moved, frozen)
    jpeft.export_adapters(model, tmp_path / "a")
    config = saved(tmp_path / "a")["config"]
    assert (config["alpha"], config["r"], config["use_gating"]) == (2, 2, True)
    key = "adapter/bert.encoder.layer.1.attention.self.query.loras.lora.lora_B"
    expected = np.asarray(moved["layers/attention/self/query/adapters/lora/B"])[1].T * 6 / np.sqrt(2)
    np.testing.assert_allclose(oracle.tensors(tmp_path / "a")[key], expected, rtol=1e-6)
    again = jpeft.import_adapters(oracle.base("bert"), tmp_path / "a")
    ids, mask = (oracle.golden("bert")[name] for name in ("ids", "mask"))
    assert subjects.error(again(ids, mask), np.asarray(model(ids, mask))) < 1e-6


def test_what_is_said_of_a_union(tmp_path):
    model = adapted(jpeft.UniPELT(num_tokens=2, hidden_size=16, reduction_factor=4, rank=2))
    found = jpeft.io.check(model, "adapters")
    assert not found.refused
    assert [text[:12] for text in found.lost] == ["the network ", "the gate is ", "the factor a"]
    assert "a mean over padding too there" in str(found)
    assert "a LoRA with a gate, which goes into its B" in str(found)
    jpeft.export_adapters(model, tmp_path / "a")
    contents = jpeft.io.verify(tmp_path / "a")
    assert not contents.faults
    assert contents.facts["architecture"] == "union"
    assert (contents.facts["lora: r"], contents.facts["prefix_tuning: prefix_length"]) == ("2", "2")
    held = saved(tmp_path / "a")
    held["config"]["configs"][2]["r"] = 3
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(held))
    assert any("asks for 3" in fault for fault in jpeft.io.verify(tmp_path / "a").faults)
