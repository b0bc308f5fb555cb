# SPDX-License-Identifier: Apache-2.0
"""The same adapted model twice, in jpeft and in torch, with the same numbers: outputs and gradients side by side."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import peft
import peft_oracle as oracle
import subjects
import torch
from flax import nnx

import jpeft
from jpeft.io._names import names_of
from jpeft.io._slots import transposed

#: float32 against float32 through three layers and their gradients, of norms.
THROUGH = 1e-5

#: Name of a torch parameter -> its value.
Values = dict[str, np.ndarray]
ValuesOf = Callable[[Any, Mapping[str, Any]], Values]


def saved_values(model: Any, flat: Mapping[str, Any]) -> Values:
    """Of a trainable tree, the copies of base leaves under the names that these have in transformers, each once."""
    names = names_of(model)
    heads = {head for tied in names.tied.values() for head in tied}
    own = {path.replace(f"/adapters/{path.split('/adapters/')[1].split('/')[0]}/saved", ""): value
           for path, value in flat.items() if "/saved/" in path}  # fmt: skip
    return {
        key: transposed(np.asarray(own[place.path])[place.index], place.axes)
        for key, place in names.tensors.items()
        if place.path in own and key.rpartition(".")[0] not in heads
    }


def per_layer(model: Any, path: str, leaf: Any) -> Values:
    """The slices of an adapter's leaf at a module, by the module's name in transformers."""
    names = model.module_names()[path]
    leaf = np.asarray(leaf)
    return dict(zip(names, leaf if leaf.ndim > 1 or len(names) > 1 else leaf[None], strict=True))


def get_peft(family: str, config: Any) -> Any:
    """peft's model. It warns of norms, which are no layers that it knows, and of tied heads, which it then ties."""
    base = oracle.torch_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config).eval()


def plain_name(name: str) -> str:
    """The name in transformers of a parameter that peft has wrapped."""
    name = name.removeprefix("base_model.model.")
    for infix in ("ln_tuning_layers.default.", "modules_to_save.default."):
        name = name.replace(infix, "")
    return name


def trained_in(family: str, which: Callable[[str], bool]) -> Any:
    """transformers' own model, of which the parameters whose name says so have gradients."""
    model = oracle.torch_model(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = which(name)
    return model


def is_head(name: str) -> bool:
    """Whether transformers' parameter is one of a classification's output layer."""
    return name.startswith(("classifier.", "score.", "qa_outputs."))


def active_values(model: Any, flat: Mapping[str, Any]) -> Values:
    """`saved_values`, without the layers that a copy does not stand in for."""
    acting = {
        f"{adapter.site.path}/{leaf}": layers
        for _, module in nnx.iter_modules(model)
        for adapter in getattr(module, "adapters", {}).values()
        for leaf, layers in adapter.saved_layers.items()
    }
    places = names_of(model).tensors
    found = saved_values(model, flat)
    return {k: v for k, v in found.items() if not places[k].index or acting[places[k].path][places[k].index[0]]}


def ia3_values(shapes: Mapping[str, Any], model: Any, flat: Mapping[str, Any]) -> Values:
    """(IA)³'s vectors in the shapes of peft's parameters, which are given by `plain_name`, and the copies."""
    found = saved_values(model, flat)
    for path, leaf in flat.items():
        if path.endswith("/ia3/scale"):
            layers = per_layer(model, path.split("/adapters/")[0], leaf)
            named = {f"{name}.ia3_l.default": value for name, value in layers.items()}
            found |= {name: value.reshape(shapes[name]) for name, value in named.items() if name in shapes}
    return found


def token_values(table: str, model: Any, flat: Mapping[str, Any]) -> Values:
    """The trained rows of the table that transformers calls so, and the copies."""
    (rows,) = (np.asarray(value) for path, value in flat.items() if path.endswith("/trainable_tokens/rows"))
    return saved_values(model, flat) | {f"{table}.trainable_tokens_delta.default": rows}


def give(model: Any, torch_model: Any, values: ValuesOf) -> dict[str, torch.nn.Parameter]:
    """Writes the trained leaves of `model` into the twin's trained parameters, and gives these by `plain_name`."""
    twins = {plain_name(name): p for name, p in torch_model.named_parameters() if p.requires_grad}
    numbers = values(model, jpeft.partition(model)[1])
    assert numbers.keys() == twins.keys()
    for name, value in numbers.items():
        assert twins[name].shape == value.shape, name
        twins[name].data = torch.tensor(value)
    return twins


def assert_same(family: str, method: Any, torch_model: Any, values: ValuesOf) -> None:
    """Outputs at tokens and all gradients, of the filled adapter in both; and the same leaves trained.

    Args:
      family: of `peft_oracle`.
      method: jpeft's.
      torch_model: the twin, whose parameters with a gradient are those that are trained.
      values: (jpeft's model, a trainable tree or its gradients) -> torch's parameters by `plain_name`.
    """
    model = subjects.fill(jpeft.adapt(oracle.jax_model(family), method, key=jax.random.key(0)))
    graphdef, trainable, frozen = jpeft.partition(model)
    twins = give(model, torch_model, values)
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
