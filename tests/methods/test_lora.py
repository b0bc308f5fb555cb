# SPDX-License-Identifier: Apache-2.0
"""LoRA against the real peft, its starts, its dropout, and its dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import subjects
import torch
from flax import nnx

import jpeft

KEY = jax.random.key(0)


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
    assert subjects.error(adapted(x), back(expected.detach().numpy())) < subjects.TORCH
    other.zero_grad()
    (expected * torch.tensor(np.moveaxis(weights, -1, 1) if kernel_shape else weights)).sum().backward()
    gradients = jax.grad(lambda t: (weights * jpeft.combine(graphdef, t, frozen)(x)).sum())(trainable)
    parameters = dict(other.named_parameters())
    for path, gradient in gradients.items():
        conv = kernel_shape if path[-1] in "AB" else None
        theirs = parameters[_find(parameters, path)].grad
        assert subjects.error(to_torch(path, gradient, conv), theirs) < 2 * subjects.TORCH, path
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
@pytest.mark.untyped
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
