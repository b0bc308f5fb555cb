# SPDX-License-Identifier: Apache-2.0
"""Two oracles of methods that change a kernel, on `subjects`' blocks: a NumPy formula in float64, and the real peft."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_oracle
import subjects
import torch
from flax import nnx

import jpeft

KEY = jax.random.key(0)
D, LAYERS = 6, 3
X = np.random.default_rng(7).standard_normal((2, 5, D))

#: The compiler's quickest way: every program here runs once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

#: Leaf of the adapter -> (what peft calls it, the layout of one into that of the other and back).
Names = Mapping[str, tuple[str, Callable[[Any], Any]]]


def transposed(value: Any) -> Any:
    return value.T


def same(value: Any) -> Any:
    return value


#: By method.
NAMES: dict[str, Names] = {
    "loha": {
        "A1": ("hada_w1_b.default", transposed),
        "B1": ("hada_w1_a.default", transposed),
        "A2": ("hada_w2_b.default", transposed),
        "B2": ("hada_w2_a.default", transposed),
    },
    "lokr": {
        "w1": ("lokr_w1.default", transposed),
        "w1_in": ("lokr_w1_b.default", transposed),
        "w1_out": ("lokr_w1_a.default", transposed),
        "w2": ("lokr_w2.default", transposed),
        "w2_in": ("lokr_w2_b.default", transposed),
        "w2_out": ("lokr_w2_a.default", transposed),
    },
    "vera": {"d": ("vera_lambda_d.default", same), "b": ("vera_lambda_b.default", same)},
    "oft": {"Q": ("oft_R.default.weight", same)},
    "fourierft": {"c": ("fourierft_spectrum.default", same)},
}


def stacked() -> Any:
    """Blocks in one scanned stack."""
    return subjects.Stacked(D, LAYERS, nnx.Rngs(0))


def listed() -> Any:
    """Blocks in an nnx.List."""
    return subjects.ListOfLayers(D, LAYERS, nnx.Rngs(0))


class TorchBlock(torch.nn.Module):
    """`subjects.Block`."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(D, 2 * D)
        self.down = torch.nn.Linear(2 * D, D)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class TorchBlocks(torch.nn.Module):
    """`subjects.ListOfLayers`."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([TorchBlock() for _ in range(LAYERS)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def loss64(out: Any) -> Any:
    """A sum in which every output has a weight of its own, of NumPy or JAX."""
    return (out * np.random.default_rng(3).standard_normal(out.shape)).sum()


def against_numpy(make: Callable[[], Any], method: Any, change: Callable[..., Any], **filled: Any) -> None:
    """Outputs and the gradient of every trained leaf, in float64.

    Args:
      make: the base.
      method: what it is adapted with.
      change: (the module's leaves in one layer, its kernel, its name) -> the kernel with the adapter in it.
      filled: as of `subjects.fill`.
    """
    with jax.enable_x64(True):
        model = subjects.in_float64(subjects.fill(jpeft.adapt(make(), method, key=KEY), **filled))
        graphdef, trainable, frozen = jpeft.partition(model)

        def loss(trainable: Any) -> Any:
            out = jpeft.combine(graphdef, trainable, frozen)(jnp.asarray(X))
            return loss64(out), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(trainable)
    fixed, kind = subjects.as64(frozen), method.kind

    def run(flat: Any) -> Any:
        return _blocks64({**fixed, **flat}, kind, change)

    flat = subjects.as64(trainable)
    assert subjects.error(out, run(flat)) < subjects.FLOAT64
    for path, gradient in subjects.complex_step(lambda flat: loss64(run(flat)), flat).items():
        assert subjects.error(gradients[path], gradient) < 10 * subjects.FLOAT64, path


def _blocks64(flat: Mapping[str, Any], kind: str, change: Callable[..., Any]) -> Any:
    def project(name: str, i: int, x: Any) -> Any:
        path, cut = (f"blocks/{name}/", i) if f"blocks/{name}/kernel" in flat else (f"blocks/{i}/{name}/", ...)
        own = {key.removeprefix(path): value[cut] for key, value in flat.items() if key.startswith(path)}
        at = f"adapters/{kind}/"
        leaves = {key.removeprefix(at): value for key, value in own.items() if key.startswith(at)}
        shared = {key.removeprefix(at): value for key, value in flat.items() if key.startswith(at)}
        kernel = change({**shared, **leaves}, own["kernel"], f"blocks.{i}.{name}") if leaves else own["kernel"]
        return x @ kernel + own["bias"]

    x = X
    for i in range(LAYERS):
        x = x + project("down", i, np.tanh(project("up", i, x)))
    return x


@dataclasses.dataclass
class Both:
    """An adapted model of jpeft, and peft's with the same numbers; `names` as of `Names`."""

    model: Any
    other: Any
    names: Names

    def parameter(self, name: str, leaf: str) -> Any:
        """peft's parameter for a leaf of the module `name`."""
        return self.other.get_parameter(f"base_model.model.{name}.{self.names[leaf][0]}")

    def leaves(self) -> Any:
        """(path, layer or ..., peft's parameter, the leaf's name) of every trained leaf in every layer."""
        for path, module in nnx.iter_modules(self.model):
            for adapter in getattr(module, "adapters", {}).values():
                if adapter.site.seam == "model":
                    continue
                at = f"{'/'.join(map(str, path))}/adapters/{adapter.site.adapter}/"
                for i, (name, acts) in enumerate(zip(adapter.site.names, adapter.site.active, strict=True)):
                    for leaf in self.names if acts else ():
                        if hasattr(adapter, leaf):
                            yield at + leaf, i if adapter.site.lead else ..., self.parameter(name, leaf), leaf

    def copy(self) -> None:
        """Gives peft the numbers of jpeft; what is longer there is padding."""
        trainable = jpeft.partition(self.model)[1]
        used = set()
        for path, i, parameter, leaf in self.leaves():
            value = self.names[leaf][1](np.asarray(trainable[path][i]))
            cut = tuple(map(slice, parameter.shape))
            parameter.data = torch.tensor(np.ascontiguousarray(value[cut]), dtype=parameter.dtype)
            used.add(parameter)
        adapters = {p for n, p in self.other.named_parameters() if p.requires_grad and "modules_to_save" not in n}
        assert used == adapters

    def theirs(self, trainable: Mapping[str, Any], attribute: str) -> dict[str, np.ndarray]:
        """What peft has (`data`) or its gradients (`grad`) in the shapes of jpeft's leaves, zero in the padding."""
        found = {path: np.zeros(value.shape) for path, value in trainable.items() if "/saved/" not in path}
        for path, i, parameter, leaf in self.leaves():
            value = self.names[leaf][1](getattr(parameter, attribute).numpy())
            found[path][i][tuple(map(slice, value.shape))] = value
        return found

    def assert_gradients(self, gradients: Mapping[str, Any], tolerance: float) -> None:
        """Those of jpeft are peft's, and zero in the padding."""
        for path, value in self.theirs(gradients, "grad").items():
            assert subjects.error(gradients[path], value) < tolerance, path


def against_peft(
    make: Callable[[], Any], method: Any, config: Any, names: Names, prepare: Any = None, **filled: Any
) -> None:
    """Outputs, gradients and merged kernels of the blocks in float64.

    Args:
      config: peft's, but for its targets.
      prepare: changes peft's model before the numbers are copied.
      filled: as of `subjects.fill`.
    """
    config.target_modules = {"up", "down"} if method.targets is None else set(method.targets)
    base = make()
    with jax.enable_x64(True):
        model = subjects.in_float64(subjects.fill(jpeft.adapt(base, method, key=KEY), **filled))
        other = peft.get_peft_model(_torch(subjects.leaves(base)), config)
        if prepare is not None:
            prepare(other)
        both = Both(model, other, names)
        both.copy()
        graphdef, trainable, frozen = jpeft.partition(both.model)

        def loss(trainable: Any) -> Any:
            out = jpeft.combine(graphdef, trainable, frozen)(jnp.asarray(X))
            return loss64(out), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(trainable)
        expected = both.other(torch.tensor(X))
        assert subjects.error(out, expected.detach().numpy()) < subjects.FLOAT64
        loss64_torch(expected).backward()
        both.assert_gradients(gradients, 10 * subjects.FLOAT64)
        merged = subjects.leaves(jpeft.merge(both.model))
    with torch.no_grad():
        for name, weight in both.other.merge_and_unload().named_parameters():
            assert subjects.error(_named(merged, name), weight.numpy()) < subjects.FLOAT64, name


def loss64_torch(out: torch.Tensor) -> torch.Tensor:
    return (out * torch.tensor(np.random.default_rng(3).standard_normal(tuple(out.shape)))).sum()


def _torch(leaves: Mapping[str, Any]) -> TorchBlocks:
    model = TorchBlocks().double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.tensor(_named(leaves, name)))
    return model


def _named(leaves: Mapping[str, Any], name: str) -> Any:
    """The leaf that torch calls `name`, in torch's layout."""
    _, i, module, leaf = name.split(".")
    leaf = {"weight": "kernel", "bias": "bias"}[leaf]
    stacked = leaves.get(f"blocks/{module}/{leaf}")
    return (leaves[f"blocks/{i}/{module}/{leaf}"] if stacked is None else stacked[int(i)]).T


def against_transformers(family: str, method: Any, config: Any, names: Names) -> None:
    """Outputs and gradients of a whole model of transformers, in float32, padded rows among its input."""
    task = peft_oracle.FAMILIES[family][1]
    model = subjects.fill(jpeft.adapt(peft_oracle.jax_model(family), method, key=KEY), scale=0.1)
    both = in_transformers(family, model, config, names)
    graphdef, trainable, frozen = jpeft.partition(both.model)

    def loss(trainable: Any) -> Any:
        out = jpeft.combine(graphdef, trainable, frozen)(peft_oracle.IDS, peft_oracle.MASK)
        return (out * peft_oracle.cotangent(out)).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(trainable)
    expected = peft_oracle.torch_outputs(both.other, task).detach().numpy()
    assert subjects.error(peft_oracle.seen(out), peft_oracle.seen(expected)) < 4 * subjects.TORCH
    peft_oracle.torch_loss(both.other, family).backward()
    both.assert_gradients(gradients, 10 * subjects.TORCH)


def in_transformers(family: str, model: Any, config: Any, names: Names) -> Both:
    """The adapted `model` beside peft's of a whole model of transformers, with the same numbers."""
    with peft_oracle.quiet():
        other = peft.get_peft_model(peft_oracle.torch_model(family), config).eval()
    both = Both(model, other, names)
    both.copy()
    return both
