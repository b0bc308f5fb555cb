# SPDX-License-Identifier: Apache-2.0
"""Folders of codes of every scheme, written and read back bit for bit, or refused by the name of what is damaged."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stored_folders import CONFIG, GOLDEN, HERE, IDS, KEY, gptq_folder, tensors, write

import jpeft
from jpeft._schemes import SCHEMES
from jpeft.models import CheckpointError

#: Inputs that no group or block divides: int4 then names the group of every row, and nf4 runs across columns.
UNEVEN = CONFIG | {"hidden_size": 72, "num_attention_heads": 4, "intermediate_size": 100, "head_dim": 16}
BNB = ("nf4", "nf4_double", "fp4", "fp4_double", "int8")


def leaves(model: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in jpeft.partition(model)[2].items()}


def check_same(one: Any, other: Any) -> None:
    """Every leaf has the same path, dtype, shape and bits."""
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert (value.dtype, value.shape) == (other[path].dtype, other[path].shape), path
        assert value.tobytes() == other[path].tobytes(), path


def written(model: Any, folder: Path) -> dict[str, Any]:
    """`quantization_config` of the folder that the model is saved to."""
    jpeft.models.save(model, folder)
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("config", [CONFIG, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_read_back_bit_for_bit(scheme, config, tmp_path):
    model = jpeft.quantize(jpeft.models.build(config, key=KEY), scheme)
    said = written(model, tmp_path / "model")
    assert said["quant_method"] == ("bitsandbytes" if scheme in BNB else "jpeft")
    check_same(model, jpeft.models.load(tmp_path / "model"))
    stored = sum(value.nbytes for value in tensors(tmp_path / "model").values())
    assert stored <= jpeft.summary(model).base_bytes + 14 * (2048 if scheme in BNB else 12)


def test_int8_of_bitsandbytes_is_written_with_the_same_tensors(tmp_path):
    said = written(jpeft.models.load(HERE / "stored" / "int8"), tmp_path / "again")
    before, after = tensors(HERE / "stored" / "int8"), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
        assert after[name].dtype == value.dtype
    theirs = json.loads((HERE / "stored" / "int8" / "config.json").read_text())["quantization_config"]
    assert said.pop("llm_int8_skip_modules") == ["lm_head"]
    assert said == {name: theirs[name] for name in said}


def test_int8_is_what_bitsandbytes_makes_of_the_weights(tmp_path):
    """Codes and magnitudes of the files, from the golden weights that bitsandbytes quantized."""
    model = jpeft.models.load(HERE / "stored" / "int8")
    plain = jpeft.dequantize(model)
    jpeft.models.save(jpeft.quantize(plain, "int8"), tmp_path / "anew")
    before, after = tensors(HERE / "stored" / "int8"), tensors(tmp_path / "anew")
    for name, value in before.items():
        if name.endswith("SCB"):
            np.testing.assert_allclose(after[name], value, rtol=3e-7)
        elif "_proj" in name:
            np.testing.assert_array_equal(after[name], value, err_msg=name)
    for i in range(2):
        expected = GOLDEN[f"int8/{i}.q_proj"]
        np.testing.assert_allclose(plain.layers.self_attn.q_proj.kernel[...][i].T, expected, rtol=3e-7)


@pytest.mark.parametrize("form, act, size", [("gptq", False, 32), ("gptq_v2", True, 32), ("gptq", False, 96)])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_that_only_files_bring_are_kept(bits, form, act, size, tmp_path):
    model = jpeft.models.load(gptq_folder(tmp_path / "theirs", bits, form, act, size)[0])
    assert written(model, tmp_path / "ours") == {"quant_method": "jpeft", "version": 1}
    check_same(model, jpeft.models.load(tmp_path / "ours"))


def test_schemes_side_by_side_and_some_kernels_in_floats(tmp_path):
    model = jpeft.models.build(CONFIG, key=KEY, dtype=jnp.bfloat16)
    model = jpeft.quantize(jpeft.quantize(model, "nf4_double", ["q_proj", "up_proj"]), "int8", ["v_proj"])
    assert written(model, tmp_path / "model")["quant_method"] == "jpeft"
    again = jpeft.models.load(tmp_path / "model")
    check_same(model, again)
    np.testing.assert_array_equal(np.asarray(again(IDS)), np.asarray(model(IDS)))


@pytest.mark.parametrize("scheme", ["nf4", "int4_32"])
def test_weights_that_are_no_torch_linears(scheme, tmp_path):
    """GPT-2's Conv1D lies as a kernel does; bitsandbytes knows it turned only."""
    config = {"model_type": "gpt2", "vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40}
    model = jpeft.quantize(jpeft.models.build(config, "CAUSAL_LM", key=KEY), scheme)
    assert written(model, tmp_path / "model")["quant_method"] == "jpeft"
    check_same(model, jpeft.models.load(tmp_path / "model"))


def test_what_was_read_lies_on_a_mesh(tmp_path):
    jpeft.models.save(jpeft.quantize(jpeft.models.build(CONFIG, key=KEY), "int4_32"), tmp_path / "model")
    mesh = jpeft.mesh("fsdp=4,tensor=2")
    model = jpeft.models.load(tmp_path / "model", sharding=jpeft.placement(mesh))
    codes = jpeft.partition(model)[2]["layers/self_attn/q_proj/kernel/codes"]
    assert {shard.data.shape for shard in codes.addressable_shards} == {(2, 8, 32)}
    check_same(model, jpeft.models.load(tmp_path / "model"))


# Refusals.

W = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight.int4_32.matrix"


def but(leaf: str, change: Any) -> Any:
    """Tensors with a leaf of a weight changed."""

    def damage(t: dict[str, np.ndarray], start: str) -> None:
        t[start + leaf] = np.ascontiguousarray(change(t[start + leaf]))

    return damage


def without(leaf: str) -> Any:
    return lambda t, start: t.pop(start + leaf)


def renamed(old: str, new: str) -> Any:
    return lambda t, start: t.update({key.replace(old, new): t.pop(key) for key in [*t] if old in key})


def nan(codes: np.ndarray) -> np.ndarray:
    bits = codes.copy().view(np.uint8)
    bits[0, 0] = 0x7F
    return bits.view(codes.dtype)


def twice(t: dict[str, np.ndarray], start: str) -> None:
    t.update({key.replace(".int4_32.", ".grouped4."): t[key] for key in [*t] if key.startswith(start)})


DAMAGED = {
    "no scales": ("int4_32", without("scales"), r"codes lack .*q_proj\.weight\.int4_32\.scales"),
    "no matrix": ("int4_32", without("matrix"), r"codes lack .*q_proj\.weight\.int4_32\.matrix"),
    "too few codes": ("int4_32", but("codes", lambda v: v[:9]), r"matrix says \[64, 64, 1\], of 576 codes"),
    "turned": ("int4_32", but("codes", lambda v: v.T), r"codes is U8 \[64, 32\]; it must be U8 \[32, 64\]"),
    "a Conv1D's": (
        "int4_32",
        lambda t, _: t.update({DOWN: t[DOWN] * np.int32([1, 1, 0])}),
        r"down_proj\.weight is \[96, 64\], the model needs \[64, 96\]",
    ),
    "another width": ("int4_32", but("scales", lambda v: v[:1]), r"scales is F32 \[1, 64\]; it must be F32 \[2, 64\]"),
    "another dtype": ("int4_32", but("codes", lambda v: v.view(np.int8)), "codes is I8"),
    "not finite": ("int4_32", but("scales", lambda v: v * np.float32(np.nan)), "scales has values that are not finite"),
    "a code that is none": ("fp8_e4m3", but("codes", nan), "codes has values that are not finite"),
    "a matrix of none": ("int4_32", but("matrix", lambda v: v * 0), r"matrix says \[0, 0, 0\]"),
    "a vast matrix": ("int4_32", but("matrix", lambda v: v * 2**20), "of 2048 codes: no such matrix"),
    "another matrix": (
        "int4_32",
        but("matrix", lambda v: v // np.int32([2, 1, 1])),
        r"is \[64, 32\], the model needs",
    ),
    "a matrix of two": ("int4_32", but("matrix", lambda v: v[:2]), r"matrix is I32 \[2\]; it must be I32 \[3\]"),
    "another scheme": ("int4_32", renamed("int4_32", "int3_32"), "is of the scheme int3_32; read are nf4"),
    "one too many": (
        "int8_and_nf4",
        lambda t, start: t.update({f"{start}zeros": np.ones(1, np.uint8)}),
        r"codes have, and must not, .*q_proj\.weight\.nf4\.zeros",
    ),
    "two schemes": ("int4_32", twice, "is there in codes of two schemes"),
    "no weight": ("int4_32", renamed("0.self_attn.q_proj.weight", "9.w"), r"missing keys: model\.layers\.0\.self_attn"),
}


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory):
    base, root = jpeft.models.build(CONFIG, key=KEY), tmp_path_factory.mktemp("own")
    for scheme in ("int4_32", "fp8_e4m3"):
        jpeft.models.save(jpeft.quantize(base, scheme), root / scheme)
    mixed = jpeft.quantize(jpeft.quantize(base, "nf4", ["q_proj"]), "int8", ["v_proj"])
    jpeft.models.save(mixed, root / "int8_and_nf4")
    return root


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_codes_are_named(name, folders, tmp_path):
    folder, damage, said = DAMAGED[name]
    values = tensors(folders / folder)
    damage(values, f"{W}.{folder.rpartition('_and_')[2]}.")
    write(tmp_path / "model", values, **json.loads((folders / folder / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=said):
        jpeft.models.load(tmp_path / "model")


@pytest.mark.parametrize("change", [lambda v: v - 1, lambda v: v + 1], ids=["below", "above"])
def test_rows_of_groups_that_are_not_there_are_named(change, tmp_path):
    folder = tmp_path / "model"
    jpeft.models.save(jpeft.quantize(jpeft.models.build(UNEVEN, key=KEY), "int4_32"), folder)
    values = tensors(folder)
    values[f"{W}.int4_32.rows"] = change(values[f"{W}.int4_32.rows"])
    write(folder, values, **json.loads((folder / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=r"rows names groups from -?\d to \d, of 3"):
        jpeft.models.load(folder)


def test_groups_without_their_rows_are_named(tmp_path):
    theirs = gptq_folder(tmp_path / "theirs", 4, "gptq_v2", True, 32)[0]
    jpeft.models.save(jpeft.models.load(theirs), tmp_path / "ours")
    values = tensors(tmp_path / "ours")
    down = "model.layers.0.mlp.down_proj.weight.grouped4."
    values[f"{down}scales"], values[f"{down}rows"] = values[f"{down}scales"][:0], values.pop(f"{down}rows")
    write(tmp_path / "ours", values, **json.loads((tmp_path / "ours" / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=r"grouped4 has 0 groups of 96 inputs, and no rows"):
        jpeft.models.load(tmp_path / "ours")


def test_another_version_is_named(folders, tmp_path):
    values = tensors(folders / "int4_32")
    write(tmp_path / "model", values, quantization_config={"quant_method": "jpeft", "version": 2})
    with pytest.raises(ValueError, match="quantization_config of jpeft has version=2; read is 1"):
        jpeft.models.load(tmp_path / "model")


def test_scales_of_int8_that_no_magnitude_gives_are_named(tmp_path):
    """About one float in a hundred is no float32 times 1 / 127."""
    model = jpeft.quantize(jpeft.models.build(CONFIG, key=KEY), "int8")
    kernel = model.layers.self_attn.q_proj.kernel
    numbers = np.float32(1.5) + np.arange(2000, dtype=np.float32) * np.float32(2**-23)
    products = (np.float32(190.5) + np.arange(-100, 3000, dtype=np.float32) * np.float32(2**-16)) * np.float32(1 / 127)
    none = next(number for number in numbers if number not in products)
    kernel.scales = type(kernel.scales)(jnp.full_like(kernel.scales[...], none))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has scales of int8 that are no float32 times"):
        jpeft.models.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_hundred_thousand_magnitudes_are_told_back():
    """Of every size, those beside the halves of numbers included."""
    from jpeft._schemes import INT8_STEP
    from jpeft.models._stored_bnb import _largest

    rng = np.random.default_rng(0)
    largest = (rng.uniform(1, 2, 100_000) * 2.0 ** rng.integers(-100, 100, 100_000)).astype(np.float32)
    largest = np.concatenate([largest, [np.float32(0)], np.float32(127) * (1 + np.arange(1000) * np.float32(2**-17))])
    scales = largest.astype(np.float32) * INT8_STEP
    np.testing.assert_array_equal(_largest("w", scales) * INT8_STEP, scales)
    halves = rng.standard_normal(100_000).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(_largest("w", np.abs(halves) * INT8_STEP), np.abs(halves))
    np.testing.assert_array_equal(scales, np.asarray(jax.jit(lambda x: x * INT8_STEP)(largest.astype(np.float32))))
