# SPDX-License-Identifier: Apache-2.0
"""Optimizers against torch's and transformers', schedules against transformers', and groups of leaves."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers.optimization as theirs

from jpeft.train import config
from jpeft.train.optim import make_optimizer, schedule
from jpeft.train.sections.optimizer import Group

SHAPES = {
    "layers/q/adapters/lora/A": (3, 5, 2),
    "layers/q/adapters/lora/B": (3, 2, 7),
    "layers/q/adapters/lora/saved/bias": (3, 7),
    "adapters/prompt_tuning/prompt": (4, 6),
    "head/adapters/lora/saved/kernel": (6, 2),
}
#: How many leading axes count layers.
STACKED = {path: int(path.startswith("layers")) for path in SHAPES}
TORCH = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.95)),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.8),
    "adafactor": lambda groups: theirs.Adafactor(groups, scale_parameter=False, relative_step=False),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.8, 0.95)}, "sgd": {"momentum": 0.8}, "adafactor": {},
    "lion": {"betas": (0.8, 0.95)}, "muon": {"betas": (0.8, 0.95)},
}  # fmt: skip


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}


def steps(options, count, total=5):
    """The leaves after `count` updates by the gradients `drawn(1)`, `drawn(2)`, ..."""
    tx = make_optimizer(options, total)
    leaves: Any = {path: jnp.asarray(value) for path, value in drawn(0).items()}
    state = tx.init(leaves)
    update = jax.jit(tx.update)
    for index in range(count):
        changes, state = update({p: jnp.asarray(g) for p, g in drawn(index + 1).items()}, state, leaves)
        leaves = optax.apply_updates(leaves, changes)
    return {path: np.asarray(value) for path, value in leaves.items()}


def layers(path, value):
    """The tensors that torch would have: one a layer."""
    return list(value) if STACKED[path] else [value]


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_five_updates_are_torchs(name):
    """Of stacked layers each one by itself; biases without decay, and groups at a rate and decay of their own."""
    groups = (Group("**/B", lr=3e-2), Group("head/**", lr=2e-3, weight_decay=0.3), Group("**/q/**", weight_decay=0.2))
    options = config.Optimizer(
        name=name, lr=1e-2, schedule="constant", weight_decay=0.1, clip=None, groups=groups, **OPTIONS[name]
    )
    rates = dict.fromkeys(SHAPES, 1e-2) | {"layers/q/adapters/lora/B": 3e-2, "head/adapters/lora/saved/kernel": 2e-3}
    decays = {path: 0.2 if "/q/" in path else 0.1 for path in SHAPES}
    decays |= {"layers/q/adapters/lora/B": 0.1, "head/adapters/lora/saved/kernel": 0.3}
    parameters = {
        path: [torch.nn.Parameter(torch.tensor(part)) for part in layers(path, value)]
        for path, value in drawn(0).items()
    }
    optimizer = TORCH[name]([
        {"params": parameters[path], "lr": rates[path], "weight_decay": 0.0 if name == "sgd" else decays[path]}
        for path in SHAPES
    ])  # fmt: skip
    for index in range(5):
        for path, slope in drawn(index + 1).items():
            for parameter, part in zip(parameters[path], layers(path, slope), strict=True):
                parameter.grad = torch.tensor(part)
                if name == "sgd":  # torch's decays through the gradient; here it is AdamW's, apart from it
                    parameter.data *= 1 - rates[path] * decays[path]
        optimizer.step()
    for path, ours in steps(options, 5).items():
        for part, parameter in zip(layers(path, ours), parameters[path], strict=True):
            np.testing.assert_allclose(part, parameter.detach().numpy(), atol=3e-6, err_msg=path)


def test_lion_is_the_sign_of_two_averages():
    """Chen et al. 2023, algorithm 2, in float64."""
    options = config.Optimizer(
        name="lion", lr=1e-2, schedule="constant", weight_decay=0.1, clip=None, betas=(0.8, 0.95)
    )
    ours = steps(options, 5)
    for path, value in drawn(0).items():
        leaf, average = value.astype(np.float64), np.zeros(value.shape)
        decay = 0.0 if path.endswith("bias") else 0.1
        for index in range(5):
            slope = drawn(index + 1)[path].astype(np.float64)
            leaf = leaf - 1e-2 * (np.sign(0.8 * average + 0.2 * slope) + decay * leaf)
            average = 0.95 * average + 0.05 * slope
        np.testing.assert_allclose(ours[path], leaf, atol=1e-6, err_msg=path)


def test_muon_is_torchs_on_matrices_and_adamw_on_the_rest():
    """The first update, before averages differ in how they start; torch iterates in bfloat16."""
    options = config.Optimizer(name="muon", lr=1e-2, schedule="constant", weight_decay=0.1, clip=None)
    ours, start, slopes = steps(options, 1), drawn(0), drawn(1)
    for path in SHAPES:
        matrix = path.rpartition("/")[2] in ("A", "B", "kernel")
        decay = 0.0 if path.endswith("bias") else 0.1
        for part, value, slope in zip(*(layers(path, tree[path]) for tree in (ours, start, slopes)), strict=True):
            parameter = torch.nn.Parameter(torch.tensor(value))
            kind = torch.optim.Muon if matrix else torch.optim.AdamW
            more: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw"} if matrix else {}
            optimizer = kind([parameter], lr=1e-2, weight_decay=decay, **more)
            parameter.grad = torch.tensor(slope)
            optimizer.step()
            moved = parameter.detach().numpy() - value
            np.testing.assert_allclose(part - value, moved, atol=3e-2 * np.abs(moved).max(), err_msg=path)


def test_muons_later_updates_are_nearly_orthogonal():
    options = config.Optimizer(name="muon", lr=1e-2, schedule="constant", clip=None)
    before, after = steps(options, 3), steps(options, 4)
    for change in after["layers/q/adapters/lora/A"] - before["layers/q/adapters/lora/A"]:
        sizes = np.linalg.svd(change, compute_uv=False) / (1e-2 * 0.2 * math.sqrt(5))
        assert (sizes > 0.6).all()
        assert (sizes < 1.3).all()


# --------------------------------------------------------------------------------------------------------- schedules


def _transformers(name, warmup, optimizer):
    if name == "wsd":
        return theirs.get_wsd_schedule(optimizer, warmup, 10, 40, decay_type="linear", min_lr_ratio=0.1)
    if name == "polynomial":
        return theirs.get_polynomial_decay_schedule_with_warmup(optimizer, warmup, 40, lr_end=3e-4, power=3.0)
    return theirs.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, 40, min_lr=3e-4)


@pytest.mark.parametrize("warmup, updates", [(0.0, 0), (0.13, 6), (7, 7)])
@pytest.mark.parametrize("name, options", [("wsd", {"decay": 0.25}), ("polynomial", {"power": 3.0}), ("cosine", {})])
def test_the_learning_rate_is_transformers_own(name, options, warmup, updates):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    expected = _transformers(name, updates, optimizer)
    ours = schedule(config.Optimizer(lr=3e-3, schedule=name, warmup=warmup, min_lr=3e-4, **options), 40)
    for update in range(40):
        rate = expected.get_last_lr()[0]
        if name == "wsd" and update < updates:
            rate = 3e-3 * update / updates  # theirs rises from min_lr, and of the other schedules from 0
        np.testing.assert_allclose(ours(update), rate, rtol=2e-6, err_msg=f"update {update}")
        optimizer.step()
        expected.step()


def test_linear_falls_to_its_least():
    ours = schedule(config.Optimizer(lr=1.0, min_lr=0.25), 4)
    np.testing.assert_allclose(np.array([ours(i) for i in range(5)]), [1, 0.8125, 0.625, 0.4375, 0.25])


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "options, said",
    [
        ({"groups": (Group("**/qurey/**", lr=1.0),)}, r"optimizer.groups.0.match: .*qurey.* selects no leaf; nearest"),
        ({"name": "muon"}, "muon is for matrices, and none of the 1 trained leaves is one"),
    ],
)
def test_what_finds_no_leaf_is_an_error(options, said):
    tx = make_optimizer(config.Optimizer(**options), 5)
    with pytest.raises(ValueError, match=said):
        tx.init({"layers/q/adapters/ia3/scale": jnp.ones((2, 4))})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"warmup": 50}, "optimizer.warmup is 50 updates, and this run makes 40"),
        ({"schedule": "wsd", "warmup": 30, "decay": 20}, "take 30 and 20 updates; this run makes 40"),
    ],
)
def test_a_schedule_that_does_not_fit_is_an_error(options, said):
    with pytest.raises(ValueError, match=said):
        make_optimizer(config.Optimizer(**options), 40)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"momentum": 0.9}, "optimizer.momentum is for optimizer.name=sgd or muon, got adamw"),
        ({"name": "sgd", "betas": (0.9, 0.99)}, "optimizer.betas is for optimizer.name=adamw or lion or muon, got sgd"),
        ({"power": 2.0}, "optimizer.power is for optimizer.schedule=polynomial, got linear"),
        ({"schedule": "constant", "min_lr": 0.0}, "optimizer.min_lr is for"),
        ({"min_lr": 1.0}, "optimizer.min_lr=1.0 is above optimizer.lr=0.0001"),
        ({"warmup": 2.5}, "optimizer.warmup is a share in [0, 1) or a whole number of updates, got 2.5"),
        ({"warmup": -1}, "optimizer.warmup is a share"),
        ({"groups": (Group("**"),)}, "optimizer.groups.0 changes nothing"),
        ({"groups": (Group("**", lr=-1.0),)}, "optimizer.groups.0.lr must be positive, got -1.0"),
    ],
)
def test_options_without_effect_are_refused(options, said):
    (line,) = config.Optimizer(**options).wrong()
    assert said in line
