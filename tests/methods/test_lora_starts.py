# SPDX-License-Identifier: Apache-2.0
"""LoRA's starts: their distributions, PiSSA and OLoRA against peft, what they depend on; and dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import scipy.stats
import subjects
import torch
from flax import nnx

import jpeft

KEY = jax.random.key(0)


@pytest.fixture(autouse=True, name="torch_seed")
def _torch_seed():
    torch.manual_seed(0)


def started(init, d_in=40, d_out=30, rank=8, module=None, key=KEY, **options):
    module = nnx.Linear(d_in, d_out, rngs=nnx.Rngs(1)) if module is None else module
    return jpeft.adapt(module, jpeft.LoRA(rank=rank, alpha=16, targets=".*", init=init, **options), key=key)


def factors(model):
    leaves = subjects.leaves(model)
    return leaves["adapters/lora/A"], leaves["adapters/lora/B"]


def test_the_default_start_is_uniform_and_zero():
    a, b = factors(started("default"))
    assert scipy.stats.kstest(a.ravel(), "uniform", (-(40**-0.5), 2 * 40**-0.5)).pvalue > 0.05
    assert (np.abs(a) < 40**-0.5).all()
    assert (b == 0).all()


def test_the_gaussian_start_is_normal_with_one_over_rank():
    a, b = factors(started("gaussian"))
    assert scipy.stats.kstest(a.ravel(), "norm", (0, 1 / 8)).pvalue > 0.05
    assert (b == 0).all()


def pefts(linear: torch.nn.Linear, rank: int, **options: Any) -> tuple[Any, Any, Any]:
    """(model, weight of A, weight of B) of the real peft on one Linear."""
    model: Any = peft.get_peft_model(
        torch.nn.Sequential(linear), peft.LoraConfig(r=rank, target_modules=["0"], **options)
    )
    layer = model.base_model.model[0]
    return model, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def test_the_default_start_is_distributed_as_pefts():
    _, theirs, _ = pefts(torch.nn.Linear(40, 30), 8)
    ours, _ = factors(started("default"))
    assert scipy.stats.ks_2samp(ours.ravel(), theirs.detach().numpy().ravel()).pvalue > 0.05


def test_the_orthogonal_start_is_distributed_as_pefts():
    _, *theirs = pefts(torch.nn.Linear(40, 30), 8, init_lora_weights="orthogonal")
    for ours, other in zip(factors(started("orthogonal")), theirs, strict=True):
        assert scipy.stats.ks_2samp(ours.ravel(), other.detach().numpy().ravel()).pvalue > 0.05


def test_the_orthogonal_start_is_random_and_changes_nothing():
    a, b = factors(started("orthogonal"))
    assert np.abs(a).min() > 0
    assert np.abs(b).min() > 0
    assert np.abs(a.astype(np.float64) @ b).max() < 1e-6


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_an_embedding_starts_with_a_zero_table(init):
    a, b = factors(started(init, module=nnx.Embed(50, 40, rngs=nnx.Rngs(0))))
    assert (a == 0).all()
    assert scipy.stats.kstest(b.ravel(), "norm").pvalue > 0.05


@pytest.mark.parametrize("options", [{}, {"rslora": True}], ids=str)
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_kernel_is_pefts(init, shape, options):
    linear, module = same_linears(*shape)
    a, b = factors(started(init, rank=3, module=module, **options))
    rslora = bool(options)
    _, their_a, their_b = pefts(linear, 3, lora_alpha=16, init_lora_weights=init, use_rslora=rslora)
    assert subjects.error((a.astype(np.float64) @ b).T, (their_b @ their_a).detach()) < subjects.TORCH


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_kernel_trains_as_pefts(init):
    """Its first gradient equals peft's, although peft takes the start out of the base and jpeft does not."""
    linear, module = same_linears(12, 9)
    model = started(init, rank=3, module=module)
    other, a, b = pefts(linear, 3, lora_alpha=16, init_lora_weights=init)
    graphdef, trainable, frozen = jpeft.partition(model)
    # The singular vectors' signs are free, and the product is the same: give peft our factors.
    a.data = torch.tensor(np.asarray(trainable["adapters/lora/A"]).T)
    b.data = torch.tensor(np.asarray(trainable["adapters/lora/B"]).T)
    x = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    expected = other(torch.tensor(x))
    (expected**2).sum().backward()
    assert subjects.error(model(x), expected.detach()) < subjects.TORCH
    gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(x) ** 2).sum())(trainable)
    assert subjects.error(gradients["adapters/lora/A"].T, a.grad) < 2 * subjects.TORCH
    assert subjects.error(gradients["adapters/lora/B"].T, b.grad) < 2 * subjects.TORCH


def same_linears(d_in, d_out):
    linear, module = torch.nn.Linear(d_in, d_out), nnx.Linear(d_in, d_out, rngs=nnx.Rngs(0))
    module.kernel = nnx.Param(jnp.asarray(linear.weight.detach().numpy().T))
    module.bias = nnx.Param(jnp.asarray(linear.bias.detach().numpy()))
    return linear, module


MODULES = {
    "Linear": lambda r: nnx.Linear(6, 5, rngs=r),
    "Einsum": lambda r: nnx.Einsum("bi,hid->bhd", (2, 6, 3), rngs=r),
    "Conv": lambda r: nnx.Conv(6, 4, 3, rngs=r),
    "Embed": lambda r: nnx.Embed(6, 5, rngs=r),
}
INPUTS = {"Embed": np.array([[0, 5, 2]]), "Conv": np.ones((2, 4, 6), np.float32)}


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("kind", MODULES)
def test_every_start_leaves_the_base_as_it_is(init, kind):
    base = MODULES[kind](nnx.Rngs(0))
    x = INPUTS.get(kind, np.ones((3, 6), np.float32))
    model = started(init, rank=4, module=base)
    difference = np.abs(np.asarray(model(x)) - np.asarray(base(x))).max()
    assert difference == 0 if init != "orthogonal" else difference < 1e-6
    for path, value in subjects.leaves(jpeft.strip(model)).items():
        np.testing.assert_array_equal(value, subjects.leaves(base)[path])
    filled = subjects.fill(model)
    with jax.enable_x64(True):
        double = subjects.in_float64(filled)
        x = x.astype(np.float64) if x.dtype == np.float32 else x
        assert subjects.error(jpeft.merge(double)(x), double(x)) < subjects.FLOAT64


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_every_layer_of_a_stack_starts_on_its_own(init):
    """Neither a layer that is left out nor another layer's rank moves the start of the rest."""

    def leaves(**options):
        model = jpeft.adapt(base, jpeft.LoRA(rank=2, targets=["up"], init=init, **options), key=KEY)
        return subjects.leaves(model)

    base = subjects.Stacked(4, 3, nnx.Rngs(0))
    every, two, ranks = leaves(), leaves(layers=[0, 2]), leaves(rank_pattern={"blocks.1.up": 4})
    for leaf in ("A", "B"):
        path = f"blocks/up/adapters/lora/{leaf}"
        for layer in (0, 2):
            np.testing.assert_array_equal(two[path][layer], every[path][layer])
            used = ranks[path][layer][:, :2] if leaf == "A" else ranks[path][layer][:2]
            np.testing.assert_array_equal(used, every[path][layer])
        assert (two[path][1] == 0).all()
    a = every["blocks/up/adapters/lora/A"]
    assert not np.array_equal(a[0], a[1])


def test_the_start_depends_on_the_key_and_the_path_alone():
    base = subjects.ListOfLayers(4, 2, nnx.Rngs(0))

    def leaves(targets, key=KEY, **options):
        return subjects.leaves(jpeft.adapt(base, jpeft.LoRA(rank=2, targets=targets), key=key, **options))

    path = "blocks/0/up/adapters/lora/A"
    np.testing.assert_array_equal(leaves(["up"])[path], leaves("all-linear")[path])
    assert not np.array_equal(leaves(["up"])[path], leaves(["up"], jax.random.key(1))[path])
    assert not np.array_equal(leaves(["up"])[path], leaves(["up"])["blocks/1/up/adapters/lora/A"])
    second = leaves(["up"], name="second")["blocks/0/up/adapters/second/A"]
    assert not np.array_equal(leaves(["up"])[path], second)


def test_an_old_style_key_gives_the_same_start():
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    np.testing.assert_array_equal(factors(started("default", key=old))[0], factors(started("default", key=new))[0])


def test_starts_that_cannot_be():
    with pytest.raises(ValueError, match=r"init='orthogonal' .* must be even; .* has 3"):
        started("orthogonal", rank=3)
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match="is 40 x 30, which holds no start of rank 31"):
            started(init, rank=31)


# Dtypes.


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_adapters_are_float32_on_a_half_precision_base(dtype, kind):
    """The output is the base's, plus a change computed in float32, rounded once."""
    base = MODULES[kind](nnx.Rngs(0))
    _, _, frozen = jpeft.partition(base)
    graphdef = jpeft.partition(base)[0]
    base = jpeft.combine(graphdef, {}, {path: value.astype(dtype) for path, value in frozen.items()})
    base.dtype = base.param_dtype = dtype
    model = subjects.fill(started("default", rank=2, module=base))
    assert {value.dtype for value in jpeft.partition(model)[1].values()} == {jnp.dtype(jnp.float32)}
    assert {value.dtype for value in jpeft.partition(model)[2].values()} == {jnp.dtype(dtype)}
    x = INPUTS.get(kind, np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32))
    x = jnp.asarray(x, dtype) if x.dtype == np.float32 else x
    y = model(x)
    assert y.dtype == dtype
    with jax.enable_x64(True):
        wide = subjects.in_float64(model)
        x64 = x.astype(np.float64) if kind != "Embed" else x
        change = np.asarray(wide(x64)) - np.asarray(jpeft.strip(wide)(x64))
    expected = np.asarray(base(x), np.float64) + change
    half_a_step = float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(np.asarray(y, np.float64) - expected) <= 1.01 * half_a_step * np.abs(expected)).all()
    merged, plain = jpeft.merge(model), jpeft.strip(model)
    assert nnx.graphdef(merged) == nnx.graphdef(plain)
    assert merged(x).dtype == dtype


def test_a_merged_bfloat16_kernel_is_rounded_once():
    base = nnx.Linear(6, 5, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = subjects.fill(started("default", rank=2, module=base))
    a, b = factors(model)
    kernel = subjects.leaves(model)["kernel"].astype(np.float64)
    exact = kernel + 16 / 2 * (a.astype(np.float64) @ b)
    merged = jpeft.merge(model).kernel[...]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, jnp.asarray(exact, jnp.bfloat16))


@pytest.mark.parametrize("kernel", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("x", [jnp.float32, jnp.bfloat16, jnp.int32], ids=["float32", "bfloat16", "int32"])
def test_the_outputs_dtype_is_the_bases(kernel, x):
    base = nnx.Linear(6, 5, param_dtype=kernel, rngs=nnx.Rngs(0))
    inputs = jnp.ones((2, 6), x)
    assert started("default", module=base)(inputs).dtype == base(inputs).dtype
