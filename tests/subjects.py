# SPDX-License-Identifier: Apache-2.0
"""What the tests of the core act on: NNX models that nobody wrote for jpeft, and adapters filled with numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jpeft
from jpeft._stack import scan, stack

#: Relative error (of norms) of one float32 forward pass of a few small layers against float64: some roundings.
FLOAT32 = 1e-6

#: Merged against unmerged in float32: two roundings of the output.
MERGED = 2e-7

#: The same for several layers in float64.
FLOAT64 = 1e-14

#: Against torch in float32, the sums in another order.
TORCH = 2e-6


def fill(model, seed: int = 0, scale: float = 0.3):
    """`model` with noise on every trainable leaf, so that no adapter is at its start."""
    graphdef, trainable, frozen = jpeft.partition(model)
    rng = np.random.default_rng(seed)
    noisy = {p: v + jnp.asarray(scale * rng.standard_normal(v.shape), v.dtype) for p, v in trainable.items()}
    return jpeft.combine(graphdef, noisy, frozen)


def in_float64(model):
    """`model` with all its floating leaves, and what it computes in, in float64; inside of `jax.enable_x64` alone."""
    graphdef, trainable, frozen = jpeft.partition(cast(model, jnp.float64))
    return jpeft.combine(graphdef, {path: value.astype(jnp.float64) for path, value in trainable.items()}, frozen)


def cast(model, dtype):
    """`model` with the floating leaves of its frozen half, and what its modules compute in, in `dtype`."""
    graphdef, trainable, frozen = jpeft.partition(model)
    model = jpeft.combine(graphdef, trainable, {path: _cast(value, dtype) for path, value in frozen.items()})
    for _, module in nnx.iter_modules(model):
        if getattr(module, "dtype", None) is not None:
            module.dtype = dtype  # type: ignore[attr-defined]
    return model


def _cast(value, dtype):
    return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value


def leaves(model) -> dict[str, np.ndarray]:
    """Every leaf of `model`, by path; PRNG keys by their words."""
    _, trainable, frozen = jpeft.partition(model)
    return {path: np.asarray(_plain(value)) for path, value in {**trainable, **frozen}.items()}


def _plain(value):
    return jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value


def as64(flat) -> dict[str, np.ndarray]:
    """The floating leaves of a flat dict in float64."""
    return {p: np.asarray(v, np.float64) for p, v in flat.items() if jnp.issubdtype(v.dtype, jnp.floating)}


def error(got, expected) -> float:
    """Relative error of `got`, in norms over all entries."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{got.shape} against {expected.shape}"
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))


def complex_step(function, flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradient of a real NumPy function of a flat dict, exact to rounding: Im f(x + ih) / h."""
    gradients = {}
    for path, value in flat.items():
        gradient = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            shifted = value.astype(np.complex128)
            shifted[index] += 1e-100j
            gradient[index] = np.imag(function({**flat, path: shifted})) / 1e-100
        gradients[path] = gradient
    return gradients


class Block(nnx.Module):
    """`x + down(tanh(up(x)))`."""

    def __init__(self, d: int, rngs: nnx.Rngs, dtype=jnp.float32):
        self.up = nnx.Linear(d, 2 * d, rngs=rngs, param_dtype=dtype, bias_init=nnx.initializers.normal())
        self.down = nnx.Linear(2 * d, d, rngs=rngs, param_dtype=dtype, bias_init=nnx.initializers.normal())

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class ListOfLayers(nnx.Module):
    """Blocks in an `nnx.List`."""

    def __init__(self, d: int, num_layers: int, rngs: nnx.Rngs, dtype=jnp.float32):
        self.blocks = nnx.List([Block(d, rngs, dtype) for _ in range(num_layers)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class PlainList(ListOfLayers):
    """Blocks in an ordinary Python list that NNX was told is data."""

    def __init__(self, d: int, num_layers: int, rngs: nnx.Rngs):
        self.blocks = nnx.data([Block(d, rngs) for _ in range(num_layers)])


class NumberedDict(nnx.Module):
    """Blocks in a dict with integer keys."""

    def __init__(self, d: int, num_layers: int, rngs: nnx.Rngs):
        self.blocks = nnx.data({i: Block(d, rngs) for i in range(num_layers)})

    def __call__(self, x):
        for i in sorted(self.blocks):
            x = self.blocks[i](x)
        return x


class NoPytree(nnx.Module, pytree=False):
    """A module that is no pytree, with a plain list in it."""

    def __init__(self, d: int, num_layers: int, rngs: nnx.Rngs):
        self.blocks = [Block(d, rngs) for _ in range(num_layers)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Checkpointed(ListOfLayers):
    """Every block under `jax.checkpoint`."""

    def __call__(self, x):
        for block in self.blocks:
            x = jax.checkpoint(lambda block, x: block(x))(block, x)
        return x


class NnxRemat(ListOfLayers):
    """Every block under `nnx.remat`."""

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x


@jax.jit
def _jitted(block, x):
    return block(x)


class InnerJit(ListOfLayers):
    """Every block a `jax.jit` of its own, one traced argument, the next captured."""

    def __call__(self, x):
        for i, block in enumerate(self.blocks):
            x = _jitted(block, x) if i % 2 else jax.jit(lambda x, block=block: block(x))(x)
        return x


class Vmapped(nnx.Module):
    """Blocks stacked by `nnx.vmap`, run by `jax.lax.scan` over the module."""

    def __init__(self, d: int, num_layers: int, rngs: nnx.Rngs):
        self.blocks = nnx.vmap(lambda r: Block(d, r))(rngs.split(num_layers))

    def __call__(self, x):
        return jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)[0]


class NnxScan(Vmapped):
    """As `Vmapped`, run by `nnx.scan`."""

    def __call__(self, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class Stacked(nnx.Module):
    """Blocks stacked and scanned by jpeft."""

    def __init__(self, d: int, num_layers: int, rngs: nnx.Rngs, remat: str = "none", unroll: bool = False):
        self.blocks = stack(lambda r: Block(d, r), num_layers, rngs)
        self.remat, self.unroll = remat, unroll

    def __call__(self, x):
        return scan(self.blocks, _run_block, x, remat_policy=self.remat, unroll=self.unroll)[0]


def _run_block(block, x, _):
    return block(x), None


def mlp64(flat, x, num_layers: int, scale: float, stacked: bool):
    """The blocks in NumPy, from the leaves of a model with LoRA on both projections."""
    x = np.asarray(x)
    for i in range(num_layers):
        leaf = (
            (lambda name, i=i: flat[f"blocks/{name}"][i]) if stacked else lambda name, i=i: flat[f"blocks/{i}/{name}"]
        )
        h = np.tanh(_linear64(leaf, "up", x, scale))
        x = x + _linear64(leaf, "down", h, scale)
    return x


def _linear64(leaf, name: str, x, scale: float):
    a, b = leaf(f"{name}/adapters/lora/A"), leaf(f"{name}/adapters/lora/B")
    return x @ leaf(f"{name}/kernel") + leaf(f"{name}/bias") + scale * ((x @ a) @ b)


def adapted_names(model, **selection):
    """Names of the modules and layers in which a LoRA of this selection acts."""
    adapted = jpeft.adapt(model, jpeft.LoRA(rank=1, **selection), key=jax.random.key(0))
    return {
        name
        for _, module in nnx.iter_modules(adapted)
        for adapter in getattr(module, "adapters", {}).values()
        for name, acts in zip(adapter.site.names, adapter.site.active, strict=True)
        if acts
    }
