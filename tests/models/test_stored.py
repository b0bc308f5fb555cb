# SPDX-License-Identifier: Apache-2.0
"""Folders of codes: of bitsandbytes through transformers, of GPTQ and AWQ, read bit for bit, written, and damaged."""

import json
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from flax import nnx
from stored_folders import CONFIG, GOLDEN, HERE, IDS, KEY, gptq_folder, packed, tensors, write

import jpeft
from jpeft.models import CheckpointError, _safetensors

# bitsandbytes.


@pytest.mark.parametrize("case, scheme", [("nf4", "nf4_double"), ("fp4", "fp4"), ("int8", "int8")])
def test_a_folder_of_bitsandbytes_is_what_bitsandbytes_reads(case, scheme):
    model = jpeft.models.load(HERE / "stored" / case)
    for path, module in nnx.iter_modules(model):
        kernel: Any = getattr(module, "kernel", None)
        if path and path[-1] in ("q_proj", "down_proj"):
            assert kernel.scheme == scheme
            for i in range(2):
                expected = GOLDEN[f"{case}/{i}.{path[-1]}"]
                if case == "int8":  # over 127, where bitsandbytes multiplies by its inverse
                    assert subjects.error(kernel[...][i].T, expected) < subjects.FLOAT32
                else:
                    np.testing.assert_array_equal(kernel[...][i].T, expected)
    if case != "int8":  # whose products bitsandbytes takes with inputs in 8 bits too
        assert subjects.error(model(IDS), GOLDEN[f"{case}/logits"]) < 1e-5
    assert subjects.error(model(IDS), GOLDEN[f"{case}/logits"]) < 0.02


@pytest.mark.parametrize("case", ["nf4", "fp4"])
def test_such_a_folder_is_written_with_the_same_tensors(case, tmp_path):
    jpeft.models.save(jpeft.models.load(HERE / "stored" / case), tmp_path / "again")
    before, after = tensors(HERE / "stored" / case), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if "quant_state" in name:
            assert json.loads(value.tobytes()) == json.loads(after[name].tobytes())
        else:
            np.testing.assert_array_equal(after[name], value, err_msg=name)
            assert after[name].dtype == value.dtype
    said = [
        json.loads((f / "config.json").read_text())["quantization_config"]
        for f in (HERE / "stored" / case, tmp_path / "again")
    ]
    assert all(said[0][name] == said[1][name] for name in said[1] if name != "llm_int8_skip_modules")
    assert said[1]["llm_int8_skip_modules"] == ["lm_head"]


@pytest.mark.parametrize("scheme, bits", [("nf4_double", 4.13), ("nf4", 4.5), ("fp4_double", 4.13)])
def test_bytes_in_memory_and_on_disk(scheme, bits, tmp_path):
    """So many bits a weight, beside norms, embeddings and the head; a file describes each weight in 2 KiB."""
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 512}
    base = jpeft.models.build(config, key=KEY, dtype="bfloat16")
    model = jpeft.quantize(base, scheme)
    weights = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    plain = 2 * (jpeft.summary(base).base - weights)
    assert jpeft.summary(model).base_bytes <= weights * bits / 8 + plain
    jpeft.models.save(model, tmp_path / "model")
    stored = sum(value.nbytes for value in tensors(tmp_path / "model").values())
    assert stored <= weights * bits / 8 + plain + 14 * 2048
    assert stored <= jpeft.summary(model).base_bytes + 14 * 2048


def test_codes_that_were_read_are_trained_beside_and_merged(tmp_path):
    model = jpeft.models.load(HERE / "stored" / "nf4")
    model = subjects.fill(jpeft.adapt(model, jpeft.LoRA(rank=2, targets="all-linear"), key=KEY))
    assert subjects.error(jpeft.merge(model)(IDS), model(IDS)) < 1e-4
    head = jpeft.models.load(HERE / "stored" / "nf4", "SEQ_CLS", num_labels=3)
    assert head(IDS).shape == (2, 3)
    with pytest.raises(ValueError, match=r"config\.json: it says that its weights are codes already \(bnb4\)"):
        jpeft.models.load(HERE / "stored" / "nf4", quantize="nf4")


def test_codes_that_were_read_lie_on_a_mesh():
    mesh = jpeft.mesh("fsdp=4,tensor=2")
    model = jpeft.models.load(HERE / "stored" / "nf4", sharding=jpeft.placement(mesh))
    plain = jpeft.models.load(HERE / "stored" / "nf4")
    assert subjects.error(model(IDS), plain(IDS)) < subjects.FLOAT32 * 10


# GPTQ and AWQ.


def test_what_autoawq_unpacks_and_repacks():
    """AWQ's own unpacking, in float16, and the same weight in GPTQ's layout, by autoawq."""
    from jpeft import _groups
    from jpeft.models import _stored_groups as groups
    from jpeft.models._stored_config import Stored

    awq = {name: GOLDEN[f"awq/{name}"] for name in ("qweight", "qzeros", "scales")}
    gptq = {name: GOLDEN[f"gptq/{name}"] for name in ("qweight", "qzeros")} | {"scales": awq["scales"]}
    found = []
    for own, read, stored in (
        (awq, groups.awq, Stored("awq", 4, 32)),
        (gptq, groups.gptq, Stored("gptq", 4, 32, True)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(groups, "read_whole", lambda tensor, words, shape: tensor.file.reshape(shape))
            packs = read(
                {f"a.{n}": _safetensors.Tensor(v, f"a.{n}", "I32", v.shape, 0, 0) for n, v in own.items()}, stored
            )
            shape, reader, names = packs["a.weight"]
            assert shape == (24, 64)
            assert sorted(names) == ["a.qweight", "a.qzeros", "a.scales"]
            scheme, leaves = reader()
        assert scheme == "grouped4"
        found.append(leaves)
    assert all((found[0][name] == found[1][name]).all() for name in found[0])
    values = _groups.dequantize({name: jnp.asarray(leaf) for name, leaf in found[0].items()}, 64, 24)
    np.testing.assert_array_equal(np.asarray(values).astype(np.float16), GOLDEN["awq/dequantized"])


@pytest.mark.parametrize(
    "bits, form, act, size",
    [(4, "gptq", False, 32), (4, "gptq_v2", True, 32), (8, "gptq", True, 32), (8, "gptq_v2", False, 96),
     (4, "gptq", False, -1)],
)  # fmt: skip
def test_gptq_is_its_formula(bits, form, act, size, tmp_path):
    folder, expected = gptq_folder(tmp_path / "model", bits, form, act, size)
    model = jpeft.models.load(folder, dtype=jnp.float32)
    plain = jpeft.partition(jpeft.dequantize(model))[2]
    for name, value in expected.items():
        i, rest = name.removeprefix("model.layers.").split(".", 1)
        path = f"layers/{rest.removesuffix('.weight').replace('.', '/')}/kernel"
        assert subjects.error(plain[path][int(i)].T, value) < subjects.FLOAT32, name
    assert ("layers/mlp/down_proj/kernel/rows" in jpeft.partition(model)[2]) == act
    adapted = subjects.fill(jpeft.adapt(model, jpeft.LoRA(rank=2, targets="all-linear"), key=KEY))
    assert subjects.error(jpeft.merge(adapted)(IDS), adapted(IDS)) < 1e-4


@pytest.mark.parametrize("size", [32, -1])
def test_awq_is_its_formula(size, tmp_path):
    """A whole folder: codes and zeros as they are, without GPTQ's one less, of eight columns in AWQ's order."""
    jpeft.models.save(jpeft.models.build(CONFIG, key=KEY), tmp_path / "model")
    values, rng, expected = tensors(tmp_path / "model"), np.random.default_rng(0), {}
    for name in [name for name in values if "_proj" in name]:
        d_out, d_in = values.pop(name).shape
        rows, start = np.arange(d_in) // (d_in if size == -1 else size), name.removesuffix("weight")
        codes, zeros = rng.integers(0, 16, (d_in, d_out)), rng.integers(0, 16, (rows[-1] + 1, d_out))
        scales = rng.uniform(0.001, 0.01, zeros.shape).astype(np.float16)
        expected[name] = ((codes - zeros[rows]) * scales.astype(np.float64)[rows]).T
        for last, numbers in (("qweight", codes), ("qzeros", zeros)):
            eights = numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
            values[start + last] = packed(eights.reshape(numbers.shape), 4)
        values[f"{start}scales"] = scales
    said = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    folder = write(tmp_path / "model", values, quantization_config=said)
    plain = jpeft.partition(jpeft.dequantize(jpeft.models.load(folder, dtype=jnp.float32)))[2]
    for name, value in expected.items():
        i, rest = name.removeprefix("model.layers.").split(".", 1)
        path = f"layers/{rest.removesuffix('.weight').replace('.', '/')}/kernel"
        assert subjects.error(plain[path][int(i)].T, value) < subjects.FLOAT32, name


# Refusals.


def but(**changes: Any) -> Any:
    """Tensors of a weight, each changed."""
    return lambda t: t.update({Q + name: change(t[Q + name]) for name, change in changes.items()})


def in_floats(t: dict[str, np.ndarray]) -> None:
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        t.pop(Q + name)
    t[Q + "weight"] = np.ones((64, 64), np.float32)


DAMAGED = {
    "no scales": (lambda t: t.pop(f"{Q}scales"), r"codes lack .*q_proj\.scales"),
    "a group too far": (but(g_idx=lambda v: v + 7), "names groups from 7 to 8, of 2"),
    "other zeros": (but(qzeros=lambda v: v[:1]), r"qzeros is I32 \[1, 8\]; it must be I32 \[2, 8\]"),
    "another dtype": (but(qweight=lambda v: v.astype(np.float32)), "qweight is F32"),
    "not finite": (but(scales=lambda v: v * np.float16(np.nan)), "scales has values that are not finite"),
    "another width": (but(qweight=lambda v: v[:4]), r"q_proj\.weight is \[64, 32\], the model needs \[64, 64\]"),
    "a flat one": (but(qweight=np.ravel), r"qweight is \[512\]; codes are a matrix"),
    "one in floats": (in_floats, "some layers of .* are codes, and others are not"),
}
Q = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_codes_of_gptq_are_named(name, tmp_path):
    damage, said = DAMAGED[name]
    folder, _ = gptq_folder(tmp_path / "model")
    values = tensors(folder)
    damage(values)
    config = json.loads((folder / "config.json").read_text())
    write(folder, values, **config)
    with pytest.raises(CheckpointError, match=said):
        jpeft.models.load(folder)


STATE = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"
W = "model.layers.0.self_attn.q_proj.weight"


def stated(**changes: Any) -> Any:
    def change(t: dict[str, np.ndarray]) -> None:
        state = json.loads(t[STATE].tobytes()) | changes
        t[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


def unpacked(t: dict[str, np.ndarray]) -> None:
    for name in [name for name in t if "quant" in name or "absmax" in name]:
        t.pop(name)


DAMAGED_BNB = {
    "no magnitudes": (lambda t: t.pop(f"{W}.absmax"), r"codes lack .*q_proj\.weight\.absmax"),
    "few codes": (lambda t: t.update({W: t[W][:9]}), r"has 9 bytes of codes, of a weight \[64, 64\]"),
    "another table": (lambda t: t.update({f"{W}.quant_map": t[f"{W}.quant_map"] + 1}), "holds other values than"),
    "blocks": (stated(blocksize=128), "says blocksize=128; read are nf4 and fp4 in blocks of 64"),
    "shape": (stated(shape=[64]), r"says shape=\[64\], which is no matrix's"),
    "mean": (stated(nested_offset="x"), "says nested_offset='x', which is not read"),
    "no JSON": (lambda t: t.update({STATE: t[STATE][:5]}), "is not JSON"),
    "no codes": (unpacked, "speaks of bnb4 codes, and the checkpoint holds none"),
}


@pytest.mark.parametrize("name", DAMAGED_BNB)
def test_damaged_codes_of_bitsandbytes_are_named(name, tmp_path):
    damage, said = DAMAGED_BNB[name]
    shutil.copytree(HERE / "stored" / "nf4", tmp_path / "model")
    values = tensors(tmp_path / "model")
    damage(values)
    write(tmp_path / "model", values, **json.loads((tmp_path / "model" / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=said):
        jpeft.models.load(tmp_path / "model")


@pytest.mark.parametrize(
    "config, said",
    [
        ({"quant_method": "hqq"}, "has quant_method='hqq'; read are bitsandbytes, gptq, awq"),
        ({"quant_method": "bitsandbytes"}, "must say either load_in_4bit or load_in_8bit"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "gptq has bits=3; read is 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "gptq has group_size=0"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            "checkpoint_format='marlin'",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "awq has version='gemv'"),
        ([], "quantization_config must be a mapping"),
    ],
)
def test_formats_that_are_not_read_are_named(config, said, tmp_path):
    folder = write(tmp_path / "model", {"a": np.ones(1, np.float32)}, quantization_config=config)
    with pytest.raises(ValueError, match=said):
        jpeft.models.load(folder)
