# SPDX-License-Identifier: Apache-2.0
"""Layers kept as ONE module whose leaves carry a leading layer axis, run by `jax.lax.scan`.

Compile time does not grow with depth, and `jax.checkpoint` recomputes one layer at a time. The scope tells what
runs inside the body which layer it is in (`_scope.Scope.layer`).

Where the lowest layers have nothing to train, they are a scan of their own, which the backward pass does not enter
unless something below the stack is trained.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._method import Adapter, AdapterParam
from ._scope import platform, scope

#: Names of `jax.ad_checkpoint.checkpoint_name` that the zoo marks and the policies `names` and `offload` keep.
SAVED_NAMES = ("block_input", "attention_output", "mlp_output")

#: What costs next to nothing beside a matrix product, and looking up a layer's leaf in the stack.
_CHEAP = frozenset(
    "dynamic_slice squeeze reshape broadcast_in_dim convert_element_type transpose copy name select_n "
    "mul add sub neg div square integer_pow rsqrt logistic".split()
)

#: What a rematerialised layer keeps of its forward pass for the backward one.
REMAT_POLICIES = ("none", "dots", "full", "names", "offload")


def stack(build: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> Any:
    """Builds `num_layers` independent layers as one module, every leaf `[num_layers, ...]`.

    The module is marked with `stack_size`, which tells `jpeft.adapt` that the scan below will run it.
    """
    if num_layers < 1:
        raise ValueError(f"a stack needs at least one layer, got num_layers={num_layers}")
    layers: Any = nnx.vmap(build)(rngs.split(num_layers))
    layers.stack_size = num_layers
    return layers


@jax.tree_util.register_pytree_node_class
class Apart:
    """What belongs to the layers of a stack, one after another, in the place of arrays with a leading layer axis."""

    def __init__(self, layers: Iterable[Any]):
        self.layers = tuple(layers)

    def __getitem__(self, layer: int) -> Any:
        return self.layers[layer]

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return self.layers, None

    @classmethod
    def tree_unflatten(cls, _: None, layers: Iterable[Any]) -> "Apart":
        return cls(layers)


def apart(stacked: Any) -> Any:
    """A pytree of arrays `[layers, ...]` as an `Apart` of such trees without that axis; None stays None."""
    leaves = jax.tree.leaves(stacked)
    return Apart(_layer(stacked, i) for i in range(len(leaves[0]))) if leaves else stacked


def loops_apart() -> bool:
    """Whether a loop that runs a model many times takes its stacks apart: on a CPU.

    Sliced once before the loop, no layer's leaves are copied in it, as a scan on a CPU copies them each time; but they
    are in memory twice while it runs, for which an accelerator may have no room.
    """
    return platform() == "cpu"


def take_apart(model: nnx.Module) -> None:
    """Makes every stack of a model a list of its layers, which `scan` runs in a Python loop, where `loops_apart`."""
    if not loops_apart():
        return
    for _, module in list(nnx.iter_modules(model)):
        for name, layers in list(vars(module).items()):
            if hasattr(layers, "stack_size"):
                graphdef, flat = nnx.graph.flatten(layers)
                leaves = apart([leaf.get_value() for leaf in flat.leaves])
                setattr(module, name, nnx.List([nnx.graph.unflatten(graphdef, own) for own in leaves.layers]))


def remat(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`body` wrapped in `jax.checkpoint` with one of `REMAT_POLICIES`.

    none: everything is kept. dots: matmul results without a batch dimension are kept. full: nothing is kept but
    the layer's input. names: the block's inputs and outputs (`SAVED_NAMES`) are kept. offload: as `names`, moved
    to pinned host memory.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return body
    if policy == "dots":
        keep = policies.dots_with_no_batch_dims_saveable
    elif policy == "full":
        keep = policies.nothing_saveable
    elif policy == "names":
        keep, body = policies.save_only_these_names(*SAVED_NAMES), _keeping_names(body)
    elif policy == "offload":
        keep = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(SAVED_NAMES),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        raise ValueError(f"remat policy must be one of {', '.join(REMAT_POLICIES)}; got {policy!r}")
    return jax.checkpoint(body, policy=keep, prevent_cse=False)  # scan itself prevents the CSE


def _keeping_names(body: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with scope(keeps_names=True):
            return body(*args)

    return run


def scan(
    layers: Any,
    body: Callable[..., tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat_policy: str = "none",
    unroll: bool = False,
) -> tuple[Any, Any]:
    """Runs `carry, y = body(layer, carry, x)` over a stack, layer by layer.

    Args:
      layers: a module from `stack` (or any module whose every leaf has the layer axis first), or its layers in a list.
      body: takes one layer, the carry and this layer's slice of `xs`; returns the new carry and an output.
      carry: pytree handed from layer to layer.
      xs: pytree with a leading layer axis, or None.
      remat_policy: one of `REMAT_POLICIES`.
      unroll: a Python loop in the compiled program's place of the scan: same numbers, longer compile.

    Returns:
      The last carry, and the outputs stacked on a leading layer axis; of a list, `Apart`.
    """
    if isinstance(layers, nnx.List):
        outputs = []
        for index, layer in enumerate(layers):
            with scope(layer=jnp.asarray(index)):
                carry, y = body(layer, carry, _layer(xs, index))
            outputs.append(y)
        return carry, Apart(outputs)
    graphdef, flat = nnx.graph.flatten(layers)
    leaves = [leaf.get_value() for leaf in flat.leaves]
    num_layers = leaves[0].shape[0]

    def step(carry: Any, slices: Any) -> tuple[Any, Any]:
        layer_leaves, index, x = slices
        with scope(layer=index):
            return body(nnx.graph.unflatten(graphdef, layer_leaves), carry, x)

    cached = any(jnp.ndim(x) > 1 for x in jax.tree.leaves(xs))  # of a text that is written: nothing is trained
    first = 0 if cached else lowest_trained(layers)
    if first:
        trained = [isinstance(leaf, AdapterParam) for leaf in flat.leaves]
        return _in_two(step, leaves, trained, first, carry, xs, remat_policy, unroll)
    slices = (leaves, jnp.arange(num_layers), xs)
    return jax.lax.scan(remat(step, remat_policy), carry, slices, unroll=num_layers if unroll else 1)


def _in_two(
    step: Callable[[Any, Any], tuple[Any, Any]],
    leaves: list[jax.Array],
    trained: list[bool],
    first: int,
    carry: Any,
    xs: Any,
    policy: str,
    unroll: bool,
) -> tuple[Any, Any]:
    """A scan of the layers below `first`, of which nothing is trained, and one of the others.

    The base's leaves are looked up in the whole stack, since to cut it would be to copy it; trained ones are cut, so
    that gradients are added to one layer's alone.
    """

    def looking_up(carry: Any, slices: Any) -> tuple[Any, Any]:
        own, index, x = slices
        pairs = zip(leaves, own, strict=True)
        return step(carry, ([_looked_up(leaf, index) if mine is None else mine for leaf, mine in pairs], index, x))

    run, num_layers = _remat_looking_up(looking_up, policy), leaves[0].shape[0]

    def part(carry: Any, start: int, stop: int, own: list[Any]) -> tuple[Any, Any]:
        cut = jax.tree.map(lambda x: x[start:stop], (own, xs))
        return jax.lax.scan(run, carry, (cut[0], jnp.arange(start, stop), cut[1]), unroll=stop - start if unroll else 1)

    own = [leaf if mine else None for leaf, mine in zip(leaves, trained, strict=True)]
    carry, low = part(carry, 0, first, jax.lax.stop_gradient(own))
    carry, high = part(carry, first, num_layers, own)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), low, high)


def lowest_trained(layers: Any) -> int:
    """The first layer of a stack in which an adapter has something to train; 0 where none has, or a layer is no layer.

    Below it adapters neither act nor learn, so that their leaves' gradients are zero.
    """
    lowest = []
    for _, module in nnx.iter_modules(layers):
        if isinstance(module, Adapter) and _trains(module):
            site = module.site
            if len(site.layers) != 1 or not site.scanned:
                return 0
            marks = [site.active, *module.saved_layers.values()]
            lowest += [mark.index(True) // math.prod(site.together) for mark in marks if any(mark)]
    return min(lowest, default=0)


def _trains(adapter: Adapter) -> bool:
    return bool(adapter.saved) or any(isinstance(leaf, AdapterParam) for leaf in vars(adapter).values())


def _looked_up(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """A layer's leaf, by primitives in `_CHEAP`; indexing is a function of its own, which looks like any other."""
    start = (index, *(0,) * (leaf.ndim - 1))
    return jax.lax.squeeze(jax.lax.dynamic_slice(leaf, start, (1, *leaf.shape[1:])), [0])


def _remat_looking_up(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """As `remat`; none keeps all but what is cheap, so that no layer's leaves, which were looked up, are kept again."""
    if policy != "none":
        return remat(body, policy)
    return jax.checkpoint(body, policy=lambda primitive, *_, **__: primitive.name not in _CHEAP, prevent_cse=False)


def _layer(xs: Any, index: int) -> Any:
    """What of `xs` belongs to a layer."""
    return jax.tree.map(lambda x: x[index], xs, is_leaf=lambda x: isinstance(x, Apart))
