# SPDX-License-Identifier: Apache-2.0
"""Folders of AdapterHub's `adapters`: what the library saved is read, and what is written is what it would save.

Read against the library's own outputs (tests/golden/make_adapterhub.py); written against its files, name by name; and
loaded by the library itself where $JPEFT_ADAPTERS_PYTHON is an interpreter that has it.
"""

import json
import os
import subprocess
from pathlib import Path

import adapterhub_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects

import jpeft

#: Two layers in float32 against float64, relative to the norm of each array.
GOLDEN = 1e-5
#: Against the library in float32, relative to the largest entry.
LIVE = 1e-5
#: What would catch most faults: pickles and norms; stacks; a shared rule and a head; a network; reflections; a setup;
#: a union with gates, one of two bottleneck adapters with a head.
QUICK = {("bert", "norms"), ("t5", "factors of both stacks"), ("bert", "compacter++"), ("bert", "loreft"),
         ("llama", "prefix by a projection"), ("bert", "static fusion"), ("gpt2", "ia3 of all three"),
         ("distilbert", "lora"), ("bert", "unipelt"), ("bert", "one sort for each layer")}  # fmt: skip
#: What is written otherwise than the library would: a network that jpeft has not; a unit that never acts; an alpha that
#: does nothing.
OTHERWISE = {("llama", "prefix by a projection"), ("bert", "noreft of one end"), ("llama", "unipelt of a flat prefix")}
#: Values that are other numbers for the same function: one of many bases; a DiReFT as the NoReFT that it equals.
SAME_FUNCTION = ("loreft", "direft", "adapters of two sorts and reft")

KEY = jax.random.key(0)
INTERPRETER = os.environ.get("JPEFT_ADAPTERS_PYTHON")


def lanes(cases):
    return [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def seen(family, case):
    """The places whose output is compared."""
    mask = oracle.golden(family)["mask"] == 1
    if oracle.classifies(family, case):
        return slice(None)
    return mask if oracle.padded(case) and family != "t5" else mask | True


@pytest.mark.parametrize("family, case", lanes(oracle.CASES))
def test_a_folder_of_the_library_is_read_and_written_again(family, case, tmp_path):
    model = oracle.imported(family, case, tmp_path / "theirs")
    output, expected, at = oracle.output(model, family, case), oracle.expected(family, case), seen(family, case)
    assert subjects.error(output[at], expected[at]) < GOLDEN
    jpeft.export_adapters(model, tmp_path / "ours")
    theirs, ours = (oracle.with_base(family, oracle.tensors(tmp_path / name)) for name in ("theirs", "ours"))
    if (family, case) not in OTHERWISE:
        assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
            key: (value.shape, value.dtype) for key, value in theirs.items()
        }
        assert oracle.configs(tmp_path / "ours") == oracle.configs(tmp_path / "theirs")
    if (family, case) not in OTHERWISE and case not in SAME_FUNCTION:
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key], value, err_msg=key)
    again = jpeft.import_adapters(oracle.model_of(family, case), tmp_path / "ours")
    if case in SAME_FUNCTION or (family, case) in OTHERWISE:
        assert subjects.error(oracle.output(again, family, case)[at], expected[at]) < GOLDEN


def test_both_forms_of_a_file_are_one(tmp_path):
    """The same adapter by safetensors and by a pickle, without the names of a model with a head and with them."""
    import safetensors.torch
    import torch

    folder = oracle.unpacked("bert", "lora", tmp_path / "theirs")
    model = jpeft.import_adapters(oracle.base("bert"), folder)
    tensors = safetensors.torch.load_file(folder / "adapter.safetensors")
    (folder / "adapter.safetensors").unlink()
    torch.save({f"bert.{key}": value for key, value in tensors.items()}, folder / "pytorch_adapter.bin")
    other = jpeft.import_adapters(oracle.base("bert"), folder)
    for path, value in jpeft.partition(model)[1].items():
        np.testing.assert_array_equal(jpeft.partition(other)[1][path], value)


def test_the_name_is_the_librarys_and_may_be_another(tmp_path):
    folder = oracle.unpacked("bert", "pfeiffer", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    paths = jpeft.partition(jpeft.import_adapters(oracle.base("bert"), folder))[1]
    assert "layers/output/residual/adapters/a/down" in paths
    paths = jpeft.partition(jpeft.import_adapters(oracle.base("bert"), folder, name="mine"))[1]
    assert "layers/output/residual/adapters/mine/down" in paths
    assert config["name"] == "a"


def test_a_fusion_alone_is_put_over_the_adapters_that_are_there(tmp_path):
    folder = oracle.unpacked("bert", "fusion", tmp_path)
    model = jpeft.import_adapters(oracle.base("bert"), folder / "a")
    with pytest.raises(ValueError, match="fuses a, b, and the model has no b; import these first"):
        jpeft.import_adapters(model, folder / "a,b")
    model = jpeft.import_adapters(model, folder / "b")
    model = jpeft.import_adapters(model, folder / "a,b", name="both")
    mask = oracle.golden("bert")["mask"] == 1
    output, expected = oracle.output(model, "bert", "fusion"), oracle.expected("bert", "fusion")
    assert subjects.error(output[mask], expected[mask]) < GOLDEN


# What jpeft wrote, in the library -----------------------------------------------------------------------------------

#: Adapters of jpeft's own making, with what the library has no word for.
OWN = {
    ("bert", "pissa"): jpeft.LoRA(rank=2, alpha=3, init="pissa", targets=["query", "value"]),
    ("llama", "rslora"): jpeft.LoRA(
        rank=3, alpha=4, rslora=True, targets=["q_proj", "k_proj", "down_proj"], layers=[1]
    ),
    ("bert", "direft"): jpeft.DiReFT(rank=2, first=2, last=1),
    ("llama", "loreft of ends"): jpeft.LoReFT(rank=2, first=1, last=2, tied=False, layers=[1]),
    ("llama", "network"): jpeft.PrefixTuning(num_tokens=3, projection=True, hidden_size=5),
    ("t5", "compacter"): jpeft.Compacter(reduction_factor=4),
    ("t5", "left out"): jpeft.Houlsby(reduction_factor={0: 4, "default": 2}, leave_out=[0], cross=True),
    ("gpt2", "mlp"): jpeft.LoRA(rank=2, alpha=3, targets=["c_fc", "mlp.c_proj"]),
    ("roberta", "ia3"): jpeft.IA3(placement="adapterhub"),
    ("distilbert", "compacter"): jpeft.Compacter(reduction_factor=4, plus_plus=True),
    ("bert", "mam"): jpeft.MAM(num_tokens=3, hidden_size=5, reduction_factor=4),
    ("llama", "mam"): jpeft.MAM(num_tokens=3, hidden_size=5, reduction_factor=4),
    ("roberta", "lora and houlsby"): jpeft.LoRA(rank=2, alpha=5, targets=["query"]) | jpeft.Houlsby(reduction_factor=8),
    ("t5", "lora and pfeiffer"): jpeft.LoRA(rank=2, alpha=5, targets=["q", "v"]) | jpeft.Pfeiffer(reduction_factor=4),
    ("distilbert", "direft and pfeiffer"): jpeft.Pfeiffer(reduction_factor=4) | jpeft.DiReFT(rank=2, first=2, last=1),
    # Without padding, over which the library's gates are means too.
    ("bert", "unipelt"): jpeft.UniPELT(rank=2, alpha=3, num_tokens=3, hidden_size=5, reduction_factor=4),
    ("roberta", "gated pissa"): jpeft.LoRA(
        rank=2, alpha=6, init="pissa", gate=True, targets=["key", "intermediate.dense"]
    ),
    ("roberta", "gated prefix"): jpeft.PrefixTuning(num_tokens=3, gate=True),
}


def moved(model):
    """`model` with every trained leaf off its start."""
    graphdef, trainable, frozen = jpeft.partition(model)
    noise = {
        path: 0.2 * jax.random.normal(jax.random.key(i), value.shape, value.dtype)
        for i, (path, value) in enumerate(sorted(trainable.items()))
    }
    return jpeft.combine(graphdef, {path: value + noise[path] for path, value in trainable.items()}, frozen)


def job(family, case, model, folder):
    """What tests/adapters_live.py is told of a model, and what jpeft makes of it."""
    name = "-".join([family, *case.split()]).replace("+", "p")
    arrays, where = oracle.golden(family), folder / name
    prefix = {"gpt2": "GPT2", "distilbert": "DistilBert", "t5": "T5"}.get(family, family.capitalize())
    job = {
        "base": str(oracle.base_folder(family, case, where / "base")),
        "model_class": f"{prefix}{'ForSequenceClassification' if oracle.classifies(family, case) else 'Model'}",
        "adapter": str(jpeft.export_adapters(model, where / "adapter")),
        "ids": arrays["ids"].tolist(),
        "mask": arrays["mask"].tolist(),
        "padded": oracle.padded(case),
    }
    return name, job, oracle.output(model, family, case)[seen(family, case)]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETER is None, reason="$JPEFT_ADAPTERS_PYTHON, an interpreter with adapters 1.3.0, is absent")
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_the_library_loads_what_is_written_and_computes_the_same(family, tmp_path):
    models = {case: oracle.imported(family, case, tmp_path / case) for case in oracle.cases(family)}
    for (own, case), method in OWN.items():
        if own == family:
            models[f"own {case}"] = moved(jpeft.adapt(oracle.base(family), method, key=KEY))
    jobs = {case: job(family, case, model, tmp_path / "jobs") for case, model in models.items()}
    (tmp_path / "jobs.json").write_text(json.dumps({name: job for name, job, _ in jobs.values()}))
    script = Path(__file__).parents[1] / "adapters_live.py"
    command = [str(INTERPRETER), str(script), str(tmp_path / "jobs.json"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as out:
        for case, (name, _, expected) in jobs.items():
            assert json.loads(str(out[f"{name}/said"])) == {}, case
            error = np.abs(out[f"{name}/output"][seen(family, case)] - expected).max() / np.abs(expected).max()
            assert error < LIVE, (case, error)


def test_nothing_is_written_that_is_not_finite(tmp_path):
    model = jpeft.adapt(oracle.base("bert"), jpeft.Pfeiffer(reduction_factor=4), key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)
    path = next(path for path in trainable if path.endswith("/up"))
    model = jpeft.combine(graphdef, trainable | {path: jnp.full_like(trainable[path], jnp.nan)}, frozen)
    with pytest.raises(
        ValueError, match=r"not finite, in bert\.encoder\.layer\.0\.output\.adapters\.pfeiffer\.adapter_up"
    ):
        jpeft.export_adapters(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
