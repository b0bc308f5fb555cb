# SPDX-License-Identifier: Apache-2.0
"""LoRA against the real peft, its starts, its dropout, and its dtypes."""

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
from jpeft._stack import REMAT_POLICIES, scan, stack

KEY = jax.random.key(0)
#: Against torch in float32, the sums in another order.
TORCH = 2e-6


@pytest.fixture(autouse=True, name="torch_seed")
def _torch_seed():
    torch.manual_seed(0)


class TorchNet(torch.nn.Module):
    """Every kind of module with a bias or a table that bias= and targets may mean."""

    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(7, 4)
        self.up = torch.nn.Linear(4, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.down = torch.nn.Linear(6, 3)

    def forward(self, ids):
        return self.down(self.norm(torch.tanh(self.up(self.emb(ids)))))


class Net(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.emb = nnx.Embed(7, 4, rngs=rngs)
        self.up = nnx.Linear(4, 6, rngs=rngs, bias_init=nnx.initializers.normal())
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs, bias_init=nnx.initializers.normal())
        self.down = nnx.Linear(6, 3, rngs=rngs, bias_init=nnx.initializers.normal())

    def __call__(self, ids):
        return self.down(self.norm(jnp.tanh(self.up(self.emb(ids)))))


class TorchConvNet(torch.nn.Module):
    """A convolution, channels first. (peft's own forgets a dilation.)"""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 1))

    def forward(self, x):
        return self.conv(x)


class ConvNet(nnx.Module):
    """The same in NNX, channels last."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(
            2,
            3,
            (3, 2),
            (2, 1),
            padding=((1, 1), (1, 1)),
            rngs=rngs,
            bias_init=nnx.initializers.normal(),
        )

    def __call__(self, x):
        return self.conv(x)


def torch_name(path: str) -> str:
    """The name of a leaf in the model that peft makes."""
    module, _, leaf = path.partition("/")
    kinds = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
    if "saved/" in leaf:
        return f"{module}.{kinds[leaf.split('/')[-1]]}"
    if module == "emb" and leaf in ("adapters/lora/A", "adapters/lora/B"):
        return f"emb.lora_embedding_{leaf[-1]}.default"
    return f"{module}.lora_{leaf[-1]}.default.weight" if "adapters" in leaf else f"{module}.{kinds[leaf]}"


def to_torch(path: str, value, kernel_shape=None):
    """A leaf in torch's layout."""
    value = np.asarray(value)
    if kernel_shape is not None:  # of a convolution
        value = value.reshape(*kernel_shape[:-1], -1) if path.endswith("A") else value.reshape(1, 1, *value.shape)
    if value.ndim == 4:
        return torch.tensor(value.transpose(3, 2, 0, 1))
    keep = value.ndim < 2 or path.endswith("embedding")
    return torch.tensor(value if keep else value.T)


def both(model, torch_model, method, config):
    """The adapted model filled with numbers, and peft's with the same."""
    base = jpeft.partition(model)[2]
    plain = {torch_name(path): to_torch(path, value) for path, value in base.items()}
    torch_model.load_state_dict(plain)
    adapted = subjects.fill(jpeft.adapt(model, method, key=KEY))
    other = peft.get_peft_model(torch_model, config)
    parameters = dict(other.named_parameters())
    trainable = jpeft.partition(adapted)[1]
    for path, value in trainable.items():
        conv = base["conv/kernel"].shape if path.startswith("conv/adapters") and path[-1] in "AB" else None
        parameters[_find(parameters, path)].data = to_torch(path, value, conv)
    return adapted, other


def _find(parameters, path):
    wanted = torch_name(path)
    module, _, leaf = wanted.partition(".")
    forms = (wanted, f"{module}.base_layer.{leaf}", f"{module}.modules_to_save.default.{leaf}")
    found = [n for n in parameters if any(n == f"base_model.model.{f}" for f in forms) and parameters[n].requires_grad]
    assert len(found) == 1, (path, found, list(parameters))
    return found[0]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "rank pattern": {"rank_pattern": {"up": 5, "down": 1}},
    "alpha pattern": {"alpha_pattern": {"down": 2.0}},
    "both patterns and rslora": {"rank_pattern": {"up": 5}, "alpha_pattern": {"up": 2.0, "emb": 1}, "rslora": True},
    "first key of a pattern": {"rank_pattern": {"(up|down)": 3, "up": 5}},
    "a pattern as a regular expression": {"rank_pattern": {"^up": 1, "d.*n": 4}},
    "biases of the adapted": {"bias": "lora_only", "targets": ["up", "emb"]},
    "all biases": {"bias": "all", "targets": ["up"]},
    "excluded": {"exclude": ["up"]},
    "a module saved": {"targets": ["up", "emb"], "modules_to_save": ["down"]},
    "a norm and a module saved, all biases": {
        "targets": ["up"],
        "modules_to_save": ["down", "norm"],
        "bias": "lora_only",
    },
}
PEFT_NAMES: dict[str, str] = {"targets": "target_modules", "rslora": "use_rslora", "exclude": "exclude_modules"}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_gradients_are_those_of_peft(options):
    options = {"targets": ["emb", "up", "down"], **options}
    theirs: Any = {PEFT_NAMES.get(key, key): value for key, value in options.items()}
    config = peft.LoraConfig(r=2, lora_alpha=3, **theirs)
    adapted, other = both(Net(nnx.Rngs(0)), TorchNet(), jpeft.LoRA(rank=2, alpha=3, **options), config)
    ids = np.array([[1, 0, 4, 6], [3, 3, 2, 5]])
    assert_same(adapted, other, ids, torch.tensor(ids))


def assert_same(adapted, other, x, torch_x, back=lambda y: y, kernel_shape=None):
    graphdef, trainable, frozen = jpeft.partition(adapted)
    expected = other(torch_x)
    weights = np.random.default_rng(3).standard_normal(adapted(x).shape).astype(np.float32)
    assert subjects.error(adapted(x), back(expected.detach().numpy())) < TORCH
    other.zero_grad()
    (expected * torch.tensor(np.moveaxis(weights, -1, 1) if kernel_shape else weights)).sum().backward()
    gradients = jax.grad(lambda t: (weights * jpeft.combine(graphdef, t, frozen)(x)).sum())(trainable)
    parameters = dict(other.named_parameters())
    for path, gradient in gradients.items():
        conv = kernel_shape if path[-1] in "AB" else None
        assert subjects.error(to_torch(path, gradient, conv), parameters[_find(parameters, path)].grad) < 2 * TORCH, (
            path
        )
    trained = {name for name, value in parameters.items() if value.requires_grad}
    assert trained == {_find(parameters, path) for path in trainable}


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_convolution_is_that_of_peft(bias):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv"], bias=bias)
    model = ConvNet(nnx.Rngs(0))
    adapted, other = both(model, TorchConvNet(), jpeft.LoRA(rank=2, alpha=3, targets=["conv"], bias=bias), config)
    x = np.random.default_rng(0).standard_normal((2, 7, 6, 2)).astype(np.float32)
    assert_same(
        adapted,
        other,
        x,
        torch.tensor(np.moveaxis(x, -1, 1)),
        back=lambda y: np.moveaxis(y, 1, -1),
        kernel_shape=model.conv.kernel.shape,
    )


# Starts.


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
    assert subjects.error((a.astype(np.float64) @ b).T, (their_b @ their_a).detach()) < TORCH


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
    assert subjects.error(model(x), expected.detach()) < TORCH
    gradients = jax.grad(lambda t: (jpeft.combine(graphdef, t, frozen)(x) ** 2).sum())(trainable)
    assert subjects.error(gradients["adapters/lora/A"].T, a.grad) < 2 * TORCH
    assert subjects.error(gradients["adapters/lora/B"].T, b.grad) < 2 * TORCH


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


# Padding.


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_padding_contributes_nothing_and_is_not_trained(init):
    base = subjects.Stacked(6, 3, nnx.Rngs(0))
    method = jpeft.LoRA(rank=2, alpha=3, targets=["up"], init=init, rank_pattern={"blocks.1.up": 5}, layers=[1, 2])
    model = subjects.fill(jpeft.adapt(base, method, key=KEY))
    graphdef, trainable, frozen = jpeft.partition(model)
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    run = jax.jit(lambda t: jpeft.combine(graphdef, t, frozen)(x))
    gradients = jax.grad(lambda t: (run(t) ** 2).sum())(trainable)
    a, b = (f"blocks/up/adapters/lora/{leaf}" for leaf in "AB")
    used = np.arange(5) < np.array([0, 5, 2])[:, None]
    for path, mask in ((a, used[:, None, :]), (b, used[:, :, None])):
        assert (np.asarray(gradients[path])[~np.broadcast_to(mask, trainable[path].shape)] == 0).all()
        assert (np.asarray(gradients[path])[np.broadcast_to(mask, trainable[path].shape)] != 0).any()
    emptied = {a: trainable[a] * used[:, None, :], b: trainable[b] * used[:, :, None]}
    np.testing.assert_array_equal(run(emptied), run(trainable))
    merged = subjects.leaves(jpeft.merge(model))["blocks/up/kernel"]
    np.testing.assert_array_equal(merged[0], subjects.leaves(base)["blocks/up/kernel"][0])
    np.testing.assert_array_equal(
        merged, subjects.leaves(jpeft.merge(jpeft.combine(graphdef, emptied, frozen)))["blocks/up/kernel"]
    )


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


# Dropout.


class Echo(nnx.Module):
    """A stack whose layers all see the input; with factors of one and a kernel of zero, each gives back its mask."""

    def __init__(self, d, num_layers, remat="none", unroll=False):
        self.layers = stack(lambda r: nnx.Linear(d, d, use_bias=False, rngs=r), num_layers, nnx.Rngs(0))
        self.layers.kernel[...] *= 0.0
        self.remat, self.unroll = remat, unroll

    def __call__(self, x):
        body = lambda layer, x, _: (x, layer(x))  # noqa: E731
        return scan(self.layers, body, x, remat_policy=self.remat, unroll=self.unroll)[1]


class EchoByVmap(Echo):
    """The same, run by jax.vmap."""

    def __init__(self, d, num_layers):
        self.layers = nnx.vmap(lambda r: nnx.Linear(d, d, use_bias=False, rngs=r))(nnx.Rngs(0).split(num_layers))
        self.layers.kernel[...] *= 0.0

    def __call__(self, x):
        return jax.vmap(lambda layer: layer(x))(self.layers)


def echo(model, rate, names=("lora",)):
    d = model.layers.kernel.shape[-1]
    for name in names:
        model = jpeft.adapt(model, jpeft.LoRA(rank=d, alpha=d, targets=["layers"], dropout=rate), key=KEY, name=name)
    graphdef, trainable, frozen = jpeft.partition(model)
    one = {p: jnp.broadcast_to(jnp.eye(d), v.shape) for p, v in trainable.items()}
    return jpeft.combine(graphdef, one, frozen)


def dropped(model, x, key):
    with jpeft.dropout_key(key):
        return np.asarray(model(x))


def test_dropout_is_unbiased_and_scales_what_it_keeps():
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (50, 40)).astype(np.float32))
    y = dropped(echo(Echo(40, 4), 0.3), x, jax.random.key(5))
    kept = y != 0
    scaled = np.broadcast_to(np.asarray(x, np.float64) / 0.7, y.shape)
    np.testing.assert_allclose(y[kept], scaled[kept], rtol=1e-6)
    assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.3 * 0.7 / kept.size)
    assert abs((y / np.asarray(x)).mean() - 1) < 0.02


def test_every_layer_draws_its_own_mask_however_the_stack_runs():
    x = jnp.ones((5, 20))
    key = jax.random.key(5)
    masks = dropped(echo(Echo(20, 3), 0.5), x, key)
    assert len({layer.tobytes() for layer in masks}) == 3
    for policy in REMAT_POLICIES:
        np.testing.assert_array_equal(dropped(echo(Echo(20, 3, remat=policy), 0.5), x, key), masks)
    np.testing.assert_array_equal(dropped(echo(Echo(20, 3, unroll=True), 0.5), x, key), masks)
    np.testing.assert_array_equal(dropped(echo(EchoByVmap(20, 3), 0.5), x, key), masks)
    jitted = jax.jit(lambda model, x, key: dropped_traced(model, x, key))
    np.testing.assert_array_equal(jitted(echo(Echo(20, 3), 0.5), x, key), masks)


def dropped_traced(model, x, key):
    with jpeft.dropout_key(key):
        return model(x)


def test_the_key_decides_the_mask():
    model, x = echo(Echo(20, 3), 0.5), jnp.ones((5, 20))
    first = dropped(model, x, jax.random.key(5))
    np.testing.assert_array_equal(dropped(model, x, jax.random.key(5)), first)
    assert (dropped(model, x, jax.random.key(6)) != first).any()
    np.testing.assert_array_equal(dropped(model, x, jax.random.PRNGKey(5)), first)
    np.testing.assert_array_equal(model(x), np.ones((3, 5, 20)))
    np.testing.assert_array_equal(dropped(echo(Echo(20, 3), 0.0), x, jax.random.key(5)), np.ones((3, 5, 20)))


def test_two_adapters_on_one_module_draw_masks_of_their_own():
    both = dropped(echo(Echo(20, 1), 0.5, ("lora", "second")), jnp.ones((5, 20)), jax.random.key(5))
    assert {0.0, 2.0, 4.0} == set(np.unique(both))


def test_a_layer_that_is_not_known_is_an_error():
    model, x = echo(Echo(4, 4), 0.5), jnp.ones((2, 4))

    def first_layer(model):
        layer = nnx.clone(model.layers)
        nnx.update(layer, jax.tree.map(lambda leaf: leaf[0], nnx.state(layer)))
        return layer

    first_layer(model)(x)  # without a key nothing depends on the layer
    with jpeft.dropout_key(KEY), pytest.raises(ValueError, match=r"layers differs .* where its layer is not known"):
        first_layer(model)(x)
    ranked = jpeft.adapt(
        Echo(4, 4), jpeft.LoRA(rank=2, targets=["layers"], rank_pattern={r"layers\.1": 1}, bias="lora_only"), key=KEY
    )
    with pytest.raises(ValueError, match=r"layers differs .* where its layer is not known"):
        first_layer(ranked)(x)


def test_integers_are_dropped_too():
    model = jpeft.adapt(nnx.Linear(40, 40, rngs=nnx.Rngs(0)), jpeft.LoRA(rank=4, targets=".*", dropout=0.5), key=KEY)
    model, x = subjects.fill(model), np.ones((3, 40), np.int32)
    assert (dropped(model, x, KEY) != np.asarray(model(x))).any()


def test_ids_of_an_embedding_are_not_dropped():
    model = jpeft.adapt(nnx.Embed(9, 4, rngs=nnx.Rngs(0)), jpeft.LoRA(rank=4, targets=".*", dropout=0.5), key=KEY)
    model, ids = subjects.fill(model), np.arange(9)
    np.testing.assert_array_equal(dropped(model, ids, KEY), model(ids))


# Fields.

WRONG = [
    ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
    ({"rank": -1}, "got -1"),
    ({"rank": 2.0}, "got 2.0"),
    ({"rank": True}, "got True"),
    ({"rank": None}, "got None"),
    ({"rank": "8"}, "got '8'"),
    ({"rank_pattern": {"a": 0}}, "rank must be a whole number of at least 1, got 0"),
    ({"alpha": 0}, "alpha must be a positive number .*, got 0"),
    ({"alpha": -4}, "got -4"),
    ({"alpha": float("nan")}, "got nan"),
    ({"alpha": float("inf")}, "got inf"),
    ({"alpha": "16"}, "got '16'"),
    ({"alpha": True}, "got True"),
    ({"alpha_pattern": {"a": 0}}, "alpha must be a positive number .*, got 0"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, "got -0.1"),
    ({"dropout": float("nan")}, "got nan"),
    ({"init": "pisa"}, "init must be one of default, gaussian, orthogonal, pissa, olora; got 'pisa'"),
    ({"init": True}, "got True"),
    ({"bias": "some"}, "bias must be one of none, lora_only, all; got 'some'"),
]


@pytest.mark.parametrize("fields, message", WRONG, ids=lambda value: str(value))
def test_a_wrong_field_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        jpeft.LoRA(targets=["a"], **fields)


def test_a_method_is_a_value():
    """Equal options are equal methods of one hash, through copies and pickles; patterns count in their order."""
    import copy
    import pickle

    options = dict(targets=["a"], rank_pattern={"a": 1, "b": 2}, alpha_pattern={"a": 3}, exclude=["c"], layers=[2, 1])  # noqa: C408
    method = jpeft.LoRA(**options)
    for same in (jpeft.LoRA(**options), copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert same == method
        assert hash(same) == hash(method)
    assert jpeft.LoRA(**{**options, "rank_pattern": {"b": 2, "a": 1}}) != method
    assert method.layers == (1, 2)
    assert jpeft.LoRA(targets=["a"], exclude=None) == jpeft.LoRA(targets=["a"])
    with pytest.raises(TypeError, match=r"use dataclasses\.replace"):
        method.rank_pattern["a"] = 5
