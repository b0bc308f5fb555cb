# SPDX-License-Identifier: Apache-2.0
"""Layers kept as ONE module whose leaves carry a leading layer axis, run by `jax.lax.scan`.

Compile time does not grow with depth, and `jax.checkpoint` recomputes one layer at a time. The scope tells what
runs inside the body which layer it is in (`_scope.Scope.layer`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ._scope import scope

#: Names of `jax.ad_checkpoint.checkpoint_name` that the zoo marks and the policies `names` and `offload` keep.
SAVED_NAMES = ("block_input", "attention_output", "mlp_output")

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
        keep = policies.save_only_these_names(*SAVED_NAMES)
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
      layers: a module from `stack` (or any module whose every leaf has the layer axis first).
      body: takes one layer, the carry and this layer's slice of `xs`; returns the new carry and an output.
      carry: pytree handed from layer to layer.
      xs: pytree with a leading layer axis, or None.
      remat_policy: one of `REMAT_POLICIES`.
      unroll: a Python loop in the compiled program's place of the scan: same numbers, longer compile.

    Returns:
      The last carry, and the outputs stacked on a leading layer axis.
    """
    graphdef, flat = nnx.graph.flatten(layers)
    leaves = [leaf.get_value() for leaf in flat.leaves]
    num_layers = leaves[0].shape[0]

    def step(carry: Any, slices: Any) -> tuple[Any, Any]:
        layer_leaves, index, x = slices
        with scope(layer=index):
            return body(nnx.graph.unflatten(graphdef, layer_leaves), carry, x)

    slices = (leaves, jnp.arange(num_layers), xs)
    return jax.lax.scan(remat(step, remat_policy), carry, slices, unroll=num_layers if unroll else 1)
