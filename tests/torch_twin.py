# SPDX-License-Identifier: Apache-2.0
"""The same adapted model twice, in jpeft and in torch, with the same numbers: outputs and gradients side by side."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import peft
import peft_oracle as oracle
import subjects
import torch

import jpeft
from jpeft.io._names import names_of
from jpeft.io._slots import transposed

#: float32 against float32 through three layers and their gradients, of norms.
THROUGH = 1e-5

#: Name of a torch parameter -> its value.
Values = dict[str, np.ndarray]


def saved_values(model: Any, flat: Mapping[str, Any]) -> Values:
    """Of a trainable tree, the copies of base leaves under the names that these have in transformers."""
    own = {path.replace(f"/adapters/{path.split('/adapters/')[1].split('/')[0]}/saved", ""): value
           for path, value in flat.items() if "/saved/" in path}  # fmt: skip
    return {
        key: transposed(np.asarray(own[place.path])[place.index], place.axes)
        for key, place in names_of(model).tensors.items()
        if place.path in own
    }


def per_layer(model: Any, path: str, leaf: Any) -> Values:
    """The slices of an adapter's leaf at a module, by the module's name in transformers."""
    names = model.module_names()[path]
    leaf = np.asarray(leaf)
    return dict(zip(names, leaf if leaf.ndim > 1 or len(names) > 1 else leaf[None], strict=True))


def get_peft(family: str, config: Any) -> Any:
    """peft's model, with its adapter in float32."""
    with oracle.quiet():
        return peft.get_peft_model(oracle.torch_model(family), config).eval()


def plain_name(name: str) -> str:
    """The name in transformers of a parameter that peft has wrapped."""
    name = name.removeprefix("base_model.model.")
    for infix in ("ln_tuning_layers.default.", "modules_to_save.default."):
        name = name.replace(infix, "")
    return name


def assert_same(family: str, method: Any, torch_model: Any, values: Callable[[Any, Mapping[str, Any]], Values]) -> None:
    """Outputs at tokens and all gradients, of the filled adapter in both; and the same leaves trained.

    Args:
      family: of `peft_oracle`.
      method: jpeft's.
      torch_model: the twin, whose parameters with a gradient are those that are trained.
      values: (jpeft's model, a trainable tree or its gradients) -> torch's parameters by `plain_name`.
    """
    model = subjects.fill(jpeft.adapt(oracle.jax_model(family), method, key=jax.random.key(0)))
    graphdef, trainable, frozen = jpeft.partition(model)
    twins = {plain_name(name): p for name, p in torch_model.named_parameters() if p.requires_grad}
    numbers = values(model, trainable)
    assert numbers.keys() == twins.keys()
    for name, value in numbers.items():
        assert twins[name].shape == value.shape, name
        twins[name].data = torch.tensor(value)
    expected = oracle.torch_outputs(torch_model, oracle.FAMILIES[family][1])

    def loss(trainable: Any) -> Any:
        out = jpeft.combine(graphdef, trainable, frozen)(oracle.IDS, oracle.MASK)
        return (out * oracle.cotangent(out)).sum(), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    assert subjects.error(oracle.seen(np.asarray(out)), oracle.seen(expected.detach().numpy())) < THROUGH
    (expected * torch.tensor(oracle.cotangent(expected))).sum().backward()
    got = values(model, gradients)
    theirs = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in twins.items()}
    size = np.linalg.norm([np.linalg.norm(value) for value in theirs.values()])
    assert size > 0
    for name, value in theirs.items():
        assert np.linalg.norm(got[name] - value) < THROUGH * size, name
