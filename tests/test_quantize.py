# SPDX-License-Identifier: Apache-2.0
"""Quantized bases: the codes of every layer of a stack, and what a model computes and trains."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.models import LLAMA, MODELS
from flax import nnx
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft._quantized import QuantizedKernel
from jpeft._schemes import SCHEMES
from jpeft.models import _quantizing, _weights

KEY = jax.random.key(0)
IDS = np.arange(8).reshape(2, 4)
WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 128}

#: One of each kind of layout.
KINDS = ("nf4", "nf4_double", "int8", "int4_32_asymmetric", "fp8_e4m3")


def linear(kernel: Any, dtype=jnp.float32) -> nnx.Linear:
    """A Linear of `kernel` `[d_in, d_out]`."""
    module = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal())
    module.kernel = nnx.Param(jnp.asarray(kernel, dtype))
    return module


# Codes.


@pytest.mark.parametrize("d_in", [64, 10], ids=["columns", "flat"])
@pytest.mark.parametrize("scheme", KINDS)
def test_every_layer_of_a_stack_is_quantized_on_its_own(scheme, d_in):
    kernels = np.random.default_rng(0).standard_normal((3, d_in, 6)) * np.array([1, 5, 0.1])[:, None, None]
    stacked = linear(kernels[0])
    stacked.kernel = nnx.Param(jnp.asarray(kernels, jnp.float32))
    together = jpeft.quantize(stacked, scheme, targets=".*").kernel
    assert together.shape == (3, d_in, 6)
    for layer, kernel in enumerate(kernels):
        alone = jpeft.quantize(linear(kernel), scheme, targets=".*").kernel
        for name, leaf in alone.leaves.items():
            np.testing.assert_array_equal(together.leaves[name][layer], leaf, err_msg=name)
        np.testing.assert_array_equal(together[...][layer], alone[...])


MODULES = {
    "Linear": lambda r: nnx.Linear(6, 5, rngs=r),
    "LinearGeneral": lambda r: nnx.LinearGeneral((2, 3), (5, 4), axis=(-2, -1), rngs=r),
    "Einsum": lambda r: nnx.Einsum("bi,hid->bhd", (2, 6, 3), rngs=r),
}
INPUTS = {"LinearGeneral": (3, 2, 3)}


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("kind", MODULES)
def test_a_module_computes_what_its_dequantized_kernel_does(kind, scheme):
    """Its gradient with respect to the input is that kernel's too."""
    module = jpeft.quantize(MODULES[kind](nnx.Rngs(0)), scheme, targets=".*")
    plain = jpeft.dequantize(module)
    assert type(plain) is type(MODULES[kind](nnx.Rngs(0)))
    assert isinstance(module, type(plain))
    assert module.kernel.shape == plain.kernel.shape
    x = np.random.default_rng(0).standard_normal(INPUTS.get(kind, (3, 6))).astype(np.float32)

    def loss(module, x):
        return (jnp.tanh(module(x)) ** 2).sum()

    np.testing.assert_array_equal(module(x), plain(x))
    got, expected = (jax.jit(jax.grad(loss, argnums=1))(m, x) for m in (module, plain))
    assert subjects.error(got, expected) < subjects.FLOAT32


def test_a_kernel_of_zeros_stays_zero():
    for scheme in SCHEMES:
        assert (jpeft.quantize(linear(np.zeros((64, 3))), scheme, targets=".*").kernel[...] == 0).all()


BOUNDS = {"int8": 0.01, "fp8_e4m3": 0.04, "fp8_e5m2": 0.08, "fp4": 0.2, "fp4_double": 0.2, "int4_128": 0.2}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_is_what_the_bits_allow(scheme):
    bound = BOUNDS.get(scheme.removesuffix("_tensor"), 0.15)
    weight = np.random.default_rng(0).standard_normal((128, 96))
    error = subjects.error(jpeft.quantize(linear(weight), scheme, targets=".*").kernel[...], weight)
    assert bound / 10 < error < bound


# Models.


def wide_llama(**options) -> Any:
    return jpeft.models.build(WIDE, "CAUSAL_LM", key=KEY, **options)


def test_all_linear_layers_but_the_head_are_quantized():
    model = jpeft.quantize(MODELS["llama"].build())
    kernels = {
        "/".join(map(str, path)) for path, module in nnx.iter_modules(model) if isinstance(module, QuantizedKernel)
    }
    assert len(kernels) == 7
    assert not any("lm_head" in path or "embed" in path for path in kernels)
    some = jpeft.quantize(MODELS["llama"].build(), targets=["q_proj", "lm_head"], exclude="lm_head")
    codes = [path for path in jpeft.partition(some)[2] if "codes" in path]
    assert codes == ["layers/self_attn/q_proj/kernel/flat_codes"]


def test_the_given_model_is_untouched():
    base = MODELS["llama"].build()
    before = subjects.leaves(base)
    jpeft.quantize(base)
    assert all((subjects.leaves(base)[path] == value).all() for path, value in before.items())


def test_the_summary_counts_weights_and_bytes():
    base, model = wide_llama(), jpeft.quantize(wide_llama(), "nf4")
    plain, found = jpeft.summary(base), jpeft.summary(model)
    assert found.base == plain.base
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert plain.base_bytes - found.base_bytes == weights * 4 - weights * 4.5 / 8


def test_no_array_of_a_kernel_is_kept_for_the_backward_pass():
    """Between the passes of the scan there are codes, not the kernels of all layers."""
    model = jpeft.adapt(jpeft.quantize(wide_llama()), jpeft.LoRA(rank=2, targets="all-linear"), key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)

    def loss(trainable):
        return jpeft.combine(graphdef, trainable, frozen)(IDS).sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(trainable))
    assert "u8[2,64,64]" in jaxpr  # the codes of down_proj
    assert "f32[2,128,64]" not in jaxpr
    assert "f32[2,64,128]" not in jaxpr


@pytest.mark.parametrize("name", ["llama", "foreign", "bert", "t5"])
def test_a_models_gradient_is_that_of_the_dequantized_model(name):
    model = jpeft.adapt(jpeft.quantize(MODELS[name].build()), jpeft.LoRA(rank=2, targets="all-linear"), key=KEY)
    model = subjects.fill(model)

    def gradients(model):
        graphdef, trainable, frozen = jpeft.partition(model)
        loss = lambda t: (MODELS[name].run(jpeft.combine(graphdef, t, frozen), IDS) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(trainable)

    got, expected = gradients(model), gradients(jpeft.dequantize(model))
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        assert subjects.error(got[path], value) < 10 * subjects.FLOAT32, path


def test_a_quantized_model_has_a_shape_and_a_pickle():
    shapes = nnx.eval_shape(lambda: jpeft.quantize(wide_llama(), "nf4_double"))
    model = jpeft.quantize(wide_llama(), "nf4_double")
    expected = {path: (leaf.shape, leaf.dtype) for path, leaf in jpeft.partition(model)[2].items()}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in jpeft.partition(shapes)[2].items()} == expected
    assert jpeft.partition(shapes)[0] == jpeft.partition(model)[0]
    assert jpeft.summary(shapes).base_bytes == jpeft.summary(model).base_bytes
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again(IDS), model(IDS))


def test_methods_from_the_kernel_start_from_the_dequantized_one():
    model = jpeft.quantize(wide_llama())
    for method in (jpeft.LoRA(rank=2, init="pissa"), jpeft.DoRA(rank=2)):
        adapted = jpeft.adapt(model, method, key=KEY)
        expected = jpeft.adapt(jpeft.dequantize(model), method, key=KEY)
        theirs = jpeft.partition(expected)[1]
        assert all((value == theirs[path]).all() for path, value in jpeft.partition(adapted)[1].items())
        np.testing.assert_array_equal(adapted(IDS), model(IDS))


@pytest.mark.parametrize("scheme", KINDS)
def test_loading_quantizes_as_quantize_does(tmp_path, scheme):
    jpeft.models.save(wide_llama(), tmp_path / "model")
    model = jpeft.models.load(tmp_path / "model", quantize=scheme)
    expected = jpeft.quantize(wide_llama(), scheme)
    assert jpeft.partition(model)[0] == jpeft.partition(expected)[0]
    for path, value in subjects.leaves(expected).items():
        np.testing.assert_array_equal(subjects.leaves(model)[path], value, err_msg=path)


@pytest.mark.parametrize(
    "scheme, axes", [("nf4_double", None), ("int4_32_asymmetric", "fsdp=4,tensor=2"), ("nf4", "fsdp=4,tensor=2")]
)
def test_loading_holds_a_layer_in_floats_where_a_leaf_is_large(tmp_path, scheme, axes, monkeypatch):
    """The codes are those of the whole leaf, in their places; no more than one layer was there before them."""
    jpeft.models.save(wide_llama(), tmp_path / "model")
    layers, original = {}, _weights._leaf

    def count(path, parts, tensors, leaf, sharding):
        layers.setdefault(path, []).append(leaf.shape[0])
        return original(path, parts, tensors, leaf, sharding)

    monkeypatch.setattr(_weights, "_leaf", count)
    monkeypatch.setattr(_quantizing, "_AT_ONCE", 1)
    mesh = None if axes is None else jpeft.mesh(axes)
    place = None if mesh is None else jpeft.placement(mesh, uneven="whole")
    model = jpeft.models.load(tmp_path / "model", quantize=scheme, sharding=place)
    expected = subjects.leaves(jpeft.quantize(wide_llama(), scheme))
    assert all(layers[path] == [1, 1] for path in layers if path.endswith("_proj/kernel"))
    for path, value in jpeft.partition(model)[2].items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
        assert place is None or value.sharding == place(path, value), path


def test_loading_quantized_with_a_new_head_trains_that(tmp_path):
    jpeft.models.save(wide_llama(), tmp_path / "model")
    model = jpeft.models.load(tmp_path / "model", "SEQ_CLS", num_labels=3, quantize="int8")
    assert model(IDS).shape == (2, 3)
    assert jpeft.partition(model)[2]["score/kernel"].dtype == jnp.float32


def test_a_quantized_model_is_saved_in_codes_and_after_dequantize_in_floats(tmp_path):
    model = jpeft.quantize(wide_llama(), "int4_64")
    jpeft.models.save(model, tmp_path / "codes")
    jpeft.models.save(jpeft.dequantize(model), tmp_path / "floats")
    for folder in ("codes", "floats"):
        np.testing.assert_array_equal(jpeft.models.load(tmp_path / folder)(IDS), model(IDS))
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("codes", "floats")]
    assert sizes[0] < 0.5 * sizes[1]


def test_a_merge_is_of_the_dequantized_kernel():
    model = subjects.fill(jpeft.adapt(jpeft.quantize(wide_llama()), jpeft.LoRA(rank=2), key=KEY))
    merged = jpeft.merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(wide_llama())
    expected = jpeft.partition(jpeft.merge(jpeft.dequantize(model)))[2]
    for path, value in jpeft.partition(merged)[2].items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


# On a mesh.


def test_codes_lie_as_their_kernel_does():
    model = jpeft.adapt(jpeft.quantize(wide_llama(), "nf4_double"), jpeft.LoRA(rank=4, targets="all-linear"), key=KEY)
    mesh = jpeft.mesh("fsdp=2,tensor=2,data=2")
    at = {path: place.spec for path, place in jpeft.shardings(model, mesh, uneven="whole").items()}
    up, down = "layers/mlp/up_proj", "layers/mlp/down_proj"
    assert at[f"{up}/kernel/codes"] == P(None, "fsdp", "tensor")
    assert at[f"{up}/kernel/scales"] == P(None, None, "tensor")  # one block per column: there is nothing to cut
    assert at[f"{down}/kernel/codes"] == at[f"{down}/kernel/scales"] == P(None, "tensor", "fsdp")
    assert at[f"{up}/kernel/scale_largest"] == P(None, None)
    assert at[f"{up}/adapters/lora/A"] == P(None, "fsdp", None)
    assert at[f"{up}/adapters/lora/B"] == P(None, None, ("tensor", "fsdp"))
    placed = jpeft.shard(model, mesh, uneven="whole")
    assert subjects.error(placed(IDS), model(IDS)) < subjects.FLOAT32


def test_flat_codes_are_replicated_and_rules_of_ones_own_reach_codes():
    mesh = jpeft.mesh("fsdp=4,tensor=2")
    model = jpeft.quantize(MODELS["llama"].build())
    at = jpeft.shardings(model, mesh, uneven="whole")
    assert at["layers/mlp/up_proj/kernel/flat_codes"].spec == P(None, None)
    adapted = subjects.fill(jpeft.adapt(model, jpeft.LoRA(rank=2, targets="all-linear"), key=KEY))
    placed = jpeft.shard(adapted, mesh, uneven="whole")
    at = jpeft.shardings(
        adapted, mesh, uneven="whole"
    )  # what adapts codes has no axis to follow: it goes along its longest
    assert at["layers/mlp/up_proj/adapters/lora/A"].spec == P(None, "fsdp", None)
    assert subjects.error(placed(IDS), adapted(IDS)) < subjects.FLOAT32
    own = jpeft.shardings(jpeft.quantize(wide_llama(), "int8"), mesh, [("**/up_proj/kernel", P(None, "fsdp"))])
    assert own["layers/mlp/up_proj/kernel/codes"].spec == P(None, None, "fsdp")
    assert own["layers/mlp/up_proj/kernel/scales"].spec == P(None, None, "fsdp")


def test_loading_places_codes(tmp_path):
    jpeft.models.save(wide_llama(), tmp_path / "model")
    mesh = jpeft.mesh("fsdp=4,tensor=2")
    model = jpeft.models.load(tmp_path / "model", quantize="nf4", sharding=jpeft.placement(mesh, uneven="whole"))
    codes = jpeft.partition(model)[2]["layers/mlp/up_proj/kernel/codes"]
    assert codes.sharding.spec == P(None, "fsdp", "tensor")


# Refusals.


@pytest.mark.parametrize("method", [jpeft.FullFineTune(), jpeft.LastLayers(1), jpeft.LoRA(modules_to_save=["k_proj"])])
def test_what_trains_copies_of_a_quantized_kernel_is_refused(method):
    with pytest.raises(ValueError, match=r"proj/kernel is quantized \(int8\), and codes cannot be trained"):
        jpeft.adapt(jpeft.quantize(MODELS["llama"].build(), "int8"), method, key=KEY)


def test_what_trains_other_parts_whole_is_not():
    model = jpeft.quantize(MODELS["llama"].build())
    adapted = jpeft.adapt(model, jpeft.FullFineTune(exclude=".*_proj"), key=KEY)
    assert not any("proj" in path for path in jpeft.partition(adapted)[1])


def test_what_cannot_be_quantized():
    base = MODELS["llama"].build()
    with pytest.raises(ValueError, match=r"scheme must be one of nf4, nf4_double, fp4, .*; got 'nf3'"):
        jpeft.quantize(base, "nf3")
    with pytest.raises(ValueError, match="embed_tokens, a TokenTable, is no product with a matrix"):
        jpeft.quantize(base, targets=["embed_tokens"])
    with pytest.raises(ValueError, match=r"target 'querry' matches no projection .* nearest: "):
        jpeft.quantize(base, targets=["querry"])
    with pytest.raises(ValueError, match="matches some layers of the stack layers/self_attn/q_proj alone"):
        jpeft.quantize(base, targets=["layers.1.self_attn.q_proj"])
    with pytest.raises(ValueError, match=r"q_proj, a QuantizedLinear, is quantized already \(nf4\)"):
        jpeft.quantize(jpeft.quantize(base), targets=["q_proj"])
    with pytest.raises(ValueError, match="layers/self_attn/q_proj carries adapters"):
        jpeft.quantize(jpeft.adapt(base, jpeft.LoRA(targets=["q_proj"]), key=KEY))
    with pytest.raises(ValueError, match="has entries that are not finite"):
        jpeft.quantize(linear(np.full((3, 4), np.nan)), targets=".*")
    with pytest.raises(ValueError, match="has a kernel of int32; quantize takes floating-point ones"):
        jpeft.quantize(linear(np.ones((3, 4)), jnp.int32), targets=".*")


def test_a_shared_kernel_is_refused():
    pair = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1))])
    pair[1].kernel = pair[0].kernel
    model = nnx.Module()
    model.layers = pair
    with pytest.raises(ValueError, match="layers/0 and layers/1 share one kernel"):
        jpeft.quantize(model)
